"""Wraps TensorRT on the machine that builds: nothing else here imports it."""
