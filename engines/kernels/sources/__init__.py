"""Holds the kernels' Triton sources; only `scripts/kernels` and interpreter tests import them."""
