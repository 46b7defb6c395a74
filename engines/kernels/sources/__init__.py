"""The kernels' Triton sources; only `scripts/kernels` and the interpreter's tests import them."""
