"""Turns a checkpoint into a bundle: reads the weights, quantizes them, writes plain ONNX."""
