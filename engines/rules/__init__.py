"""Rules that say, with sources, which ONNX graphs each TensorRT takes; needs no TensorRT."""
