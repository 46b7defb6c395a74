"""Holds the kernels' Triton sources; only `tools.kernels` and interpreter tests import them."""
