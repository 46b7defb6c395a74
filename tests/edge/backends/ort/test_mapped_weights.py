"""Weights in files in memory: what a session finds, what is left, and when they are not used."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edge.backends.ort import join_planes as planes
from edge.backends.ort import mapped_weights as module
from edge.backends.ort.cpu import OrtBackend
from edge.backends.ort.mapped_weights import has_room, lend, map_file
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import Node, OnnxFile, small_model, tensor_info
from edge_make.graph_edits import put_in_file
from tests.conftest import Bundles, require_kernels
from tests.edge.backends.runner import Runner, random_ids

if not has_room(1 << 24):
    pytest.skip("no files in memory here", allow_module_level=True)


PREFIX = f"edge-llm-test-{os.getpid()}-"  # all processes of the machine share the folder


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_PREFIX", PREFIX)
    yield
    left = names_in_memory()
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not left


def names_in_memory() -> list[Path]:
    return list(Path("/dev/shm").glob(f"{PREFIX}*"))


def lent_graph(bundle: Path, names: tuple[str, ...] = ("a", "b"), lent: bool = True) -> OnnxFile:
    """A graph of two weights in files, one in memory and one in the bundle."""
    inputs = [*names, "scale", "norm"]
    graph = OnnxFile(
        small_model([Node("Sum", inputs, ["y"], "sum")], [], [tensor_info("y", 1, [4])], opset=21)
    )
    values: dict[str, Any] = {"scale": np.full(4, 3, np.float32)}
    for number, name in enumerate(names):
        memory = map_file(16) if lent else bytearray(16)
        assert memory is not None
        values[name] = np.frombuffer(memory, np.float32).reshape(2, 2).reshape(4)
        values[name][:] = number
    (bundle / "data").write_bytes(b"skip" + np.full(4, 7, np.float32).tobytes())
    put_in_file(graph, "norm", "fp32", [4], ("data", 4, 16))
    graph.put_in_memory(values)
    return graph


def read(folder: Path, name: str, offset: int = 0) -> list[float]:
    return list(np.fromfile(folder / name, np.float32, offset=offset))


def test_a_session_finds_all_in_one_folder(tmp_path: Path):
    graph = lent_graph(tmp_path)
    with lend(graph, tmp_path) as folder:
        assert folder.stat().st_mode & 0o077 == 0
        found = [read(folder, name) for name in ("a", "b", "scale")] + [read(folder, "data", 4)]
        assert graph.in_memory == {}
    assert found == [[0] * 4, [1] * 4, [3] * 4, [7] * 4]
    assert not folder.exists()


def test_onnxruntime_computes_with_what_it_finds(tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    graph, options = lent_graph(tmp_path), ort.SessionOptions()
    model = graph.serialize()
    with lend(graph, tmp_path) as folder:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert session.run(None, {})[0].tolist() == [11] * 4


def test_names_go_once_all_that_is_new_is_mapped(tmp_path: Path):
    """Not before: a session could not open the others."""
    with lend(lent_graph(tmp_path), tmp_path) as folder:

        def mapped(name: str) -> mmap.mmap:
            with (folder / name).open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        maps = [mapped("scale"), mapped("a")]
        time.sleep(5 * module._POLL_S)
        assert {path.name for path in folder.iterdir()} == {"a", "b", "scale", "data"}
        maps.append(mapped("b"))
        for _ in range(1000):
            if {path.name for path in folder.iterdir()} == {"data"}:
                break
            time.sleep(module._POLL_S)
        else:
            pytest.fail(f"still there: {list(folder.iterdir())}")
        assert maps[2][:] == np.full(4, 1, np.float32).tobytes()


def test_a_failed_session_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError, match="refused"), lend(lent_graph(tmp_path), tmp_path):
        raise RuntimeError("refused")


@pytest.mark.parametrize("why", ["no files", "a path", "much to copy"])
def test_else_the_bundle_is_where_weights_are(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("a", f"../{PREFIX}b") if why == "a path" else ("a", "b")
    graph = lent_graph(tmp_path, names, lent=why != "no files")
    if why == "much to copy":
        monkeypatch.setattr(module, "_MOST_COPIED_BYTES", 15)
    with lend(graph, tmp_path) as folder:
        assert folder == tmp_path
        assert len(graph.in_memory) == 3  # to be handed over


@pytest.mark.parametrize("folder", ["missing", "denied", "full"])
def test_no_room(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if folder == "full":
        assert not has_room(1 << 60)
        return
    if folder == "denied":
        monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError()))
    else:
        monkeypatch.setattr(module, "_FOLDER", str(tmp_path / "missing"))
    assert not has_room(0)


def test_a_file_that_does_not_fit_is_said_at_once():
    assert map_file(1 << 60) is None


@pytest.mark.parametrize("why", ["full", "no /proc"])
def test_values_are_handed_over_where_names_fail(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As when another process takes the room between the look at it and the use of it."""
    graph = lent_graph(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(why)

    if why == "full":
        graph.in_memory["scale"] = np.ma.array(graph.in_memory["scale"])
        monkeypatch.setattr(np.ma.MaskedArray, "tofile", fail)
    else:
        monkeypatch.setattr(os, "link", fail)
    with lend(graph, tmp_path) as folder:
        assert folder == tmp_path
        assert len(graph.in_memory) == 3
        assert not names_in_memory()


def test_only_folders_of_killed_processes_are_removed(tmp_path: Path):
    code = f"""
import sys, threading
from pathlib import Path
from edge.backends.ort import mapped_weights
mapped_weights._PREFIX = {PREFIX!r}
from tests.edge.backends.ort.test_mapped_weights import lend, lent_graph
with lend(lent_graph(Path({str(tmp_path)!r})), Path({str(tmp_path)!r})) as folder:
    print(folder, flush=True)
    threading.Event().wait()
"""
    root = Path(__file__).parents[4]
    with (
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE) as child,
        lend(lent_graph(tmp_path), tmp_path) as mine,
    ):
        assert child.stdout is not None
        try:
            theirs = Path(child.stdout.readline().decode().strip())
            assert {mine, theirs} == set(names_in_memory())
            with lend(lent_graph(tmp_path), tmp_path):
                assert len(names_in_memory()) == 3  # both are in use
        finally:
            child.kill()
            child.wait()
        assert (theirs / "a").exists()
        empty = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/dev/shm"))  # somebody has just made it
        with lend(lent_graph(tmp_path), tmp_path) as other:
            assert {mine, other, empty} == set(names_in_memory())
        empty.rmdir()


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_a_model_in_files_computes_the_same_bits_and_gives_its_weights_back(
    quant: str, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    require_kernels("native")
    bundle = tiny_bundles("qwen2", "native", quant)
    found = []
    for room in (True, False):
        monkeypatch.setattr(planes, "has_room", lambda _, room=room: room)
        with Runner(bundle, int8_activations=True) as runner:
            maps = Path("/proc/self/maps").read_text()
            found.append([runner.step(random_ids(1, n, seed=n)) for n in (17, 1)])
        assert (PREFIX in maps) == room  # what its kernels read as it is: norms
        assert ".weight (deleted)" not in maps
        assert not any(line.endswith(".weight") for line in maps.splitlines() if PREFIX in line)
    for ours, theirs in zip(*found, strict=True):
        assert_array_equal(ours, theirs)


def test_the_largest_weight_is_packed_before_the_others_take_memory(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    require_kernels("native")
    ort = pytest.importorskip("onnxruntime")
    models, real = [], ort.InferenceSession

    def session(model: bytes, *options: Any, **more: Any) -> Any:
        models.append(model)
        return real(model, *options, **more)

    monkeypatch.setattr(ort, "InferenceSession", session)
    with Runner(tiny_bundles("qwen2", "native", "int4")) as runner:
        runner.step(random_ids(1, 3))
    products = [node for node in OnnxFile(models[0]).nodes if node.op_type == "MatMulNBits"]
    assert products[0].inputs[1] == "lm_head.weight"
    assert len(products) > 1


def test_deterministic_products_are_cut_from_files_too(tiny_bundles: Bundles):
    require_kernels("native")
    bundle = tiny_bundles("qwen2", "native", "int4")
    OrtBackend(bundle, read_manifest(bundle), kv_capacity=64, deterministic=True).close()
