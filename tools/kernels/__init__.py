"""Compiles the GPU kernels and reads their machine code."""
