"""Stand-ins for CUDA and TensorRT; README.md has the rules that they keep."""
