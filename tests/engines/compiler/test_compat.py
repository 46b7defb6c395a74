from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from edge.errors import ConfigError, DependencyError
from engines.compiler import compat, support
from engines.compiler.advice import build_advice
from engines.compiler.progress import PhaseTree


@pytest.mark.parametrize(
    ("version", "dialect", "kv_read", "words"),
    [
        ("10.3.0", "native", "slice", r"10\.15, found 10\.3\.0; export with --dialect portable"),
        ("10.14.1", "native", "slice", r"10\.15"),
        ("8.6.2", "portable", "slice", r"10\.3, found 8\.6\.2; upgrade to JetPack 6\.1"),
        ("10.16.2.10", "native", "lengths", r"11\.0, found 10\.16"),
    ],
)
def test_too_old_for_the_graph(version: str, dialect: Any, kv_read: Any, words: str) -> None:
    with pytest.raises(DependencyError, match=words):
        support.check_support("tensorrt", version, dialect, kv_read)


@pytest.mark.parametrize(
    ("flavour", "version", "dialect", "kv_read"),
    [
        ("tensorrt", "10.3.0", "portable", "slice"),
        ("tensorrt", "10.16.2.10", "native", "full"),
        ("tensorrt", "11.4.1", "native", "lengths"),
        ("tensorrt-rtx", "1.7.1.116", "native", "lengths"),
    ],
)
def test_recent_enough(flavour: Any, version: str, dialect: Any, kv_read: Any) -> None:
    support.check_support(flavour, version, dialect, kv_read)


def test_a_version_is_two_numbers_at_least() -> None:
    assert support.parse_release("10.16.2.10") == (10, 16)
    with pytest.raises(ConfigError, match="'newest'"):
        support.parse_release("newest")


def test_a_missing_tensorrt_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DependencyError, match=r"nvidia-jetpack.*\[tensorrt\].*brings cuda-bindings"
    ):
        compat.load()
    with pytest.raises(DependencyError, match=r"install .*-e .*\[check\]"):
        compat.load("tensorrt-rtx")


def test_broken_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(DependencyError, match=r"libnvinfer\.so\.10"):
        compat.load("tensorrt")


def test_tensorrt_is_preferred_to_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    module.__version__ = "10.16.2.10"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    found = compat.load()
    assert (found.flavour, found.release, found.label) == ("tensorrt", (10, 16), "trt10.16")
    assert found.keeps_timings


def test_phases_add_up_and_never_go_back() -> None:
    seen: list[float] = []
    tree = PhaseTree(lambda _step, done, *_: seen.append(done))
    tree.start("all", None, 2)
    tree.start("first", "all", 4)
    tree.step("first", 1)
    assert seen[-1] == pytest.approx(0.25)
    tree.finish("first")
    tree.step("all", 0)
    assert seen[-1] == pytest.approx(0.5)
    tree.start("second", "all", 2)
    tree.start("inner", "second", 2)
    tree.step("inner", 0)
    assert seen[-1] == pytest.approx(0.625)
    tree.finish("inner")
    tree.finish("second")
    tree.step("all", 1)
    tree.finish("all")
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_a_small_workspace_and_a_full_machine_have_different_errors() -> None:
    error = "Error Code 2: OutOfMemory (Requested size was 2650107904 bytes.)"
    assert build_advice(error, 1 << 30) == "give --workspace 2528M or more"
    assert "smaller" in build_advice(error, 4 << 30)
