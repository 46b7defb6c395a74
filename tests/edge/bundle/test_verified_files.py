from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import verified_files as module
from edge.bundle.manifest import MANIFEST_NAME, read_manifest
from edge.bundle.verified_files import VerifiedFiles, verify_files
from edge.errors import BundleError, IntegrityError
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from tests.makers.manifests import make_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tmp_path = tmp_path / "bundle"
    tmp_path.mkdir()
    contents = {"decoder.onnx": b"graph", "tokenizer.json": b"{}", "empty": b""}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    files = {name: sha256_file(tmp_path / name) for name in contents}
    (tmp_path / MANIFEST_NAME).write_bytes(encode_manifest(make_manifest(files=files)))
    return tmp_path


def test_a_whole_bundle_verifies(bundle: Path) -> None:
    verify_files(bundle, read_manifest(bundle))


@pytest.mark.parametrize("data", [b"grapH", b"grap", b"graphs", b""])
def test_the_damaged_file_is_named(bundle: Path, data: bytes) -> None:
    (bundle / "decoder.onnx").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"decoder\.onnx"):
        verify_files(bundle, read_manifest(bundle))
    verify_files(bundle, read_manifest(bundle), ["tokenizer.json", "empty"])


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match=r"tokenizer\.json cannot be read \(No such file"):
        verify_files(bundle, read_manifest(bundle))


def test_a_directory_in_a_files_place_is_named(bundle: Path) -> None:
    (bundle / "empty").unlink()
    (bundle / "empty").mkdir()
    with pytest.raises(IntegrityError, match="empty"):
        verify_files(bundle, read_manifest(bundle))


def test_a_file_that_the_manifest_does_not_list_is_refused(bundle: Path) -> None:
    (bundle / "decoder.cpu.onnx").write_bytes(b"unknown")
    with pytest.raises(IntegrityError, match=r"decoder\.cpu\.onnx is not listed"):
        verify_files(bundle, read_manifest(bundle), ["decoder.cpu.onnx"])


def test_a_pipe_in_a_files_place_is_not_waited_for(bundle: Path) -> None:
    (bundle / "empty").unlink()
    os.mkfifo(bundle / "empty")
    with pytest.raises(IntegrityError, match="empty is no plain file"):
        verify_files(bundle, read_manifest(bundle))
    (bundle / MANIFEST_NAME).unlink()
    os.mkfifo(bundle / MANIFEST_NAME)
    with pytest.raises(BundleError, match="it is no plain file"):
        read_manifest(bundle)


def test_reads_come_from_the_file_that_was_hashed(bundle: Path) -> None:
    path = bundle / "decoder.onnx"
    with VerifiedFiles(bundle, read_manifest(bundle)) as files:
        path.rename(bundle / "aside")
        path.write_bytes(b"evil!")
        assert files.read("decoder.onnx") == b"graph"
        assert os.pread(files.descriptor("decoder.onnx"), 10, 0) == b"graph"
        (bundle / "aside").write_bytes(b"evil!")  # the same file, not another at its path
        with pytest.raises(IntegrityError, match=r"decoder\.onnx is damaged"):
            files.read("decoder.onnx")


def swapped(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.write_bytes(b"evil!")


def swapped_and_put_back(path: Path) -> None:
    swapped(path)
    path.with_name("aside").rename(path)


def written_to_with_its_time_put_back(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"evil!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swapped_for_one_of_the_same_times(path: Path) -> None:
    before = path.stat()
    swapped(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "meddle",
    [
        swapped,
        swapped_and_put_back,
        swapped_for_one_of_the_same_times,
        written_to_with_its_time_put_back,
        Path.unlink,
    ],
)
def test_a_change_is_found_after_opening_by_path(bundle: Path, meddle: Any) -> None:
    with VerifiedFiles(bundle, read_manifest(bundle)) as files:
        files.check_unchanged()
        time.sleep(0.02)  # the kernel's clock for files ticks every 4 ms
        meddle(bundle / "decoder.onnx")
        with pytest.raises(IntegrityError, match=r"decoder\.onnx"):
            files.check_unchanged()


def linked_by_a_backup(path: Path) -> None:
    (path.parent.parent / "backup").hardlink_to(path)


def linked_and_unlinked(path: Path) -> None:
    linked_by_a_backup(path)
    (path.parent.parent / "backup").unlink()


def closed_to_others(path: Path) -> None:
    path.chmod(0o600)


@pytest.mark.parametrize("touch", [linked_by_a_backup, linked_and_unlinked, closed_to_others])
def test_changes_that_keep_the_bytes_do_not_stop_the_start(bundle: Path, touch: Any) -> None:
    with VerifiedFiles(bundle, read_manifest(bundle)) as files:
        before = (bundle / "decoder.onnx").stat().st_ctime_ns
        time.sleep(0.02)
        touch(bundle / "decoder.onnx")
        assert (bundle / "decoder.onnx").stat().st_ctime_ns != before
        files.check_unchanged()


def test_hashes_of_numbers_are_waited_for_later(bundle: Path) -> None:
    (bundle / "decoder.onnx").write_bytes(b"evil!")
    with VerifiedFiles(bundle, read_manifest(bundle), later=["decoder.onnx"]) as files:
        files.descriptor("tokenizer.json")
        for ask in (files.finish, files.check_unchanged, lambda: files.descriptor("decoder.onnx")):
            with pytest.raises(IntegrityError, match=r"decoder\.onnx is damaged"):
                ask()
    with pytest.raises(IntegrityError, match=r"decoder\.onnx is damaged"):
        VerifiedFiles(bundle, read_manifest(bundle), later=["tokenizer.json"])


def test_hashes_let_the_engine_go_first(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def read_chunks(descriptor: int) -> Iterator[bytes]:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        yield os.read(descriptor, 1 << 20)

    monkeypatch.setattr(module, "read_chunks", read_chunks)
    verify_files(bundle, read_manifest(bundle))
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert found
    assert all(each > ours or each == 19 for each in found)


def test_closing_early_waits_for_no_hash(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, ended = threading.Event(), threading.Event()

    def large(_: int) -> Iterator[bytes]:
        for _ in range(10**7):
            yield b"graph"
            read.set()
        ended.set()

    monkeypatch.setattr(module, "read_chunks", large)
    with VerifiedFiles(bundle, read_manifest(bundle), ["decoder.onnx"], later=["decoder.onnx"]):
        assert read.wait(60)
    assert not ended.is_set()


def test_a_file_that_cannot_be_read_to_its_end_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> Iterator[bytes]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "read_chunks", broken)
    with pytest.raises(IntegrityError, match=r"decoder\.onnx cannot be read \(Input/output error"):
        verify_files(bundle, read_manifest(bundle))


def test_no_descriptor_is_left_open(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with VerifiedFiles(bundle, manifest):
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 3
    (bundle / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(IntegrityError):
        VerifiedFiles(bundle, manifest)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
