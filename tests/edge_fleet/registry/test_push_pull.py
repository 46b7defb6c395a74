"""Bundles to and from a real registry: what is sent, what is refused, what an end leaves."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from edge.bundle.manifest import read_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import (
    BundleError,
    ConfigError,
    EdgeError,
    IntegrityError,
    RegistryError,
    ResourceError,
)
from edge_fleet.registry import artifact as artifacts
from edge_fleet.registry import client as clients
from edge_fleet.registry.client import MANIFEST_TYPE, NUM_CONNECTIONS, Registry, digest_of
from edge_fleet.registry.pull import Pulled, look, origin_digest, pull
from edge_fleet.registry.push import push
from edge_fleet.registry.reference import Reference, parse_reference
from edge_fleet.signing import sign_bundle
from tests.makers.keys import Key, make_key

from .live import FILES, SMALL, LiveRegistry, write_bundle

pytestmark = pytest.mark.live


@pytest.fixture
def key() -> Key:
    return make_key()


def keys_file(folder: Path, *keys: Key) -> Path:
    path = folder / "trusted-keys"
    path.write_text("".join(key.public_text for key in keys))
    return path


def get(reference: Reference, target: Path, **options: object) -> Pulled:
    with Registry(reference) as registry:
        return pull(look(reference, registry), registry, target, **options)  # type: ignore[arg-type]


def content(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name[0] != "."}


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path.name.startswith(".")]


def test_a_bundle_comes_back_byte_for_byte_and_its_engines_stay(
    source: Path, reference: Reference, registry: Registry, tmp_path: Path
):
    mine = shutil.copytree(source, tmp_path / "mine" / "tiny")
    (mine / "engines" / "sm87").mkdir(parents=True)
    (mine / "engines" / "sm87" / "engine.plan").write_bytes(b"of this device")
    pushed = push(mine, reference, registry)
    assert pushed.sent_bytes == pushed.num_bytes + len(artifacts.EMPTY)
    done = get(reference, tmp_path / "got" / "tiny")
    assert content(done.bundle) == content(source)
    assert done.digest == pushed.digest == origin_digest(done.bundle)
    assert done.fetched_bytes == sum(map(len, FILES.values()))
    assert leftovers(done.bundle) == []


def test_the_same_bundle_has_the_same_digest_and_is_sent_once(
    source: Path, reference: Reference, registry: Registry
):
    first = push(source, reference, registry)
    again = push(source, Reference(reference.registry, reference.repository, "other"), registry)
    assert again.digest == first.digest
    assert again.sent_bytes == 0


def test_an_upload_that_breaks_off_is_begun_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    """A real registry takes nothing more where half a blob came to."""
    data, pieces, breaks = os.urandom(2 << 20), clients._pieces, [1]

    def broken(body: bytes) -> Iterator[bytes]:
        for number, piece in enumerate(pieces(body)):
            if number == 16 and breaks and breaks.pop():
                time.sleep(0.3)  # the first half has arrived
                raise ConnectionResetError
            yield piece

    monkeypatch.setattr(clients, "_pieces", broken)
    monkeypatch.setattr(clients, "_FIRST_PAUSE_S", 0.3)
    registry.put_blob(data, digest_of(data))
    assert registry.blob(digest_of(data), len(data)) == data
    assert not breaks


def test_another_template_is_sent_and_fetched_as_kilobytes(
    source: Path, reference: Reference, registry: Registry, tmp_path: Path
):
    push(source, reference, registry)
    old = get(reference, tmp_path / "tiny").bundle
    retuned = write_bundle(tmp_path / "new" / "tiny", FILES | {"chat_template.jinja": b"new"})
    assert push(retuned, reference, registry).sent_bytes < 10_000
    done = get(reference, old, overwrite=True)
    assert done.fetched_bytes == len(b"new")
    assert content(done.bundle) == content(retuned)
    (tmp_path / "staging").mkdir()
    done = get(reference, tmp_path / "staging" / "tiny", near=tmp_path)
    assert done.fetched_bytes == 0
    assert content(done.bundle) == content(retuned)


def test_a_tensor_that_grows_costs_the_chunks_around_it(
    source: Path, reference: Reference, registry: Registry, tmp_path: Path
):
    push(source, reference, registry)
    old = get(reference, tmp_path / "tiny").bundle
    weights = FILES["decoder.onnx.data"]
    grown = weights[: 5 << 20] + b"another layer" + weights[5 << 20 :]  # all after it moves
    changed = write_bundle(tmp_path / "new" / "tiny", FILES | {"decoder.onnx.data": grown})
    assert push(changed, reference, registry).sent_bytes < len(grown) / 2
    done = get(reference, old, overwrite=True)
    assert 0 < done.fetched_bytes < len(grown) / 2
    assert content(done.bundle) == content(changed)


def test_any_other_client_gets_files_and_parts_that_join(
    source: Path, reference: Reference, registry: Registry
):
    push(source, reference, registry)
    data, digest = registry.manifest("v1")
    artifact, contents = artifacts.decode(data, "here")
    assert digest_of(data) == digest
    assert artifact.annotations[artifacts.TITLE] == "tiny"
    titles = [layer.annotations[artifacts.TITLE] for layer in artifact.layers]
    assert len(set(titles)) == len(titles)
    parts = sorted(title for title in titles if title.startswith("decoder.onnx.data.part-"))
    assert len(parts) == len(contents.pieces["decoder.onnx.data"]) > 2
    joined = b"".join(
        registry.blob(layer.digest, layer.size)
        for part in parts
        for layer in artifact.layers
        if layer.annotations[artifacts.TITLE] == part
    )
    assert joined == FILES["decoder.onnx.data"]


# ------------------------------------------------------------------------------- bad input


def test_a_tampered_layer_is_refused_and_the_old_bundle_stays(
    live: LiveRegistry, reference: Reference, registry: Registry, tmp_path: Path
):
    changed = write_bundle(tmp_path / "new" / "tiny", SMALL | {"decoder.onnx": b"other graph"})
    push(write_bundle(tmp_path / "old" / "tiny", SMALL), reference, registry)
    target = get(reference, tmp_path / "tiny").bundle
    before = content(target)
    push(changed, reference, registry)
    blob = live.blob(digest_of(b"other graph"))
    blob.write_bytes(b"evil! graph")
    with pytest.raises(IntegrityError, match="somebody changes what it sends"):
        get(reference, target, overwrite=True)
    assert content(target) == before
    blob.write_bytes(b"other graph")
    assert content(get(reference, target, overwrite=True).bundle) == content(changed)


def test_a_layer_that_is_cut_or_endless_is_refused(
    live: LiveRegistry, reference: Reference, registry: Registry, tmp_path: Path
):
    files = SMALL | {"decoder.onnx": b"graph of this test"}
    push(write_bundle(tmp_path / "b" / "tiny", files), reference, registry)
    blob = live.blob(digest_of(b"graph of this test"))
    for content_, message in ((b"graph", "5 bytes"), (b"graph" * 99, "longer than the 18 bytes")):
        blob.write_bytes(content_)
        with pytest.raises(IntegrityError, match=message):
            get(reference, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_another_manifest_than_the_digest_says_is_refused(
    live: LiveRegistry, reference: Reference, registry: Registry, tmp_path: Path
):
    mine = write_bundle(tmp_path / "b" / "tiny", SMALL, name="of-this-test")
    digest = push(mine, reference, registry).digest
    exact = Reference(reference.registry, reference.repository, None, digest)
    blob = live.blob(digest)
    blob.write_bytes(blob.read_bytes().replace(b"of-this-test", b"of-that-test"))
    with pytest.raises((IntegrityError, ConfigError, RegistryError)):
        get(exact, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_contents_that_are_not_those_of_the_bundle_are_refused(
    source: Path, reference: Reference, registry: Registry, tmp_path: Path
):
    artifact, _ = artifacts.describe(source)
    push(source, reference, registry)
    for keep, message in (
        (lambda layer: layer.annotations[artifacts.TITLE] != "decoder.onnx", "decoder.onnx is mis"),
        (lambda layer: "part-00002" not in layer.annotations[artifacts.TITLE], "do not join"),
        (lambda layer: layer.media_type != artifacts.MANIFEST_LAYER, "has 0 manifests"),
    ):
        layers = tuple(filter(keep, artifact.layers))
        changed = artifacts.Artifact(
            2, artifact.media_type, artifact.artifact_type, artifact.config, layers
        )
        registry.put_manifest(artifacts.encode(changed), "v1")
        with pytest.raises(IntegrityError, match=message):
            get(reference, tmp_path / "tiny")


def test_a_file_that_is_not_the_one_of_the_signed_manifest_is_refused(
    reference: Reference, registry: Registry, tmp_path: Path, key: Key
):
    """The registry's list of pieces is signed by nobody: it may name another file of that size."""
    mine = write_bundle(tmp_path / "b" / "tiny", SMALL | {"decoder.onnx": b"my own graph"})
    sign_bundle(mine, key, "ours")
    artifact, _ = artifacts.describe(mine)
    other = write_bundle(tmp_path / "o" / "tiny", SMALL | {"decoder.onnx": b"evil! graphs"})
    push(other, reference, registry)
    push(mine, reference, registry)
    layers = tuple(
        msgspec.structs.replace(layer, digest=digest_of(b"evil! graphs"))
        if layer.annotations[artifacts.TITLE] == "decoder.onnx"
        else layer
        for layer in artifact.layers
    )
    assert layers != artifact.layers
    changed = msgspec.structs.replace(artifact, layers=layers)
    registry.put_manifest(artifacts.encode(changed), "v1")
    offer = look(reference, registry, keys_file(tmp_path, key))
    with pytest.raises(IntegrityError, match=r"decoder\.onnx"):
        pull(offer, registry, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_unsigned_foreign_and_revoked_are_refused_before_anything_is_fetched(
    reference: Reference, registry: Registry, tmp_path: Path, key: Key
):
    mine = write_bundle(tmp_path / "b" / "tiny", SMALL)
    ours = keys_file(tmp_path, key)
    push(mine, reference, registry)
    with pytest.raises(BundleError, match="is not signed, and"):
        look(reference, registry, ours)
    sign_bundle(mine, make_key(), "foreign")
    push(mine, reference, registry)
    with pytest.raises(IntegrityError, match="none of the trusted ones"):
        look(reference, registry, ours)
    sign_bundle(mine, key, "ours")
    assert push(mine, reference, registry).sent_bytes < 5_000
    assert look(reference, registry, ours).signer == key.public_key.name
    newer = make_key()
    keys_file(tmp_path, key, newer)
    assert look(reference, registry, ours).signer == key.public_key.name
    keys_file(tmp_path, newer)  # revoked
    with pytest.raises(IntegrityError, match="none of the trusted ones"):
        look(reference, registry, ours)
    assert not (tmp_path / "tiny").exists()


def test_a_bundle_that_was_signed_again_is_fetched_as_its_signature(
    reference: Reference, registry: Registry, tmp_path: Path, key: Key
):
    mine = write_bundle(tmp_path / "b" / "tiny", SMALL)
    push(mine, reference, registry)
    got = get(reference, tmp_path / "tiny").bundle
    (got / "engines").mkdir()
    sign_bundle(mine, key, "ours")
    push(mine, reference, registry)
    done = get(reference, got)
    assert done.fetched_bytes == 0
    assert (got / "engines").is_dir()
    assert origin_digest(got) == done.digest
    assert (got / "manifest.json.minisig").read_bytes() == content(mine)["manifest.json.minisig"]


def test_another_bundle_is_replaced_only_if_asked(
    reference: Reference, registry: Registry, tmp_path: Path
):
    push(write_bundle(tmp_path / "b" / "tiny", SMALL), reference, registry)
    other = write_bundle(tmp_path / "tiny", SMALL | {"decoder.onnx": b"x"})
    with pytest.raises(ConfigError, match="already holds a bundle"):
        get(reference, other)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not part of a bundle"):
        get(reference, tmp_path / "home", overwrite=True)


def test_a_missing_reference_is_named(reference: Reference, registry: Registry, tmp_path: Path):
    with pytest.raises(ConfigError, match="has no v1"):
        get(reference, tmp_path / "tiny")
    registry.put_blob(artifacts.EMPTY, digest_of(artifacts.EMPTY))
    config = artifacts.Layer(artifacts.EMPTY_TYPE, digest_of(artifacts.EMPTY), 2)
    image = artifacts.Artifact(2, MANIFEST_TYPE, artifacts.ARTIFACT_TYPE, config, ())
    data = artifacts.encode(image).replace(b"vnd.edge-llm.bundle.v1", b"vnd.somebody.else.v1")
    registry.put_manifest(data, "v1")
    with pytest.raises(BundleError, match="is no bundle that edge-llm bundle push has sent"):
        get(reference, tmp_path / "tiny")


# ------------------------------------------------------------------------------- ends


def test_a_registry_that_dies_in_the_middle_costs_only_what_had_not_come(
    live: LiveRegistry,
    source: Path,
    reference: Reference,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick: Callable[[], list[float]],
):
    push(source, reference, registry)
    offer = look(reference, registry)
    real = Registry.blob
    seen: list[int] = []

    def die_after_two(self: Registry, digest: str, num_bytes: int) -> bytes:
        if len(seen) == 2:
            live.kill()
        data = real(self, digest, num_bytes)
        seen.append(num_bytes)
        return data

    monkeypatch.setattr("edge_fleet.registry.pull.NUM_CONNECTIONS", 1)
    monkeypatch.setattr(Registry, "blob", die_after_two)
    target = tmp_path / "tiny"
    try:
        with pytest.raises(RegistryError, match="run the same again") as caught:
            pull(offer, registry, target)
    finally:
        live.start()
    assert caught.value.exit_code == 75
    assert not target.exists()
    monkeypatch.setattr(Registry, "blob", real)
    done = pull(look(reference, registry), registry, target)
    assert done.fetched_bytes == sum(map(len, FILES.values())) - sum(seen)
    assert content(target) == content(source)
    assert leftovers(target) == []


def test_an_interrupted_pull_ends_at_once(
    live: LiveRegistry,
    source: Path,
    reference: Reference,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    push(source, reference, registry)
    offer = look(reference, registry)
    pauses: list[float] = []
    numbers = itertools.count(1)  # threads that append at once may all see a later length
    real, started = time.sleep, time.monotonic()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if next(numbers) == NUM_CONNECTIONS:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        while registry.patient and time.monotonic() < started + 60:
            real(0.01)

    live.kill()
    # What a shell starts with & ignores interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr("edge_fleet.registry.client.time.sleep", pause)
        try:
            with pytest.raises(KeyboardInterrupt):
                pull(offer, registry, tmp_path / "tiny")
        finally:
            patch.undo()
            signal.signal(signal.SIGINT, before)
            live.start()
    assert 0 < len(pauses) <= 3 * NUM_CONNECTIONS


def test_a_pull_that_is_killed_at_any_piece_goes_on(
    source: Path, reference: Reference, registry: Registry, tmp_path: Path
):
    push(source, reference, registry)
    target = tmp_path / "tiny"
    # One process forks the others, and has no threads of its own that a fork would lose.
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from edge_fleet.registry import pull as module\n"
        "from edge_fleet.registry.client import Registry\n"
        "from edge_fleet.registry.reference import parse_reference\n"
        "reference, target = parse_reference(sys.argv[1]), Path(sys.argv[2])\n"
        "def child(name, at):\n"
        "    real, seen = getattr(module, name), []\n"
        "    def die(*args, **options):\n"
        "        if len(seen) == at: os.kill(os.getpid(), 9)\n"
        "        seen.append(1)\n"
        "        return real(*args, **options)\n"
        "    setattr(module, name, die)\n"
        "    registry = Registry(reference)\n"
        "    module.pull(module.look(reference, registry), registry, target)\n"
        "points = [('_bring', 3), ('_finish', 0), ('_write_about', 0), ('put_in_place', 0)]\n"
        "for name, at in [*points, ('sweep', 0)]:\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        child(name, at)\n"
        "        os._exit(1)\n"
        "    print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), target.exists())\n"
    )
    arguments = [sys.executable, "-c", code, str(reference), str(target)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    # Only what died after the swap has put the bundle there, and that one is whole.
    assert done.stdout.splitlines() == [
        "_bring -9 False",
        "_finish -9 False",
        "_write_about -9 False",
        "put_in_place -9 False",
        "sweep -9 True",
    ]
    assert get(reference, target).fetched_bytes == 0
    assert content(target) == content(source)
    assert leftovers(target) == []


def test_a_replaced_bundle_that_still_serves_is_never_written_into(
    reference: Reference, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def offer(number: int) -> None:
        files = {**SMALL, "decoder.onnx": b"graph %d" % number}
        push(write_bundle(tmp_path / f"v{number}" / "tiny", files), reference, registry)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def begin_to_remove(directory: Path) -> None:
        (directory / "manifest.json").unlink()
        raise KeyboardInterrupt

    ends = {
        "edge_fleet.registry.pull.sweep": interrupt,
        "edge_make.atomic_swap.remove": begin_to_remove,
    }
    for number, (name, end) in enumerate(ends.items()):
        offer(3 * number)
        target = get(reference, tmp_path / name).bundle
        with (target / "decoder.onnx").open("rb", buffering=0) as served:
            offer(3 * number + 1)
            with monkeypatch.context() as patch:
                patch.setattr(name, end)
                with pytest.raises(KeyboardInterrupt):
                    get(reference, target, overwrite=True)
            offer(3 * number + 2)
            get(reference, target, overwrite=True)
            assert served.read() == b"graph %d" % (3 * number)
        assert (target / "decoder.onnx").read_bytes() == b"graph %d" % (3 * number + 2)
        assert leftovers(target) == []


def test_a_bundle_that_waited_for_its_swap_is_not_fetched_again(
    reference: Reference,
    registry: Registry,
    tmp_path: Path,
    key: Key,
    monkeypatch: pytest.MonkeyPatch,
):
    mine = write_bundle(tmp_path / "b" / "tiny", SMALL)
    push(mine, reference, registry)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edge_fleet.registry.pull.put_in_place", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(reference, tmp_path / "tiny")
    sign_bundle(mine, key, "since")
    push(mine, reference, registry)
    done = get(reference, tmp_path / "tiny")
    assert done.fetched_bytes == 0
    assert content(done.bundle) == content(mine)  # with the new signature
    assert origin_digest(done.bundle) == done.digest


def test_a_full_disk_leaves_the_old_bundle_and_the_pieces(
    source: Path,
    reference: Reference,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    push(source, reference, registry)
    real = os.pwrite
    written: list[int] = []

    def full(descriptor: int, data: object, offset: int) -> int:
        if sum(written) > 4 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(real(descriptor, data, offset))  # type: ignore[arg-type]
        return written[-1]

    monkeypatch.setattr("edge_fleet.registry.pull.NUM_CONNECTIONS", 1)
    monkeypatch.setattr(os, "pwrite", full)
    target = tmp_path / "tiny"
    with pytest.raises(ResourceError, match="the disk filled up"):
        get(reference, target)
    assert not target.exists()
    monkeypatch.setattr(os, "pwrite", real)
    done = get(reference, target)
    assert done.fetched_bytes == sum(map(len, FILES.values())) - sum(written)
    verify_files(target, read_manifest(target))


def test_a_signature_that_no_disk_takes_leaves_a_bundle_that_can_be_replaced(
    reference: Reference,
    registry: Registry,
    tmp_path: Path,
    key: Key,
    monkeypatch: pytest.MonkeyPatch,
):
    """Whether the disk was full or the power was cut."""
    mine = write_bundle(tmp_path / "b" / "tiny", SMALL)
    push(mine, reference, registry)
    target = get(reference, tmp_path / "tiny").bundle
    before = {path.name for path in target.iterdir()}
    sign_bundle(mine, key, "since")
    push(mine, reference, registry)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="the disk filled up"):
            get(reference, target)
    assert {path.name for path in target.iterdir()} == before
    for name in (".origin.json", "manifest.json.minisig"):
        (target / f".{name}.tmp").write_bytes(b"half")
    push(write_bundle(tmp_path / "c" / "tiny", FILES | SMALL), reference, registry)
    get(reference, target, overwrite=True)
    assert {path.name for path in target.iterdir()} == before | {"decoder.onnx.data"}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    reference: Reference,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    push(write_bundle(tmp_path / "b" / "tiny", SMALL), reference, registry)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50 << 20))
    with pytest.raises(ResourceError, match="must be spare"):
        get(reference, tmp_path / "tiny")


def test_a_piece_that_a_neighbour_has_no_more_is_fetched(
    source: Path, reference: Reference, registry: Registry, tmp_path: Path
):
    push(source, reference, registry)
    neighbour = get(reference, tmp_path / "old").bundle
    with (neighbour / "decoder.onnx.data").open("r+b") as file:
        file.write(b"damaged")
    done = get(reference, tmp_path / "tiny")
    first = artifacts.decode(registry.manifest("v1")[0], "")[1].pieces["decoder.onnx.data"][0]
    assert done.fetched_bytes == first.num_bytes
    assert content(done.bundle) == content(source)


def test_a_bundle_that_changes_while_it_is_pushed_is_refused(
    reference: Reference,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    mine = write_bundle(tmp_path / "b" / "tiny", {"decoder.onnx": b"1", "decoder.cpu.onnx": b"2"})
    real = artifacts.describe

    def change_afterwards(*args: object) -> object:
        found = real(*args)  # type: ignore[arg-type]
        (mine / "decoder.onnx").write_bytes(b"3")
        return found

    monkeypatch.setattr(artifacts, "describe", change_afterwards)
    with pytest.raises(IntegrityError, match="was changed while it was pushed"):
        push(mine, reference, registry)
    with pytest.raises(ConfigError, match="has no v1"):
        registry.manifest("v1")
    monkeypatch.setattr(artifacts, "describe", real)
    with pytest.raises(IntegrityError, match="is damaged"):
        push(mine, reference, registry)


def test_the_wall_clock_decides_nothing(
    reference: Reference,
    registry: Registry,
    tmp_path: Path,
    key: Key,
    monkeypatch: pytest.MonkeyPatch,
):
    mine = write_bundle(tmp_path / "b" / "tiny", SMALL)
    sign_bundle(mine, key, f"timestamp:{int(time.time()) + 86_400}")
    push(mine, reference, registry)
    keys = keys_file(tmp_path, key)
    now = time.time()
    for shift in (-86_400, 86_400):
        monkeypatch.setattr(time, "time", lambda shift=shift: now + shift)
        assert look(reference, registry, keys).signer == key.public_key.name


def test_errors_are_edge_errors_of_the_documented_codes(tmp_path: Path, quick: object):
    nowhere = parse_reference("127.0.0.1:9/none:v1")  # the discard port
    with pytest.raises(EdgeError) as caught:
        get(nowhere, tmp_path / "tiny")
    assert caught.value.exit_code == 75


# ------------------------------------------------------------------------------- planted files


@pytest.mark.parametrize("kind", ["hard link", "hard link of the same", "symbolic link", "pipe"])
def test_staged_files_with_other_names_are_replaced(
    reference: Reference, registry: Registry, tmp_path: Path, kind: str
):
    """Else a pull writes into somebody's file, or waits for ever for who reads the pipe."""
    push(write_bundle(tmp_path / "mine" / "tiny", SMALL), reference, registry)
    staging = tmp_path / ".tiny.edge-llm-pull"
    staging.mkdir()
    victim, planted = tmp_path / "victim", staging / "decoder.onnx"
    content_before = SMALL["decoder.onnx"] + b" and more" * (kind != "hard link of the same")
    victim.write_bytes(content_before)
    if kind == "pipe":
        os.mkfifo(planted)
    elif kind == "symbolic link":
        planted.symlink_to(victim)
    else:
        planted.hardlink_to(victim)
    with no_waiting_for(planted):
        bundle = get(reference, tmp_path / "tiny").bundle
    assert victim.read_bytes() == content_before
    assert victim.stat().st_nlink == 1
    assert content(bundle).keys() == {*SMALL, "manifest.json"}
    verify_files(bundle, read_manifest(bundle))


def test_a_pipe_that_comes_while_a_bundle_is_fetched_is_an_error(
    reference: Reference, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    push(write_bundle(tmp_path / "mine" / "tiny", SMALL), reference, registry)
    fetch, planted = Registry.blob, tmp_path / ".tiny.edge-llm-pull" / "decoder.onnx"

    def planting(self: Registry, digest: str, size: int) -> bytes:
        if planted.parent.exists() and not planted.exists():
            os.mkfifo(planted)
        return fetch(self, digest, size)

    monkeypatch.setattr(Registry, "blob", planting)
    with no_waiting_for(planted), pytest.raises(ConfigError, match=r"cannot write .*decoder\.onnx"):
        get(reference, tmp_path / "tiny")


def test_a_staging_directory_that_is_a_link_is_not_followed(
    reference: Reference, registry: Registry, tmp_path: Path
):
    push(write_bundle(tmp_path / "mine" / "tiny", SMALL), reference, registry)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_bytes(b"1")
    (tmp_path / ".tiny.edge-llm-pull").symlink_to(other)
    get(reference, tmp_path / "tiny")
    assert [path.name for path in other.iterdir()] == ["precious"]


@contextmanager
def no_waiting_for(pipe: Path, seconds: float = 20.0) -> Iterator[None]:
    """End a test that hangs, with the threads that wait until somebody reads from the pipe."""

    def late(*_: object) -> None:
        os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
