"""What `kill -9` and a full disk leave: the old file or the new one, whole, and nothing for ever.

Bundles have their own such tests in `tests/export/test_bundle.py`, calibration in
`tests/export/test_resume.py`, engines in `tests/engines/builder/test_build.py`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError, EdgeError, ResourceError
from edge.model.cache import Rows
from edge.runtime.prefix_store import PrefixStore
from edge_lab.measure.drift import write_atomic
from edge_serve.stored.store import ResponseStore
from export.resume import STATE_NAME
from tests.conftest import Bundles
from tests.edge_serve.stored.records import make_record
from tests.kill_points import calibrate
from tests.standins.slot_rows import LAYOUT, filled_rows, layout_of

ROOT = Path(__file__).parent.parent
OLD, NEW = b"old" * 70_000, b"new" * 100_000


def kill_everywhere(root: Path, scenario: str, *arguments: object) -> list[Path]:
    """Places where the scenario was killed at one point each; the whole run is among them."""
    command = [sys.executable, "-m", "tests.kill_points", str(root), scenario, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=300, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    places = sorted(path for path in root.iterdir() if path.name != "start")
    assert sum(path.name.startswith("op-") for path in places) >= 5
    return places


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_stored_prefix(tiny_bundles: Bundles, tmp_path: Path):
    bundle = tiny_bundles("qwen2")
    manifest = read_manifest(bundle)

    def store(place: Path) -> PrefixStore:
        return PrefixStore(place, manifest, LAYOUT)

    old = filled_rows(400)
    store(tmp_path / "start").save("a", [1] * 400, old)
    found = []
    for place in kill_everywhere(tmp_path, "prefix", bundle):
        (info,) = store(place).list()
        assert info.problem is None
        found.append(info.num_tokens)
        # Whatever is saved next, of another name too, takes away what was left.
        store(place).save("b", [3], filled_rows(1))
        assert names(place) == ["a.kv", "b.kv"]
    assert set(found) == {400, 600}


@pytest.mark.slow
def test_a_prefix_that_the_verb_builds(tiny_bundles: Bundles, tmp_path: Path):
    bundle, text = tiny_bundles("qwen2"), tmp_path / "text"
    text.write_text("hello world " * 20)
    root = tmp_path / "root"
    (root / "start").mkdir(parents=True)
    manifest = read_manifest(bundle)
    found = []
    for place in kill_everywhere(root, "cache", bundle, text):
        infos = PrefixStore(place, manifest).list()
        assert all(info.problem is None for info in infos)
        found.append(len(infos))
        layout = layout_of(4, Rows(2, 8, "fp32"), engine="other")
        other = PrefixStore(place, manifest, layout)
        other.save("b", [3], filled_rows(1))
        assert names(place) == (["a.kv", "b.kv"] if infos else ["b.kv"])
    assert set(found) == {0, 1}


@pytest.mark.slow
def test_a_calibrated_export(tmp_path: Path):
    (tmp_path / "start").mkdir()
    with suppress(KeyboardInterrupt):
        calibrate(tmp_path / "start", "1")
    wanted = b"".join(np.full(1 << 14, layer, np.float32).tobytes() for layer in range(3))
    found = set()
    for place in kill_everywhere(tmp_path, "calibration"):
        state = place / "work" / STATE_NAME
        found.add(json.loads(state.read_bytes())["finished"] if state.exists() else None)
        calibrate(place)
        assert names(place) == ["x.data"]
        assert (place / "x.data").read_bytes() == wanted
    assert found == {1, 2, 3, None}  # None: it was done


@pytest.mark.slow
def test_a_stored_response(tmp_path: Path):
    (tmp_path / "start").mkdir()
    begun = make_record(1 << 40, answer=0)
    store = ResponseStore(tmp_path / "start" / "stored")
    store.save(begun)
    store.close()
    found = []
    for place in kill_everywhere(tmp_path, "response"):
        store = ResponseStore(place / "stored")
        record = store.load(begun.id)
        assert record is not None
        assert record.unfinished is not None
        rows = store.load_rows(begun.id, {})
        assert (rows is not None) == bool(record.unfinished.answer)
        found.append(rows is not None)
        assert names(place) == [f"{begun.id}.response"]
        store.close()
    assert set(found) == {False, True}


# Old versions of NumPy leave the archive open when a write fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_the_layers_that_were_done(tmp_path: Path):
    with suppress(KeyboardInterrupt):
        calibrate(tmp_path, "1")
    before = names(tmp_path)
    for num_bytes in (70_000, 200_000):  # in the weights, in the state's arrays
        with room(num_bytes), pytest.raises(OSError, match="File too large"):
            calibrate(tmp_path)
        assert names(tmp_path) == before
    calibrate(tmp_path)
    assert names(tmp_path) == ["x.data"]


@pytest.mark.slow
def test_the_watchs_files(tmp_path: Path):
    (tmp_path / "start").mkdir()
    write_atomic(tmp_path / "start" / "state.json", OLD)
    found = set()
    for place in kill_everywhere(tmp_path, "state"):
        data = (place / "state.json").read_bytes()
        assert data in (OLD, NEW)
        found.add(data)
        assert len(names(place)) <= 2
        write_atomic(place / "state.json", b"next")
        assert names(place) == ["state.json"]
        assert (place / "state.json").read_bytes() == b"next"
    assert found == {OLD, NEW}


# --------------------------------------------------------------------------- a full disk


@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """No file of this process gets longer than this; a write beyond it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 100_000])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    num_bytes: int, tiny_bundles: Bundles, tmp_path: Path
):
    manifest = read_manifest(tiny_bundles("qwen2"))
    store = PrefixStore(tmp_path / "prefixes", manifest, LAYOUT)
    store.save("a", [1] * 400, filled_rows(400))
    write_atomic(tmp_path / "state.json", OLD)
    before = names(tmp_path)

    def save() -> None:
        store.save("a", [2] * 600, filled_rows(600))

    def save_another() -> None:
        store.save("b", [2] * 600, filled_rows(600))

    def write() -> None:
        write_atomic(tmp_path / "state.json", NEW)

    works: list[tuple[Callable[[], None], type[EdgeError]]] = [
        (save, ResourceError), (save_another, ResourceError), (write, ConfigError),
    ]  # fmt: skip
    for work, kind in works:
        with room(num_bytes), pytest.raises(kind, match="cannot write"):
            work()
    assert names(tmp_path) == before
    assert (tmp_path / "state.json").read_bytes() == OLD
    (info,) = PrefixStore(tmp_path / "prefixes", manifest, LAYOUT).list()
    assert (info.num_tokens, info.problem) == (400, None)


