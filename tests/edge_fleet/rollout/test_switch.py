"""Root's part of a roll-out: what it takes over from a user whom it does not trust."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from edge.bundle import trust
from edge.bundle.engine_file import read_engine_info
from edge.bundle.engine_records import RECORDS_VARIABLE, UnvouchedError, built_here
from edge.bundle.manifest import read_manifest
from edge.bundle.release import Release
from edge.bundle.verified_files import verify_files
from edge.errors import EdgeError
from edge_fleet.rollout import journal as journals
from edge_fleet.rollout import switch
from edge_fleet.rollout.journal import Place
from edge_fleet.rollout.orders import Order, read_answer
from edge_fleet.signing import sign_bundle
from edge_make.manifest_bytes import encode_manifest
from tests.conftest import Bundles
from tests.makers.keys import make_key
from tests.standins.tensorrt import write_engine

WEIGHTS = "embeddings.safetensors"


class Site:
    """A link, and a staging directory with a bundle that somebody has judged."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.staging, self.root = folder / "staging", folder / "bundles"
        self.staging.mkdir()
        self.root.mkdir()
        self.bundle = bundle
        self.link = self.root / "r1"
        shutil.copytree(bundle, self.root / "r1-first")
        self.link.symlink_to("r1-first")
        self.told = folder / "told"
        self.reload = f"sh -c 'echo $(readlink {self.link}) >> {self.told}'"
        self.name = self.stage("one")
        self.new = self.staging / self.name

    def stage(self, version: str) -> str:
        origin = f'{{"version": "{version}"}}'.encode()
        name = f"r1-{hashlib.sha256(origin).hexdigest()[:12]}"
        shutil.copytree(self.bundle, self.staging / name)
        (self.staging / name / ".origin.json").write_bytes(origin)
        return name

    def run(self) -> int:
        return switch.main(str(self.link), str(self.staging), self.reload)

    def order(self, do: Literal["try", "keep", "back"], bundle: str = "") -> tuple[int, str]:
        order = Order(uuid.uuid4().hex, do, bundle)
        (self.staging / "order.json").write_bytes(msgspec.json.encode(order))
        code = self.run()
        answer = read_answer(self.link)
        assert answer.done
        assert (answer.id, answer.code) == (order.id, code)
        assert not (self.staging / "order.json").exists()
        return code, answer.said

    @property
    def current(self) -> str:
        return self.link.readlink().name

    @property
    def reloads(self) -> list[str]:
        return self.told.read_text().split() if self.told.exists() else []

    def beside(self) -> set[str]:
        return {path.name for path in self.root.iterdir()} - {".r1.edge-llm-rollout"}


