"""Runs TensorRT engines on an NVIDIA GPU.

Here: `runner`, the backend, and its parts: the engine's plan, device memory, CUDA graphs, and the
launches of own kernels. It only runs engines. Building them, and the rules of what TensorRT takes,
are in `engines`.
"""
