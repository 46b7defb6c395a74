"""``tools/trt-bindings`` without its wheels: stub libraries, uses of the code, and verdicts."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import pytest

from tools.trt import bindings as trt_bindings
from tools.trt.bindings import (
    FUNCTIONS,
    LIBRARIES,
    PRESENCE,
    WHEELS,
    find_problems,
    find_strangers,
    find_uses,
    own_names,
    parse_signatures,
    source_files,
    stub_library,
    write_stubs,
)


def test_the_stub_libraries_load_and_every_function_returns_null(tmp_path: Path) -> None:
    write_stubs(tmp_path)
    for library in LIBRARIES:
        loaded = ctypes.CDLL(str(tmp_path / f"{library}.so.10"))
        assert [getattr(loaded, name)() for name in FUNCTIONS] == [0] * len(FUNCTIONS)
        with pytest.raises(AttributeError):
            _ = loaded.createSomethingElse


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_stub_is_of_the_machine_that_is_asked_for(machine: str) -> None:
    data = stub_library("libnvinfer.so.10", ["one"], machine)
    assert data[:4] == b"\x7fELF"
    assert int.from_bytes(data[18:20], "little") == {"x86_64": 62, "aarch64": 183}[machine]


def test_an_unknown_machine_has_no_stub() -> None:
    with pytest.raises(KeyError):
        stub_library("a.so", [], "vax")


def test_the_uses_of_this_code_are_found() -> None:
    files = {path.name for path in source_files()}
    assert {"compat.py", "engine.py", "bound_context.py", "probe.py"} <= files
    uses = find_uses(source_files())
    assert ("MemoryPoolType", "WORKSPACE") in uses.chains
    assert ("ILogger", "Severity", "ERROR") in uses.chains  # by an alias
    assert ("IAttention",) in uses.chains  # by hasattr
    assert "key_value_lengths" in uses.members  # by getattr
    assert ("set_memory_pool_limit", 2, ()) in uses.calls
    assert (".OnnxParser", 2, ()) in uses.calls


@pytest.mark.parametrize(
    ("doc", "shown"),
    [
        ("f(self: trt.A, pool: trt.B, size: int) -> None\n\n text(not, a, line)", ["(pool, size)"]),
        ("f(self: trt.A, flags: int = 0) -> trt.N", ["(flags)"]),
        ("f(self: trt.A, s: trt.S = <S.STATIC: 0>, n: dict[int, str] = {}) -> x", ["(s, n)"]),
        (
            "f(*args, **kwargs)\nOverloaded function.\n\n1. f(self: A) -> int\n2. f(self: A, b: B)",
            ["()", "(b)"],
        ),
        ("no signature here", []),
    ],
)
def test_signatures_are_read_from_what_pybind_writes(doc: str, shown: list[str]) -> None:
    assert [str(signature) for signature in parse_signatures(doc)] == shown


@pytest.mark.parametrize(
    ("count", "keywords", "fits"),
    [
        (1, (), True),
        (2, (), True),
        (1, ("b",), True),
        (0, ("a",), True),
        (0, (), False),
        (3, (), False),
        (2, ("b",), False),
        (1, ("c",), False),
    ],
)
def test_a_call_fits_or_not(count: int, keywords: tuple[str, ...], fits: bool) -> None:
    (signature,) = parse_signatures("f(self: A, a: int, b: int = 0) -> None")
    assert signature.takes(count, keywords) is fits


SURFACE: dict[str, Any] = {
    "version": "10.3.0",
    "names": ["Builder", "Kind"],
    "members": {
        "Builder": {
            "__init__": "__init__(self: Builder, logger: L) -> None",
            "build": "build(self: Builder, config: C) -> P",
            "size": None,
        },
        "Kind": {"ONE": None},
    },
}
UNIVERSE = {"build", "size", "newer", "causal_kind", "ONE"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("trt.Builder(log).build(config)", None),
        ("trt.Kind.ONE", None),
        ("b.size", None),
        ("b.nothing_of_tensorrt(1, 2, 3)", None),
        ("trt.Kind.TWO", "there is no Kind.TWO"),
        ("trt.Runtime", "there is no Runtime"),
        ("trt.Builder()", ".Builder() with 0 arguments"),
        ("b.build(config, 1)", "build() with 2 arguments"),
        ("b.build(setting=1)", "['setting'] fits none of (config)"),
        ("b.newer", "no class has newer"),
        ("getattr(b, 'newer', None)", "no class has newer"),
        ("hasattr(trt, 'Runtime')", "there is no Runtime"),
        ("b.causal_kind", None),  # from 11.0 on, and guarded
    ],
)
def test_a_missing_name_is_reported_with_its_place(
    tmp_path: Path, line: str, problem: str | None
) -> None:
    path = tmp_path / "code.py"
    path.write_text(f"\n{line}\n")
    found = list(find_problems(find_uses([path]), SURFACE, (10, 3), UNIVERSE))
    if problem is None:
        assert found == []
    else:
        assert [problem in each and f"{path}:2" in each for each in found] == [True]


def test_a_guarded_name_must_be_there_from_its_release_on(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("b.causal_kind\n")
    uses = find_uses([path])
    assert not list(find_problems(uses, SURFACE, (10, 16), UNIVERSE))
    assert list(find_problems(uses, SURFACE, (11, 0), UNIVERSE))


def test_a_misspelt_member_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("import os\nos.anything\nb.size\nb.set_memory_poool()\n'a'.join(b)\n")
    uses = find_uses([path])
    (stranger,) = find_strangers(uses, UNIVERSE, set())
    assert f"{path}:4: nobody has set_memory_poool" in stranger
    assert not list(find_strangers(uses, UNIVERSE, {"set_memory_poool"}))
    assert {"find_uses", "Compiler", "parse", "_log"} - own_names() == {"find_uses"}


def test_every_guarded_name_is_used() -> None:
    uses = find_uses(source_files())
    used = {*uses.members, *(name for chain in uses.chains for name in chain)}
    used |= {name.lstrip(".") for name, *_ in uses.calls}
    assert set(PRESENCE) <= used


def test_wheels_are_locked() -> None:
    for requirement, hashes in WHEELS.values():
        assert "==" in requirement
        assert len(hashes) in (3, 4)
        assert all(len(each) == 64 for each in hashes)


def test_the_stubs_are_for_this_machine() -> None:
    assert platform.machine() in trt_bindings._MACHINES
