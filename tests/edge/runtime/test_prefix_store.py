"""Stored prefixes: found when they fit, left alone when anything about them does not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.backends import Backend
from edge.backends.ort.cpu import OrtBackend
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.manifest import FileInfo, Manifest, SamplingDefaults, read_manifest
from edge.engine_config import EngineConfig
from edge.errors import ConfigError, RequestError, ResourceError
from edge.model.cache import Rows
from edge.model.slot_rows import SlotRows
from edge.runtime.llm import LLM
from edge.runtime.prefix_store import Layout, PrefixStore, bundle_key
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.scheduler import Request, Scheduler
from edge.runtime.stream import OutputStream, submit
from edge_lab.cli.cache import cache
from edge_lab.prefixes import compute_rows
from tests.conftest import Bundles
from tests.standins.slot_rows import LAYOUT, layout_of, random_rows, stacked


@pytest.fixture(scope="module")
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2", dialect="portable")


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def reopen(tmp_path: Path, manifest: Manifest, layout: Layout = LAYOUT) -> PrefixStore:
    return PrefixStore(tmp_path, manifest, layout)


def load(store: PrefixStore, ids: list[int]) -> SlotRows | None:
    found = store.lookup(ids)
    return None if found is None else found.load()


def test_what_was_saved_is_found_after_a_restart(tmp_path: Path, manifest: Manifest) -> None:
    store = reopen(tmp_path, manifest)
    short, long = random_rows(3, 1), random_rows(5, 2)
    store.save("short", [1, 2, 3], short)
    path = store.save("long", [1, 2, 3, 4, 5], long)
    assert path.stat().st_mode & 0o077 == 0  # it was made from a prompt
    for opened in (store, reopen(tmp_path, manifest)):
        found = opened.lookup([1, 2, 3, 4, 5, 6])
        assert found is not None
        assert found.length == 5  # the longest
        rows = found.load()
        assert rows is not None
        assert rows.keys() == long.keys()
        assert stacked(rows).dtype == np.float32
        assert np.array_equal(stacked(rows), stacked(long))
        assert np.array_equal(stacked(load(opened, [1, 2, 3, 4])), stacked(short))
        assert np.array_equal(stacked(load(opened, [1, 2, 3])), stacked(short))
        for other in ([1, 2], [2, 1, 2, 3], [], [1, 2, 4, 4, 5]):
            assert opened.lookup(other) is None
    infos = reopen(tmp_path, manifest).list()
    assert [(info.name, info.num_tokens, info.problem) for info in infos] == [
        ("long", 5, None),
        ("short", 3, None),
    ]


@given(
    data=st.data(),
    change=st.sampled_from(["flip", "cut", "grow", "empty"]),
)
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_damage_gets_through(
    tmp_path: Path, manifest: Manifest, data: st.DataObject, change: str
) -> None:
    store = reopen(tmp_path, manifest)
    ids, rows = [7, 8], random_rows(2)
    path = store.save("a", ids, rows)
    whole = bytearray(path.read_bytes())
    head = len(whole) - LAYOUT.num_bytes(2)
    # The head is a sixth of the file; look at it as often as at the rows.
    at = data.draw(st.one_of(st.integers(0, head - 1), st.integers(head, len(whole) - 1)))
    if change == "flip":
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "grow":
        whole += b"\0"
    else:
        del whole[0 if change == "empty" else at :]
    path.write_bytes(whole)
    assert load(store, ids) is None  # damaged behind the back of a running store
    assert store.lookup(ids) is None
    fresh = reopen(tmp_path, manifest)
    if change != "flip":
        assert fresh.lookup(ids) is None  # a wrong size is seen without reading the rows
    assert load(fresh, ids) is None
    (info,) = fresh.list()
    assert info.problem is not None
    # Building it again repairs it.
    fresh.save("a", ids, rows)
    assert np.array_equal(stacked(load(reopen(tmp_path, manifest), ids)), stacked(rows))


def test_a_prefix_that_was_built_anew_is_not_taken_for_the_old_one(
    tmp_path: Path, manifest: Manifest
) -> None:
    store = reopen(tmp_path, manifest)
    store.save("a", [1, 2], random_rows(2))
    found = store.lookup([1, 2, 3])
    reopen(tmp_path, manifest).save("a", [3, 4], random_rows(2, 1))
    assert found is not None
    assert found.load() is None


@pytest.mark.parametrize(
    "layout",
    [
        layout_of(4, Rows(2, 8, "fp16")),
        layout_of(4, Rows(2, 8, "fp32"), engine="tensorrt"),
        layout_of(2, Rows(4, 8, "fp32")),
        msgspec.structs.replace(LAYOUT, rounds_activations=True),
    ],
)
def test_rows_of_another_engine_or_type_are_left_alone(
    tmp_path: Path, manifest: Manifest, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    reopen(tmp_path, manifest).save("a", [1], random_rows(1))
    with caplog.at_level(logging.WARNING):
        other = reopen(tmp_path, manifest, layout)
    assert other.lookup([1, 2]) is None
    assert len(caplog.records) == 1
    assert "build it again" in caplog.text


def test_a_file_of_version_1_is_left_alone(
    tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    path = reopen(tmp_path, manifest).save("a", [1], random_rows(1))
    path.write_bytes(path.read_bytes().replace(b"prefix 2", b"prefix 1", 1))
    with caplog.at_level(logging.WARNING):
        assert reopen(tmp_path, manifest).lookup([1, 2]) is None
    assert "no prefix file of this version" in caplog.text
    reopen(tmp_path, manifest).save("a", [1], random_rows(1))
    assert load(reopen(tmp_path, manifest), [1, 2]) is not None


def test_tensors_of_unlike_shapes_and_types_come_back(tmp_path: Path, manifest: Manifest) -> None:
    random = np.random.default_rng(0)
    rows = SlotRows(
        {
            "0.key": random.standard_normal((1, 3, 8)).astype(np.float16),
            "2.key": random.standard_normal((4, 3, 2)).astype(np.float32),
        }
    )
    layout = Layout("ort-cpu", {"0.key": Rows(1, 8, "fp16"), "2.key": Rows(4, 2, "fp32")})
    PrefixStore(tmp_path, manifest, layout).save("a", [1, 2, 3], rows)
    found = load(PrefixStore(tmp_path, manifest, layout), [1, 2, 3, 4])
    assert found is not None
    assert list(found) == list(rows)
    for name, array in rows.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_rows_of_another_bundle_are_left_alone(tmp_path: Path, manifest: Manifest) -> None:
    files = {**manifest.files, "decoder.onnx": FileInfo(num_bytes=1, sha256="0" * 64)}
    other = msgspec.structs.replace(manifest, files=files)
    path = reopen(tmp_path, manifest).save("a", [1], random_rows(1))
    assert reopen(tmp_path, other).lookup([1]) is None
    # Even where someone copied the file over.
    target = tmp_path / bundle_key(other)[:16] / "a.kv"
    target.parent.mkdir()
    target.write_bytes(path.read_bytes())
    store = reopen(tmp_path, other)
    assert store.lookup([1]) is None
    assert "another bundle" in str(store.list()[0].problem)
    # A quality report changes the manifest and no row.
    reported = msgspec.structs.replace(manifest, quality={"ppl": 1.0})
    assert reopen(tmp_path, reported).lookup([1]) is not None


_KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from edge.runtime import prefix_store
from edge.bundle import update
from edge.bundle.manifest import read_manifest
from tests.standins.slot_rows import LAYOUT, filled_rows
store = prefix_store.PrefixStore(Path(sys.argv[1]), read_manifest(Path(sys.argv[2])), LAYOUT)
point, os_fsync = sys.argv[3], os.fsync
def stop(*_):
    os._exit(9)
if point == "fsync":
    os.fsync = stop
elif point == "replace":
    Path.replace = stop
else:
    update.try_lock = lambda *a: stop()
store.save("a", [1, 2], filled_rows(2))
"""


