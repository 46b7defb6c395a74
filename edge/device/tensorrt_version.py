"""Reads the version of TensorRT with its build number: a plan loads only in the same build."""

from __future__ import annotations

import ctypes
import os
from typing import Any


def loaded_version(trt: Any) -> str:
    """Return the version with its build number, e.g. ``10.3.0.30``.

    The Python package of TensorRT 10.3 gives three numbers, the library that it loads gives all
    four. If the library gives none, the package's version is returned.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
    """
    version = str(trt.__version__)
    major, *rest = version.split(".")
    if len(rest) > 2:
        return version
    try:
        library = ctypes.CDLL(f"libnvinfer.so.{major}", os.RTLD_NOLOAD)
        calls = [
            getattr(library, f"getInferLib{part}Version")
            for part in ("Major", "Minor", "Patch", "Build")
        ]
    except (OSError, AttributeError):  # the library has another name, or lacks a function
        return version
    return ".".join(str(call()) for call in calls)
