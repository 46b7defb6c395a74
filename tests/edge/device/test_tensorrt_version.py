"""The version of a TensorRT: its Python package's, with the build number of its library."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from edge.device.tensorrt_version import loaded_version
from engines.compiler import compat

NUMBERS = {"Major": 10, "Minor": 3, "Patch": 0, "Build": 26}


def library(**numbers: int) -> Any:
    calls = {f"getInferLib{part}Version": lambda n=n: n for part, n in numbers.items()}
    return SimpleNamespace(**calls)


def test_the_library_has_the_build_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    numbers = dict(NUMBERS)

    def load(name: str, mode: int) -> Any:
        asked.append((name, mode))
        return library(**numbers)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    assert compat.load("tensorrt").version == "10.3.0.26"
    numbers["Build"] = 30
    assert compat.load("tensorrt").version == "10.3.0.30"
    assert set(asked) == {("libnvinfer.so.10", os.RTLD_NOLOAD)}


def test_a_package_that_says_all_is_believed() -> None:
    assert loaded_version(SimpleNamespace(__version__="10.16.1.11")) == "10.16.1.11"


def test_a_library_that_says_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(__version__="10.3.0")
    assert loaded_version(here) == "10.3.0"  # it is not loaded
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: library(Major=10, Minor=3, Patch=0))
    assert loaded_version(here) == "10.3.0"