@pytest.mark.parametrize("point", ["lock", "fsync", "replace"])
def test_a_build_that_is_killed_leaves_the_old_prefix(
    tmp_path: Path, manifest: Manifest, bundle: Path, point: str
) -> None:
    store = reopen(tmp_path, manifest)
    old = random_rows(3)
    store.save("a", [1, 2, 3], old)
    command = [sys.executable, "-c", _KILLED, str(tmp_path), str(bundle), point]
    assert subprocess.run(command, check=False).returncode == 9
    fresh = reopen(tmp_path, manifest)
    assert np.array_equal(stacked(load(fresh, [1, 2, 3])), stacked(old))
    new = random_rows(2)
    fresh.save("a", [1, 2], new)  # what the killed one left is in nobody's way
    assert np.array_equal(stacked(load(fresh, [1, 2, 3])), stacked(new))
    assert [path.name for path in fresh.directory.iterdir()] == ["a.kv"]


def test_two_writers_of_one_prefix_do_not_mix(tmp_path: Path, manifest: Manifest) -> None:
    import fcntl

    store = reopen(tmp_path, manifest)
    store.save("a", [1], random_rows(1))
    with (store.directory / ".a.kv.tmp").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is writing"):
            store.save("a", [1, 2], random_rows(2))
    assert load(reopen(tmp_path, manifest), [1]) is not None