@pytest.mark.live
def test_a_disk_that_is_really_full(tiny_bundles: Bundles, tmp_path: Path):
    """A file system of 1 MiB in a mount namespace of its own."""
    script = 'mount --make-rprivate / && mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    unshare = ["unshare", "--mount", "sh", "-c", script, str(tmp_path)]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")
    code = (
        "import sys; from pathlib import Path\n"
        "from edge.bundle.manifest import read_manifest\n"
        "from edge.errors import EdgeError\n"
        "from edge_lab.measure.drift import write_atomic\n"
        "from edge.runtime.prefix_store import PrefixStore\n"
        "from tests.standins.slot_rows import LAYOUT, filled_rows\n"
        "place, bundle = map(Path, sys.argv[1:])\n"
        "store = PrefixStore(place, read_manifest(bundle), LAYOUT)\n"
        "rows = filled_rows(20_000)\n"
        "for work in (lambda: store.save('a', [2] * 20_000, rows),\n"
        "             lambda: write_atomic(place / 'state', b'x' * (2 << 20))):\n"
        "    try:\n"
        "        work()\n"
        "    except EdgeError as error:\n"
        "        print(error)\n"
        "print(sorted(p.name for p in place.rglob('*') if p.is_file()))\n"
    )
    command = [*unshare, sys.executable, "-c", code, str(tmp_path), str(tiny_bundles("qwen2"))]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    prefix, state, left = done.stdout.splitlines()
    assert "No space left on device" in prefix
    assert "No space left on device" in state
    assert left == "[]"
