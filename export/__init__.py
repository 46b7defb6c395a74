"""Checkpoint to bundle: read the weights, quantize them, write the decoder as plain ONNX."""
