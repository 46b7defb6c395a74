"""ONNX Runtime: `cpu`, the reference of every other engine, and `gpu`, its CUDA provider."""
