"""Runs bundles on ONNX Runtime.

Here: `cpu`, the reference for every other engine, `gpu` with ONNX Runtime's CUDA provider, their
caches, and the rewrites of a graph at load. The bundle's files stay plain ONNX: a rewrite changes
only the session's copy.
"""
