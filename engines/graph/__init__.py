"""Rewrites a bundle's graph into the one that TensorRT is given."""
