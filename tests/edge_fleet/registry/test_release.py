"""Releases that have expired, are older, or are another repository's."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from edge.bundle.release import Release
from edge.errors import BundleError
from edge_fleet.registry import release as releases
from edge_fleet.registry.client import Registry, digest_of
from edge_fleet.registry.pull import look
from edge_fleet.registry.push import push
from edge_fleet.registry.reference import Reference, parse_reference
from edge_fleet.registry.release import check_name, check_release, release_at
from edge_fleet.signing import sign_bundle
from tests.makers.keys import make_key

from .live import SMALL, write_bundle

SIGNED = datetime(2026, 11, 1, tzinfo=timezone.utc)
EXPIRES = SIGNED + timedelta(days=90)


class Clock(datetime):
    """A machine's clock that says what a test wants."""

    says = SIGNED

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return cls.says


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(releases, "datetime", Clock)
    monkeypatch.setattr(Clock, "says", SIGNED + timedelta(days=1))
    return Clock


@pytest.mark.parametrize(
    ("offered", "here", "highest", "is_taken"),
    [
        (None, None, 0, True),
        (1, None, 0, True),
        (2, 1, 1, True),
        (2, 2, 2, True),  # built again
        (1, 2, 0, False),
        (1, None, 2, False),
        (None, 1, 0, False),
        (None, None, 1, False),
        (3, 2, 4, False),  # the link was moved by hand meanwhile
    ],
)
def test_no_release_follows_a_higher_one(
    offered: int | None, here: int | None, highest: int, is_taken: bool
):
    new, before = (number and Release(number, SIGNED) for number in (offered, here))
    if is_taken:
        assert check_release(new or None, "it", before or None, highest) is None
        return
    with pytest.raises(BundleError, match=r"moved the tag back.*--allow-older") as caught:
        check_release(new or None, "it", before or None, highest)
    assert caught.value.exit_code == 65


def test_a_release_is_taken_until_it_expires(clock: type[Clock]):
    offered = Release(1, SIGNED, EXPIRES)
    clock.says = EXPIRES - timedelta(seconds=1)
    assert check_release(offered, "it", None) is None
    clock.says = EXPIRES
    with pytest.raises(BundleError, match="expired at 2027-01-30 00:00 UTC, and it is") as caught:
        check_release(offered, "it", None)
    assert caught.value.exit_code == 65
    assert check_release(Release(1, SIGNED), "it", None) is None  # without one never


def test_an_unset_clock_takes_releases_that_had_not_expired_when_signed(
    clock: type[Clock],
):
    """A Jetson without a battery begins in 1970, and has to get its first bundle all the same."""
    clock.says = datetime(1970, 1, 1, tzinfo=timezone.utc)
    note = check_release(Release(1, SIGNED, EXPIRES), "it", None)
    assert note is not None
    assert "says 1970-01-01 00:00 UTC" in note
    assert "signed at 2026-11-01 00:00 UTC already" in note
    # What is there was signed later, so time has passed, whatever the clock says.
    here = Release(1, EXPIRES + timedelta(days=1))
    with pytest.raises(BundleError, match=r"it is 2027-01-31 00:00 UTC"):
        check_release(Release(1, SIGNED, EXPIRES), "it", here)


@pytest.mark.parametrize(
    ("name", "repository", "fits"),
    [
        (None, "acme/r1", True),
        ("acme/r1", "acme/r1", True),
        ("acme/r1", "mirror/of/acme/r1", True),
        ("acme/r1", "acme/r1-7b", False),
        ("acme/r1", "badacme/r1", False),
        ("acme/r1", "r1", False),
    ],
)
def test_a_bundle_is_taken_from_the_repository_that_it_is_for(
    name: str | None, repository: str, fits: bool
):
    release, reference = Release(1, SIGNED, None, name), Reference("a.b", repository, "stable")
    if fits:
        check_name(release, reference)
        check_name(None, reference)
        return
    with pytest.raises(BundleError, match="was signed for acme/r1, which is another repository"):
        check_name(release, reference)


@pytest.mark.live
def test_a_bundle_of_another_repository_is_neither_sent_nor_fetched(
    reference: Reference, registry: Registry, tmp_path: Path
):
    mine = write_bundle(tmp_path / "mine", SMALL)
    sign_bundle(mine, make_key(), "1", Release(1, SIGNED, None, reference.repository))
    done = push(mine, reference, registry)
    assert look(reference, registry).release == release_at(mine)
    with Registry(parse_reference(f"{reference.registry}/elsewhere/r1")) as other:
        elsewhere = parse_reference(f"{reference.registry}/elsewhere/r1:v1")
        with pytest.raises(BundleError, match="another repository"):
            push(mine, elsewhere, other)
        # Whoever writes to the registry needs no client of ours.
        for path in (mine / "manifest.json", *(mine / name for name in SMALL)):
            other.put_blob(path.read_bytes(), _digest(path))
        signature = mine / "manifest.json.minisig"
        other.put_blob(signature.read_bytes(), _digest(signature))
        other.put_blob(b"{}", _digest(b"{}"))
        other.put_manifest(registry.manifest(done.digest)[0], "v1")
        with pytest.raises(BundleError, match="another repository"):
            look(elsewhere, other)


def _digest(what: Path | bytes) -> str:
    return digest_of(what if isinstance(what, bytes) else what.read_bytes())


def test_only_a_bundle_with_a_number_has_a_release(tmp_path: Path):
    assert release_at(tmp_path / "none") is None
    mine = write_bundle(tmp_path / "mine", SMALL)
    assert release_at(mine) is None
    sign_bundle(mine, make_key(), "1", Release(7, SIGNED))
    assert release_at(mine) == Release(7, SIGNED)
    sign_bundle(mine, make_key(), "another key")  # what it is stays
    assert release_at(mine) == Release(7, SIGNED)
    (tmp_path / "link").symlink_to(shutil.copytree(mine, tmp_path / "copy"))
    assert release_at(tmp_path / "link") == Release(7, SIGNED)
