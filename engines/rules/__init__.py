"""What each TensorRT takes of an ONNX graph, as data with sources; TensorRT need not be here."""