def test_a_new_prefix_survives_a_power_loss(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are forced to the disk before its name appears, then the name."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")

    def note_replace(path: Path, target: Path) -> Path:
        events.append(f"{path.name} -> {target.name}")
        return replace(path, target)

    store = reopen(tmp_path, manifest)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    store.save("a", [1], random_rows(1))
    folder = store.directory.name
    assert events == ["fsync .a.kv.tmp", ".a.kv.tmp -> a.kv", f"fsync {folder}"]


def test_a_killed_build_leaves_nothing_in_the_next_prefix(
    tmp_path: Path, manifest: Manifest
) -> None:
    store = reopen(tmp_path, manifest)
    store.save("a", [1], random_rows(1))
    (store.directory / ".a.kv.tmp").write_bytes(b"x" * 100_000)
    new = random_rows(2)
    store.save("a", [1, 2], new)
    found = load(reopen(tmp_path, manifest), [1, 2, 3])
    assert found is not None
    assert np.array_equal(stacked(found), stacked(new))


def test_a_writer_that_gets_the_lock_too_late_leaves_the_prefix(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its open and its lock another made the file that it opened the real one."""
    import fcntl

    store = reopen(tmp_path, manifest)
    store.save("a", [1], random_rows(1))
    path, flock = store.directory / "a.kv", fcntl.flock
    whole = path.read_bytes()
    temp = store.directory / ".a.kv.tmp"
    for next_writer in (False, True):
        temp.write_bytes(whole)

        def finish(file: Any, operation: int, follows: bool = next_writer) -> None:
            temp.replace(path)
            if follows:
                temp.touch()
            flock(file, operation)

        monkeypatch.setattr(fcntl, "flock", finish)
        with pytest.raises(ConfigError, match="another process is writing"):
            store.save("a", [1, 2], random_rows(2))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("exists", [True, False])
def test_a_planted_link_is_not_written_through(
    tmp_path: Path, manifest: Manifest, exists: bool
) -> None:
    store = reopen(tmp_path / "store", manifest)
    store.save("a", [1], random_rows(1))
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("precious")
    (store.directory / ".a.kv.tmp").symlink_to(victim)
    with pytest.raises(ResourceError, match="cannot write"):
        store.save("a", [1, 2], random_rows(2))
    assert victim.exists() == exists
    assert not exists or victim.read_text() == "precious"


def test_bounds_and_names(tmp_path: Path, manifest: Manifest) -> None:
    store = PrefixStore(tmp_path, manifest, LAYOUT, max_bytes=3000)
    store.save("a", [1] * 8, random_rows(8))  # 2,048 bytes
    with pytest.raises(ResourceError, match="drop one with"):
        store.save("b", [2] * 8, random_rows(8))
    store.save("a", [3] * 8, random_rows(8))  # its own old file does not count
    for name in ("", "../a", "a/b", "a.b", "x" * 65, "ä"):
        with pytest.raises(ConfigError, match="cannot be a prefix"):
            store.save(name, [1], random_rows(1))
        with pytest.raises(ConfigError, match="cannot be a prefix"):
            store.drop(name)
    assert store.drop("a")
    assert not store.drop("a")
    assert store.lookup([3] * 8) is None


def test_a_directory_that_cannot_be_written(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="name another directory"):
        reopen(tmp_path / "file", manifest).save("a", [1], random_rows(1))


# ------------------------------------------------------------------------- with a real engine


@dataclass
class Engine:
    backend: Backend
    table: EmbeddingTable
    manifest: Manifest

    def answer(self, ids: list[int], store: PrefixStore | None) -> tuple[list[int], int]:
        """Twelve greedy tokens, and how many of the prompt were not computed."""
        params = SamplingParams(temperature=0.0, max_tokens=12).resolve(SamplingDefaults())
        scheduler = Scheduler(
            self.backend,
            self.table,
            self.manifest.model.vocab_size,
            EngineConfig(reuse_prefix=False),
            prefix_store=store,
        )
        try:
            request = Request(ids=tuple(ids), params=params, end_ids=frozenset())
            (generation,) = submit(scheduler, [request], [OutputStream()])
            result = generation.result()
        finally:
            scheduler.close()
        return [token.id for token in result.tokens], result.stats.cached_tokens


@pytest.fixture
def engine(bundle: Path, manifest: Manifest) -> Iterator[Engine]:
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    backend = OrtBackend(bundle, manifest, num_threads=1, max_step_tokens=16)
    yield Engine(backend, table, manifest)
    backend.close()
    table.close()


def test_a_stored_prefix_changes_no_answer(tmp_path: Path, engine: Engine) -> None:
    prefix = np.random.RandomState(1).randint(0, 300, 40).tolist()
    rows = compute_rows(engine.backend, engine.table, prefix)
    layout = Layout.of(engine.backend)
    PrefixStore(tmp_path, engine.manifest, layout).save("p", prefix, rows)
    store = PrefixStore(tmp_path, engine.manifest, layout)
    for rest in ([], [5], [9, 8, 7, 6]):
        plain, none = engine.answer(prefix + rest, None)
        stored, cached = engine.answer(prefix + rest, store)
        assert stored == plain
        assert (none, cached) == (0, min(len(prefix), len(prefix + rest) - 1))
    # A file that is damaged while the engine runs costs time, and nothing else.
    path = next(store.directory.glob("*.kv"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert engine.answer([*prefix, 5], store) == engine.answer([*prefix, 5], None)


def test_rounded_rows_are_not_those_of_a_float_engine(
    tmp_path: Path, tiny_bundles: Bundles
) -> None:
    """Each kind is built by the option of its name, and serves its own kind only."""
    int4, text = tiny_bundles("qwen2", quant="int4"), tmp_path / "text.txt"
    text.write_text("You are the world that said hello. " * 3)
    for built, rounds in (("--int8-activations", True), ("--no-int8-activations", False)):
        folder = tmp_path / built
        arguments = ["build", int4, "a", "--text", text, "--prefix-dir", folder, built]
        assert CliRunner().invoke(cache, [str(a) for a in arguments]).exit_code == 0
        for asked in (True, False):
            with LLM(int4, int8_activations=asked) as llm:
                layout = Layout.of(llm.backend)
                assert layout.rounds_activations is asked
                ids = llm.encode(text.read_text() + " and more")
                found = PrefixStore(folder, llm.manifest, layout).lookup(ids)
                assert (found is not None) is (asked is rounds)


def test_the_command_builds_lists_and_drops(tmp_path: Path, bundle: Path) -> None:
    system = tmp_path / "system.txt"
    said = "You are the world that said hello. " * 3
    system.write_text(said + "\n")
    store = ["--prefix-dir", str(tmp_path / "store"), "--json"]

    def run(*args: object) -> dict[str, object]:
        result = CliRunner().invoke(cache, [*map(str, args), *store], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found: dict[str, object] = json.loads(result.output)
        return found

    built = run("build", bundle, "chat", "--system", system)
    with LLM(bundle) as llm:
        prompt = [
            {"role": "system", "content": said},
            {"role": "user", "content": "hello there"},
        ]
        ids = llm.encode(prompt)
        found = PrefixStore(tmp_path / "store", llm.manifest, Layout.of(llm.backend)).lookup(ids)
    assert found is not None
    assert found.length == built["num_tokens"]
    assert found.length > len(ids) / 2
    again = ["build", bundle, "chat", "--system", system, *store[:2]]
    told = CliRunner().invoke(cache, [*map(str, again)], catch_exceptions=False).output
    assert told.endswith(f"use it with --prefix-dir {tmp_path / 'store'}\n")
    text = run("build", bundle, "text", "--text", system)
    listed = run("list", bundle)["prefixes"]
    assert isinstance(listed, list)
    assert [(info["name"], info["num_tokens"]) for info in listed] == [
        ("chat", built["num_tokens"]),
        ("text", text["num_tokens"]),
    ]
    assert run("drop", bundle, "chat") == {"dropped": "chat"}
    with pytest.raises(RequestError, match="nothing is stored as 'chat'"):
        run("drop", bundle, "chat")
    with pytest.raises(ConfigError, match="give one of --system"):
        run("build", bundle, "x")
    assert os.listdir(tmp_path / "store") == [bundle_key(read_manifest(bundle))[:16]]  # noqa: PTH208
