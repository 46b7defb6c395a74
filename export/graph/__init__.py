"""The ONNX decoder and the files that hold it."""
