"""Lists the device nodes of NVIDIA GPUs: which the driver opens, and which prove a GPU."""

from __future__ import annotations

import os
from pathlib import Path

RENDER_NODES = ("/dev/dri/renderD128", "/dev/dri/renderD129")
"""Lists an Orin's one or two render nodes; CUDA answers 801 if it may not open them."""
# JetPack 6 opens nvmap and nvhost-*; JetPack 7 nvmap and nvgpu/igpu0/*; a discrete GPU the others.
JETSON_NODES = (
    "/dev/nvmap",
    "/dev/nvhost-ctrl-gpu",
    "/dev/nvhost-gpu",
    "/dev/nvhost-as-gpu",
    "/dev/host1x-fence",
    "/dev/nvgpu/igpu0/ctrl",
    "/dev/nvgpu/igpu0/as",
    "/dev/nvgpu/igpu0/channel",
    "/dev/nvgpu/igpu0/tsg",
    *RENDER_NODES,
)
SLOT_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm")
_WSL_NODE = "/dev/dxg"
# Other machines have these, too: a virtual machine without a GPU, a board of another maker.
_NOT_A_SIGN = ("/dev/host1x-fence", *RENDER_NODES)
JETSON_SIGNS = tuple(name for name in JETSON_NODES if name not in _NOT_A_SIGN)
"""Nodes that only a Jetson has."""
GPU_NODES = (*JETSON_SIGNS, *SLOT_NODES)


def may_open(node: Path) -> bool:
    """Whether this process may open a node as the driver does; nvmap may be 0440: read only."""
    return os.access(node, os.R_OK if node.name == "nvmap" else os.R_OK | os.W_OK)


def find_gpu_node(root: Path = Path("/")) -> str | None:
    """Return the first device node that only an NVIDIA GPU has; None on a machine without one.

    It does not ask the driver: a machine without a driver, a library or a right still has the GPU.

    Args:
        root: directory that contains ``dev`` and ``usr``.
    """
    # Every WSL has this node, but only NVIDIA's driver for Windows brings this library.
    if (root / _WSL_NODE[1:]).exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        return _WSL_NODE
    return next((name for name in GPU_NODES if (root / name[1:]).exists()), None)
