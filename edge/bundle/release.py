"""Reads a bundle's release: its number, its expiry, and its name.

A signature says who made a bundle, forever. So whoever can move a registry's tag could bring back
an older bundle of the same key. A number in the signed manifest tells the two apart, an expiry
shows that a tag was not moved, and a name says which repository is meant. They are the version, the
expiration and the targets' names of The Update Framework's metadata.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec

from .extras import read_extra
from .manifest import Manifest

RELEASE = "release"
"""Names the manifest's section."""
_Instant = Annotated[datetime, msgspec.Meta(tz=True)]
_NAME = r"^[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*\Z"


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section that `edge-llm bundle sign --release` writes.

    Attributes:
        number: higher than that of every release that must not come back in its place.
        signed: when it was signed, by the signer's clock.
        expires: time from which no device fetches it any more; None is never.
        name: repository to which it belongs, e.g. ``acme/r1-7b``; None is any.
    """

    number: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    signed: _Instant
    expires: _Instant | None = None
    name: Annotated[str, msgspec.Meta(max_length=255, pattern=_NAME)] | None = None

    def __str__(self) -> str:
        of = f" of {self.name}" if self.name else ""
        until = f", expires {say_time(self.expires)}" if self.expires else ""
        return f"{self.number}{of}, signed {say_time(self.signed)}{until}"


def read_release(manifest: Manifest) -> Release | None:
    """Read a bundle's release; None if it has no number.

    Raises:
        BundleError: the section does not fit.
    """
    return read_extra(manifest, RELEASE, Release)


def say_time(when: datetime) -> str:
    """Format a time for a person, to the minute."""
    return f"{when:%Y-%m-%d %H:%M %Z}"
