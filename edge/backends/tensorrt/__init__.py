"""TensorRT engines on an NVIDIA GPU: `runner` and what it is put together from."""