@pytest.fixture
def site(tmp_path: Path, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.delenv(trust.KEYS_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "no-keys")
    return Site(tmp_path, tiny_bundles("qwen2"))


def test_a_bundle_is_tried_and_kept(site: Site):
    engine = site.new / "engines" / "sm87"
    engine.mkdir(parents=True)
    (engine / "engine.json").write_text("{}")
    (engine / ".half.plan").write_text("of a build that was ended")
    assert site.order("try", site.name) == (0, "")
    assert site.current == site.name
    assert Place(site.link).read().on_trial
    served = site.root / site.name
    verify_files(served, read_manifest(served))
    assert {path.name for path in (served / "engines/sm87").iterdir()} == {"engine.json"}
    for path in (served, *served.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert site.order("keep", site.name) == (0, "")
    assert site.order("keep", site.name) == (0, "")  # said again after a kill
    assert not Place(site.link).read().on_trial
    assert site.order("back") == (0, "")  # what is accepted stays; the service looks again
    assert site.current == site.name
    assert site.reloads == [site.name, site.name]


def test_root_vouches_for_the_engines_that_it_takes_over(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Records of the user who built them are not the server's."""
    records = tmp_path / "records"
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "builder"))
    engine = write_engine(site.new, max_prefill=32)
    built_here.clear()
    monkeypatch.setenv(RECORDS_VARIABLE, str(records))
    key, keys = make_key(), tmp_path / "keys"
    keys.write_text(key.public_text)
    keys.chmod(0o644)
    sign_bundle(site.new, key, "the vendor's")
    with pytest.raises(UnvouchedError):
        read_engine_info(engine, keys)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", keys)
    records.mkdir()
    records.chmod(0o777)
    code, said = site.order("try", site.name)
    assert (code, "no record of an engine can be kept" in said) == (64, True)
    assert site.current == "r1-first"
    records.chmod(0o755)
    assert site.order("try", site.name) == (0, "")
    served = site.root / site.name / "engines" / engine.name
    read_engine_info(served, keys)
    [record] = records.iterdir()
    assert str(served) in record.read_text()


def test_the_bundle_before_stays_and_older_ones_go(site: Site):
    names = [site.name, site.stage("two"), site.stage("three")]
    for name in names:
        assert site.order("try", name)[0] == 0
        assert site.order("keep", name)[0] == 0
    assert site.beside() == {"r1", "r1-first", *names[1:]}
    assert site.order("try", names[-1])[0] == 64  # it is there


def test_a_trial_is_taken_back(site: Site):
    site.order("try", site.name)
    assert site.order("back") == (0, "")
    assert site.current == "r1-first"
    assert site.beside() == {"r1", "r1-first"}
    assert site.reloads == [site.name, "r1-first"]
    assert site.order("keep", site.name)[0] == 64
    assert site.current == "r1-first"
    # A trial that nobody ended is taken back before the next.
    other = site.stage("two")
    site.order("try", site.name)
    assert site.order("try", other)[0] == 0
    assert site.reloads[2:] == [site.name, "r1-first", other]
    assert Place(site.link).read().old == "r1-first"


def test_the_first_bundle_needs_no_service(site: Site):
    site.link.unlink()
    assert site.order("try", site.name) == (0, "")
    assert site.current == site.name
    assert site.reloads == []
    assert site.order("back") == (0, "")
    assert not site.link.is_symlink()


def test_a_failed_reload_is_reported(site: Site):
    site.reload = "false"
    code, said = site.order("try", site.name)
    assert code == 70
    assert "'false' fails" in said
    assert site.order("back")[0] == 70
    assert site.current == "r1-first"
    assert not Place(site.link).read().on_trial


# ------------------------------------------------------------------------------- attacks


def test_what_is_served_is_a_copy_that_nobody_else_has_open(site: Site):
    with (site.new / WEIGHTS).open("r+b") as still_open:
        site.order("try", site.name)
        served = site.root / site.name / WEIGHTS
        before = served.read_bytes()
        still_open.write(b"other bytes")
        still_open.flush()
        (site.new / "manifest.json").write_text("{}")
        assert served.read_bytes() == before
    verify_files(site.root / site.name, read_manifest(site.root / site.name))


def test_the_bytes_that_are_written_are_those_that_were_hashed(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    """A file that changes after each look at it."""
    real = switch._chunks

    def spoil(descriptor: int, limit: int) -> Iterator[bytes]:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        for chunk in real(descriptor, limit):
            with path.open("r+b") as file:
                file.write(os.urandom(min(64, len(chunk))))
            yield chunk

    monkeypatch.setattr(switch, "_chunks", spoil)
    assert site.order("try", site.name) == (0, "")
    verify_files(site.root / site.name, read_manifest(site.root / site.name))


def _replace(path: Path, make: Callable[[Path, Path], object]) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    make(path, aside)


def _link_folder(site: Site) -> None:
    aside = site.staging / "aside"
    site.new.rename(aside)
    site.new.symlink_to("aside")


def _link_engine(site: Site) -> None:
    (site.new / "engines").mkdir()
    (site.new / "engines/sm87").symlink_to("/etc")


def _link_secret(site: Site) -> None:
    engine = site.new / "engines/sm87"
    engine.mkdir(parents=True)
    os.link(site.root / "r1-first" / WEIGHTS, engine / "plan")  # of root, say


def _foreign(site: Site) -> None:
    os.chown(site.new / WEIGHTS, 12345, -1)


def _manifest_of_another(site: Site) -> None:
    manifest = read_manifest(site.new)
    changed = msgspec.structs.replace(manifest, created="2099-01-01T00:00:00Z")
    assert encode_manifest(changed) != encode_manifest(manifest)
    (site.new / WEIGHTS).write_bytes(b"x" * (site.new / WEIGHTS).stat().st_size)
    (site.new / "manifest.json").write_bytes(encode_manifest(changed))


ATTACKS: dict[str, tuple[Callable[[Site], object], str]] = {
    "symbolic link": (
        lambda site: _replace(site.new / WEIGHTS, lambda path, aside: path.symlink_to(aside)),
        "symbolic links",
    ),
    "hard link": (
        lambda site: _replace(site.new / WEIGHTS, lambda path, aside: path.hardlink_to(aside)),
        "no plain file with one name",
    ),
    "pipe": (
        lambda site: _replace(site.new / WEIGHTS, lambda path, _: os.mkfifo(path)),
        "no plain file",
    ),
    "directory": (
        lambda site: _replace(site.new / WEIGHTS, lambda path, _: path.mkdir()),
        "no plain file",
    ),
    "missing": (lambda site: (site.new / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "longer": (
        lambda site: (site.new / WEIGHTS).write_bytes((site.new / WEIGHTS).read_bytes() + b"x"),
        "the manifest says",
    ),
    "other bytes": (_manifest_of_another, "the manifest says"),
    "another's file": (_foreign, "does not belong to user"),
    "linked folder": (_link_folder, "Not a directory"),
    "linked engine": (_link_engine, "Not a directory"),
    "secret as an engine": (_link_secret, "no plain file with one name"),
    "other content under the name": (
        lambda site: (site.new / ".origin.json").write_text("{}"),
        "pull it again",
    ),
    "no manifest": (lambda site: (site.new / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_files_that_differ_from_the_judged_bundle_are_refused(site: Site, attack: str):
    change, wanted = ATTACKS[attack]
    if attack == "another's file" and os.geteuid() != 0:
        pytest.skip("needs root to give a file to another user")
    change(site)
    code, said = site.order("try", site.name)
    assert code == 65
    assert wanted in said
    assert site.current == "r1-first"
    assert site.beside() == {"r1", "r1-first"}
    assert site.reloads == []


@pytest.mark.parametrize(
    "name", ["../staging/r1-0123456789ab", "r1-first", "r1", "", "/etc", "r2-0123456789ab"]
)
def test_only_names_of_a_roll_out_are_taken(site: Site, name: str):
    code, said = site.order("try", name)
    assert code == 64
    assert "is no name of a bundle that is rolled out here" in said
    assert site.current == "r1-first"


def test_root_takes_no_older_release_itself(site: Site):
    """Whoever judges may be somebody else by now, and has signed bundles of every age."""
    now = datetime.now(timezone.utc)

    def staged(version: str, number: int, expires: datetime | None = None) -> str:
        name = site.stage(version)
        sign_bundle(site.staging / name, make_key(), version, Release(number, now, expires))
        return name

    new, old = staged("new", 2), staged("old", 1)
    expired = staged("expired", 3, now - timedelta(days=1))
    assert site.order("try", new) == (0, "")
    assert Place(site.link).read().release == 0  # on trial only
    assert site.order("keep", new) == (0, "")
    assert Place(site.link).read().release == 2
    for name, complaint in ((old, "release 2 was here"), (expired, "which expired at")):
        code, said = site.order("try", name)
        assert (code, complaint in said) == (65, True), said
        assert site.current == new
        assert name not in site.beside()
    Place(site.link).point("r1-first")  # by hand; the journal knows
    assert site.order("try", old)[0] == 65


def test_root_asks_for_the_signature_itself(site: Site, monkeypatch: pytest.MonkeyPatch):
    key, other = make_key(), make_key()
    keys = site.staging.parent / "trusted-keys"
    keys.write_text(key.public_text)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", keys)
    code, said = site.order("try", site.name)
    assert code == 65
    assert "is not signed" in said
    sign_bundle(site.new, other, "not ours")
    assert site.order("try", site.name)[0] == 65
    sign_bundle(site.new, key, "ours")
    assert site.order("try", site.name) == (0, "")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"id": "../../x", "do": "back"}', '{"id": "0", "do": "sh"}', "x" * 20_000],
)
def test_invalid_orders_are_removed(site: Site, text: str):
    (site.staging / "order.json").write_text(text)
    with pytest.raises(EdgeError):
        site.run()
    assert not (site.staging / "order.json").exists()
    assert site.run() == 0  # there is none
    assert site.current == "r1-first"


def test_an_order_that_was_done_is_not_done_again(site: Site):
    order = msgspec.json.encode(Order(uuid.uuid4().hex, "try", site.name))
    for _ in range(2):  # as after a kill before it was removed
        (site.staging / "order.json").write_bytes(order)
        assert site.run() == 0
    assert site.reloads == [site.name]


@pytest.mark.parametrize("at", ["adopt", "write", "point", "reload_service", "_answer"])
def test_an_order_cut_off_by_a_kill_is_done_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, at: str
):
    """systemd starts it again while the order is there."""

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    order = msgspec.json.encode(Order(uuid.uuid4().hex, "try", site.name))
    (site.staging / "order.json").write_bytes(order)
    with monkeypatch.context() as patch:
        owner: Any = Place if at in ("write", "point") else switch
        patch.setattr(owner, at, die)
        with pytest.raises(KeyboardInterrupt):
            site.run()
    assert site.run() == 0
    assert site.current == site.name
    assert Place(site.link).read().on_trial
    assert site.order("back") == (0, "")
    assert site.current == "r1-first"
    assert journals.Place(site.link).read().step != "trial"


def test_it_imports_nothing_that_opens_models():
    code = "import edge_fleet.rollout.switch, sys, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"numpy", "onnxruntime", "tensorrt", "edge.runtime", "edge.backends"}
    assert not loaded & {"click", "ssl", "http.client", "edge_fleet.rollout.steps"}
