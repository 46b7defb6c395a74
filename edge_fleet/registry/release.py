"""Decides which releases a device takes: none that has expired, and none older than it had.

The Update Framework does so (specification 1.0, 5.3 to 5.5) with timestamp and snapshot, apt with
``Valid-Until``, and ostree with ``--timestamp-check``. Only fetched bundles are checked: a device
continues to serve the bundle that it has, whatever the date.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from edge.bundle.manifest import read_manifest
from edge.bundle.release import Release, read_release, say_time
from edge.errors import BundleError

from .reference import Reference


def release_at(bundle: Path) -> Release | None:
    """Read the release of a directory or link; None without a number, or without a bundle."""
    try:
        return read_release(read_manifest(bundle))
    except BundleError:
        return None


def check_release(
    release: Release | None, where: str, before: Release | None, highest: int = 0
) -> str | None:
    """Refuse a release that has expired, or that is older than an earlier one here.

    A bundle without a number counts as release 0. The same number again is allowed: to keep one
    bundle from being mistaken for another, give it a higher number.

    A clock may be wrong: a device without a battery starts in 1970. The time is taken to be no
    earlier than the signing of ``release`` and ``before``, so such a device takes releases that had
    not expired by then.

    Args:
        release: release that is offered.
        where: its name for messages.
        before: release that is here.
        highest: number of the newest release that was ever here.

    Returns:
        A note for people if this machine's clock is behind; else None.

    Raises:
        BundleError: the release must not be taken.
    """
    number = 0 if release is None else release.number
    highest = max(highest, 0 if before is None else before.number)
    if number < highest:
        what = f"release {number}" if number else "no release with a number"
        raise BundleError(
            f"{where} is {what}, and release {highest} was here: somebody has moved the tag back; "
            "what is here stays. If that is what you want, give --allow-older"
        )
    if release is None or release.expires is None:
        return None
    now = datetime.now(timezone.utc)
    known = max(each.signed for each in (release, before) if each is not None)
    if release.expires <= max(now, known):
        raise BundleError(
            f"{where} is release {number}, which expired at {say_time(release.expires)}, and it is "
            f"{say_time(max(now, known))}; what is here stays. If that time is right, its vendor "
            "has to sign a release anew; to take this one all the same, give --allow-older"
        )
    if now >= known:
        return None
    return (
        f"the clock of this machine says {say_time(now)}, and a release was signed at "
        f"{say_time(known)} already: it was held against that time; set the clock"
    )


def check_name(release: Release | None, reference: Reference) -> None:
    """Refuse a bundle that was signed for another repository.

    Raises:
        BundleError: it was. Mirrors may put any path before the name.
    """
    name = release and release.name
    if name and not f"/{reference.repository}".endswith(f"/{name}"):
        raise BundleError(
            f"{reference} is a bundle that was signed for {name}, which is another repository; "
            "ask for it there, or sign it with: edge-llm bundle sign --release NUMBER --name "
            f"{reference.repository}"
        )
