"""Reads facts of the machine: memory, CPUs, limits of control groups, the GPU.

Nothing else in `edge` reads /proc, /sys or device nodes for such facts. Decisions drawn from them,
such as the capacity of a KV cache, belong to `edge.backends`.
"""
