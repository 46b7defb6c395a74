from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edge.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, Graphs, Manifest, read_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import BundleError, ConfigError, EdgeError, IntegrityError, ResourceError
from edge_make import atomic_swap as bundle_place
from edge_make.atomic_swap import update_manifest
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from export.bundle import BundleWriter
from tests.export.kill_child import NEW_FILES, refuse
from tests.makers.manifests import make_manifest

ROOT = Path(__file__).parents[2]
OLD_FILES = {"decoder.onnx": b"old graph", "decoder.cpu.onnx": b"twin", "tokenizer.json": b"{}"}


def export(target: Path, files: dict[str, bytes], name: str, overwrite: bool = False) -> Manifest:
    with BundleWriter(target, required_bytes=1000, overwrite=overwrite) as writer:
        for file_name, data in files.items():
            writer.write_bytes(file_name, data)
        return writer.commit(make_manifest(name=name))


def export_and(act: Callable[[BundleWriter], object], target: Path) -> None:
    """Begin to replace the target, then do something that should fail."""
    with BundleWriter(target, required_bytes=0, overwrite=True) as writer:
        writer.write_bytes("decoder.onnx", b"graph")
        writer.write_bytes("decoder.cpu.onnx", b"twin")
        act(writer)


def whole(target: Path) -> str:
    """Name of the bundle after checking every byte and that nothing else lies there."""
    manifest = read_manifest(target)
    verify_files(target, manifest)
    expected = OLD_FILES if manifest.name == "old" else NEW_FILES
    assert set(manifest.files) == set(expected)
    for name, data in expected.items():
        assert (target / name).read_bytes() == data
    return manifest.name


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"<directory>"
        for path in root.rglob("*")
    }


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where nothing is yet."""
    return tmp_path / "bundle"


@pytest.fixture
def old(target: Path) -> Path:
    """A bundle with an engine that was built from it."""
    export(target, OLD_FILES, "old")
    (target / "engines" / "sm87").mkdir(parents=True)
    (target / "engines" / "sm87" / "engine.plan").write_bytes(b"plan")
    return target


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(bundle_place, "exchange", refuse)
    return str(request.param)


def can_exchange(directory: Path) -> bool:
    one, other = directory / "one", directory / "other"
    one.mkdir()
    other.mkdir()
    try:
        bundle_place.exchange(one, other)
    except OSError:
        return False
    finally:
        one.rmdir()
        other.rmdir()
    return True


# ---------------------------------------------------------------------------------- writing


def test_writes_a_bundle_that_loads_and_verifies(target: Path) -> None:
    written = export(target, NEW_FILES, "new")
    assert whole(target) == "new"
    assert read_manifest(target) == written
    assert written.files == {name: sha256_file(target / name) for name in NEW_FILES}
    assert names(target.parent) == [target.name]


def test_replaces_a_bundle_and_the_engines_built_from_it(old: Path, swap: str) -> None:
    export(old, NEW_FILES, "new", overwrite=True)
    assert whole(old) == "new"
    assert not (old / "engines").exists()
    assert names(old.parent) == [old.name]


def test_an_empty_directory_is_as_good_as_none(target: Path, swap: str) -> None:
    target.mkdir()
    export(target, NEW_FILES, "new")
    assert whole(target) == "new"


def test_a_symbolic_link_stays_and_its_directory_is_replaced(old: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "current"
    link.symlink_to(old)
    export(link, NEW_FILES, "new", overwrite=True)
    assert link.is_symlink()
    assert whole(link) == whole(old) == "new"
    assert names(link.parent) == ["current"]


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be resolved|not a directory"):
        export(tmp_path / "a", NEW_FILES, "new")
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/x", "a/b", "..", "", ".hidden", MANIFEST_NAME, "engines"]
)
def test_names_stay_inside_the_bundle(target: Path, name: str) -> None:
    with BundleWriter(target, required_bytes=0) as writer:
        with pytest.raises(ValueError, match="no name for a file"):
            writer.path(name)
        with pytest.raises(ValueError, match="no name for a file"):
            writer.write_bytes(name, b"")


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, ResourceError, "the disk filled up while .*/manifest.json was written"),
        (errno.EROFS, ConfigError, "cannot write .*/manifest.json: Read-only file system"),
    ],
)
def test_a_manifest_that_cannot_be_replaced_is_named_and_stays(
    old: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[EdgeError], message: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    before = tree(old.parent)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error, match=message):
        update_manifest(old, msgspec.structs.replace(read_manifest(old), name="new"))
    assert tree(old.parent) == before


def test_a_link_that_a_bundle_came_with_is_not_written_through(old: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("my own")
    (old / f".{MANIFEST_NAME}.tmp").symlink_to(mine)
    update_manifest(old, msgspec.structs.replace(read_manifest(old), name="new"))
    assert mine.read_text() == "my own"
    assert read_manifest(old).name == "new"
    assert not (old / MANIFEST_NAME).is_symlink()


def test_files_reach_the_disk_before_the_swap(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A power cut loses what was not fsynced: every file and the directory, before the swap.
    synced: set[int] = set()
    at_swap: set[int] = set()
    fsync, swap = os.fsync, bundle_place.put_in_place

    def record(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def record_swap(staging: Path, target: Path) -> None:
        at_swap.update(synced)
        synced.clear()
        swap(staging, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr("export.bundle.put_in_place", record_swap)
    export(old, NEW_FILES, "new", overwrite=True)
    assert at_swap == {path.stat().st_ino for path in [old, *old.iterdir()]}
    assert synced == {old.parent.stat().st_ino}


@pytest.mark.parametrize(
    ("refused", "code", "message"),
    [
        (stat.S_ISDIR, errno.EINVAL, None),
        (stat.S_ISDIR, errno.EIO, "Input/output error"),
        (stat.S_ISREG, errno.EINVAL, "Invalid argument"),
    ],
)
def test_only_a_directory_that_has_no_fsync_may_go_without(
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[int], bool],
    code: int,
    message: str | None,
) -> None:
    fsync = os.fsync

    def refuse_some(descriptor: int) -> None:
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_some)
    if message is None:
        export(target, NEW_FILES, "new")
        assert whole(target) == "new"
    else:
        with pytest.raises(OSError, match=message):
            export(target, NEW_FILES, "new")
        assert names(target.parent) == []


# ---------------------------------------------------------------------------------- refusing


def test_a_bundle_is_not_replaced_without_force(old: Path) -> None:
    before = tree(old.parent)
    with pytest.raises(ConfigError, match="--force"):
        export(old, NEW_FILES, "new")
    assert tree(old.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": b"three years of work"},
        {"manifest.json": b'{"name": "a browser extension", "version": "1"}'},
        {"manifest.json": b"[" * 100_000},
        {"engines": b"a file"},
        {**OLD_FILES, "manifest.json": b"gone"},
    ],
    ids=["files", "other manifest", "nested", "engines", "unreadable manifest"],
)
def test_a_foreign_directory_is_never_touched(
    target: Path, files: dict[str, bytes], overwrite: bool
) -> None:
    target.mkdir()
    for name, data in files.items():
        (target / name).write_bytes(data)
    before = tree(target.parent)
    with pytest.raises(ConfigError, match="not part of a bundle"):
        export(target, NEW_FILES, "new", overwrite)
    assert tree(target.parent) == before


def test_a_bundle_with_the_users_own_files_is_not_replaced(old: Path) -> None:
    (old / "notes.md").write_bytes(b"mine")
    before = tree(old.parent)
    with pytest.raises(ConfigError, match=r"notes\.md"):
        export(old, NEW_FILES, "new", overwrite=True)
    assert tree(old.parent) == before


def test_a_damaged_or_newer_bundle_can_be_replaced(old: Path) -> None:
    text = (
        (old / MANIFEST_NAME)
        .read_text()
        .replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99')
    )
    (old / MANIFEST_NAME).write_text(text)
    (old / "tokenizer.json").unlink()
    with pytest.raises(BundleError):
        read_manifest(old)
    export(old, NEW_FILES, "new", overwrite=True)
    assert whole(old) == "new"


def test_a_file_that_arrives_during_the_export_is_not_lost(target: Path) -> None:
    def arrive_and_commit(writer: BundleWriter) -> None:
        target.mkdir()
        (target / "thesis.txt").write_bytes(b"mine")
        writer.commit(make_manifest())

    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        export_and(arrive_and_commit, target)
    assert tree(target.parent) == {"bundle": b"<directory>", "bundle/thesis.txt": b"mine"}


def test_a_file_is_refused(target: Path) -> None:
    target.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="not a directory"):
        export(target, NEW_FILES, "new", overwrite=True)
    assert target.read_bytes() == b"mine"


def test_a_mount_point_is_refused_before_any_work(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    with pytest.raises(ConfigError, match=f"mount point.*{target / 'bundle'}"):
        export(target, NEW_FILES, "new")


def test_the_root_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="root directory"):
        BundleWriter(Path("/"), required_bytes=0)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    export(tmp_path / "a" / "b" / "bundle", NEW_FILES, "new")
    assert names(tmp_path / "a" / "b") == ["bundle"]


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="choose another directory"):
        export(tmp_path / "file" / "bundle", NEW_FILES, "new")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_read_only_parent_is_refused(tmp_path: Path) -> None:
    parent = Path("/sys") if os.geteuid() == 0 else tmp_path  # root may write anywhere but there
    if not parent.is_dir():
        pytest.skip("needs /sys to test this as root")
    mode = parent.stat().st_mode
    if parent == tmp_path:
        parent.chmod(0o555)
    try:
        with pytest.raises(ConfigError, match=f"cannot write in {parent}"):
            export(parent / "bundle", NEW_FILES, "new")
    finally:
        if parent == tmp_path:
            parent.chmod(mode)


def test_a_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long"):
        export(tmp_path / ("x" * 250), NEW_FILES, "new")


def test_a_full_disk_is_refused_with_both_numbers(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1_234_000_000))
    before = tree(old.parent)
    with (
        pytest.raises(ResourceError, match=r"has 1\.23 GB free.* takes 1\.20 GB"),
        BundleWriter(old, required_bytes=1_200_000_000, overwrite=True),
    ):
        pass
    assert tree(old.parent) == before
    with BundleWriter(old, required_bytes=1_100_000_000, overwrite=True):
        pass


def test_a_disk_that_fills_up_is_a_resource_error(old: Path) -> None:
    before = tree(old.parent)

    def fill_up(writer: BundleWriter) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ResourceError, match="disk filled up"):
        export_and(fill_up, old)
    assert tree(old.parent) == before


# ---------------------------------------------------------------------------------- leaving early


@pytest.mark.parametrize("error", [OSError(5, "I/O"), EdgeError("wrong"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_bundle(old: Path, error: BaseException) -> None:
    before = tree(old.parent)

    def fail(writer: BundleWriter) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        export_and(fail, old)
    assert caught.value is error
    assert tree(old.parent) == before


def test_no_commit_leaves_no_trace(target: Path) -> None:
    with BundleWriter(target, required_bytes=0) as writer:
        writer.write_bytes("decoder.onnx", b"graph")
    assert names(target.parent) == []


def test_an_error_in_the_middle_of_the_swap_restores_the_old_bundle(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(old.parent)
    monkeypatch.setattr(bundle_place, "exchange", refuse)
    rename = Path.rename

    def fail_once_aside(source: Path, destination: Path) -> Path:
        if destination == old and source.name.endswith("staging") and not old.exists():
            raise KeyboardInterrupt
        return rename(source, destination)

    monkeypatch.setattr(Path, "rename", fail_once_aside)
    with pytest.raises(KeyboardInterrupt):
        export(old, NEW_FILES, "new", overwrite=True)
    assert tree(old.parent) == before


def test_an_exchange_that_fails_for_real_is_not_papered_over(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(one: Path, other: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    before = tree(old.parent)
    monkeypatch.setattr(bundle_place, "exchange", busy)
    with pytest.raises(OSError, match="busy"):
        export(old, NEW_FILES, "new", overwrite=True)
    assert tree(old.parent) == before


def test_an_incomplete_bundle_is_not_committed(old: Path) -> None:
    manifest = make_manifest(graphs=Graphs(cpu="twin.onnx"))
    with pytest.raises(BundleError, match=r"incomplete: \['twin\.onnx'\]"):
        export_and(lambda writer: writer.commit(manifest), old)
    assert whole(old) == "old"


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_only_plain_files_are_committed(target: Path, kind: str) -> None:
    def write_and_commit(writer: BundleWriter) -> None:
        strange = writer.path("strange")
        if kind == "link":
            strange.symlink_to(__file__)
        elif kind == "directory":
            strange.mkdir()
        else:
            os.mkfifo(strange)
        writer.commit(make_manifest())

    with pytest.raises(BundleError, match="strange is not a plain file"):
        export_and(write_and_commit, target)
    assert names(target.parent) == []


def test_a_manifest_that_would_not_load_is_not_committed(old: Path) -> None:
    broken = make_manifest(kv_capacity="many")
    with pytest.raises(BundleError, match="kv_capacity"):
        export_and(lambda writer: writer.commit(broken), old)
    assert whole(old) == "old"


def test_nothing_is_written_after_the_commit(old: Path, swap: str) -> None:
    with BundleWriter(old, required_bytes=0, overwrite=True) as writer:
        for name, data in NEW_FILES.items():
            writer.write_bytes(name, data)
        writer.commit(make_manifest(name="new"))
        with pytest.raises(RuntimeError, match="already in place"):
            writer.path("late.bin")
        with pytest.raises(RuntimeError, match="already in place"):
            writer.commit(make_manifest(name="newer"))
    assert whole(old) == "new"


# ---------------------------------------------------------------------------------- two writers


def test_a_second_writer_is_refused_and_disturbs_nothing(target: Path) -> None:
    with BundleWriter(target, required_bytes=0) as first:
        with pytest.raises(ConfigError, match=rf"process {os.getpid()}\) is writing {target}"):
            export(target, OLD_FILES, "old")
        for name, data in NEW_FILES.items():
            first.write_bytes(name, data)
        first.commit(make_manifest(name="new"))
    assert whole(target) == "new"


def test_a_lock_file_that_its_last_holder_unlinked_is_no_lock(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def lose_the_race(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        target.with_name(".bundle.edge-llm-lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lose_the_race)
    with BundleWriter(target, required_bytes=0), pytest.raises(ConfigError, match="another export"):
        export(target, NEW_FILES, "new")


def test_other_targets_in_the_same_directory_are_free(target: Path) -> None:
    with BundleWriter(target, required_bytes=0) as first:
        export(target.with_name("bundle2"), OLD_FILES, "old")
        first.write_bytes("decoder.onnx", b"graph")
        first.write_bytes("decoder.cpu.onnx", b"twin")
        first.commit(make_manifest())
    assert names(target.parent) == ["bundle", "bundle2"]


@pytest.fixture
def other_process(target: Path) -> Iterator[subprocess.Popen[str]]:
    """A live process in the middle of an export to the target."""
    code = (
        "import sys, time, pathlib\n"
        "from export.bundle import BundleWriter\n"
        "with BundleWriter(pathlib.Path(sys.argv[1]), required_bytes=0) as writer:\n"
        "    writer.write_bytes('decoder.onnx', b'half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
        child.kill()


def test_a_living_process_is_never_swept_and_a_killed_one_is(
    target: Path, other_process: subprocess.Popen[str]
) -> None:
    before = tree(target.parent)
    with pytest.raises(ConfigError, match=f"process {other_process.pid}"):
        export(target, NEW_FILES, "new")
    assert tree(target.parent) == before
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert tree(target.parent) == before
    export(target, NEW_FILES, "new")
    assert whole(target) == "new"
    assert names(target.parent) == [target.name]


def test_a_reader_never_finds_the_target_missing_or_torn(old: Path, tmp_path: Path) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange directories")
    stop = threading.Event()
    faults: list[Exception] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            try:
                read_manifest(old)
            except BundleError as error:
                faults.append(error)
            reads += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(20):
            export(old, NEW_FILES, "new", overwrite=True)
    finally:
        stop.set()
        reader.join()
    assert reads > 20
    assert faults == []


# ---------------------------------------------------------------------------------- kill -9


def kill_everywhere(root: Path, scenario: str) -> list[Path]:
    """Places where an export was killed, one for each of its operations; the last one survived."""
    command = [sys.executable, "-m", "tests.export.kill_child", str(root), scenario]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    places = [path for path in root.iterdir() if path.name != "start"]
    return sorted(places, key=lambda path: int(path.name))


@pytest.mark.slow
def test_kill_with_nothing_there_before(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    places = kill_everywhere(tmp_path, "exchange")
    found = []
    for place in places:
        target = place / "bundle"
        found.append(whole(target) if target.exists() else None)
        export(target, NEW_FILES, "new", overwrite=True)
        assert whole(target) == "new"
        assert names(place) == ["bundle"]
    assert len(found) >= 25
    assert found == sorted(found, key=lambda name: name is not None)  # first nothing, then the new
    assert {None, "new"} == set(found)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["exchange", "fallback"])
def test_kill_while_replacing(tmp_path: Path, scenario: str) -> None:
    if scenario == "exchange" and not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange directories")
    start = tmp_path / "start"
    start.mkdir()
    export(start / "bundle", OLD_FILES, "old")
    places = kill_everywhere(tmp_path, scenario)
    found = []
    for place in places:
        target = place / "bundle"
        found.append(whole(target) if target.exists() else "missing")
        aside = place / ".bundle.edge-llm-old"
        assert not aside.exists() or whole(aside) == "old"
        # The next run repairs and sweeps before anything else, even if it then gives up.
        with BundleWriter(target, required_bytes=0, overwrite=True):
            assert whole(target) == ("old" if found[-1] == "missing" else found[-1])
        assert names(place) == ["bundle"]
    assert len(found) >= 25
    order = ["old", "missing", "new"]
    assert found == sorted(found, key=order.index)
    assert found.count("missing") == (1 if scenario == "fallback" else 0)
    assert {"old", "new"} <= set(found)


@pytest.mark.slow
def test_kill_while_recovering(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    export(start / ".bundle.edge-llm-old", OLD_FILES, "old")
    shutil.copytree(start / ".bundle.edge-llm-old", start / ".bundle.edge-llm-staging")
    for place in kill_everywhere(tmp_path, "fallback"):
        target = place / "bundle"
        with BundleWriter(target, required_bytes=0, overwrite=True):
            assert whole(target) in ("old", "new")
        assert names(place) == ["bundle"]


def test_kill_while_updating_the_manifest(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    export(start / "bundle", OLD_FILES, "old")
    found = []
    for place in kill_everywhere(tmp_path, "update"):
        manifest = read_manifest(place / "bundle")
        verify_files(place / "bundle", manifest)
        found.append(manifest.name)
        with BundleWriter(place / "bundle", required_bytes=0, overwrite=True):
            pass  # what the killed update left is no stranger to an export
        update_manifest(place / "bundle", manifest)
        assert names(place) == ["bundle"]
        assert names(place / "bundle") == sorted([*OLD_FILES, MANIFEST_NAME])
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}


# ---------------------------------------------------------------------------------- update


def test_update_changes_the_manifest_only(old: Path) -> None:
    before = tree(old)
    manifest = msgspec.structs.replace(read_manifest(old), quality={"kl": 0.01})
    written = update_manifest(old, manifest)
    assert read_manifest(old) == written
    assert written.quality == {"kl": 0.01}
    after = tree(old)
    assert after.pop(MANIFEST_NAME) != before.pop(MANIFEST_NAME)
    assert after == before
    assert names(old.parent) == [old.name]


def test_update_refuses_the_manifest_of_other_files(old: Path) -> None:
    before = tree(old)
    with pytest.raises(BundleError, match="other files"):
        update_manifest(old, make_manifest())
    assert tree(old) == before


def test_update_refuses_what_would_not_load(old: Path) -> None:
    before = tree(old)
    manifest = msgspec.structs.replace(read_manifest(old), dtype="fp4")
    with pytest.raises(BundleError, match="fp4"):
        update_manifest(old, manifest)
    assert tree(old) == before


def test_update_waits_for_no_export(old: Path) -> None:
    manifest = read_manifest(old)
    with (
        BundleWriter(old, required_bytes=0, overwrite=True),
        pytest.raises(ConfigError, match="another export"),
    ):
        update_manifest(old, manifest)


def test_update_needs_a_sound_bundle(target: Path) -> None:
    target.mkdir()
    with pytest.raises(BundleError, match="no bundle"):
        update_manifest(target, make_manifest())
    damaged = encode_manifest(make_manifest()).replace(b"tiny", b"TINY")
    (target / MANIFEST_NAME).write_bytes(damaged)
    with pytest.raises(IntegrityError):
        update_manifest(target, make_manifest())
    assert (target / MANIFEST_NAME).read_bytes() == damaged
