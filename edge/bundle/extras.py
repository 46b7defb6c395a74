"""Decodes a section of the manifest for the optional room that owns it.

The manifest carries `Manifest.extras` and knows no section. A capability that only some bundles
have keeps its struct in its own room, writes it under its own name, and reads it here when a bundle
is opened for it. A section that no room reads stays in the bundle and changes nothing.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edge.errors import BundleError

from .manifest import Manifest

Section = TypeVar("Section")


def read_extra(manifest: Manifest, name: str, kind: type[Section]) -> Section | None:
    """Decode a section; None where the bundle has none.

    Args:
        manifest: of the bundle.
        name: of the section, which is its room's.
        kind: a `msgspec.Struct` of the room; one with ``forbid_unknown_fields`` refuses keys of a
            newer edge-llm instead of passing over them.

    Raises:
        BundleError: the section does not fit.
    """
    if name not in manifest.extras:
        return None
    try:
        return msgspec.convert(manifest.extras[name], kind)
    except msgspec.ValidationError as error:
        raise BundleError(
            f"{manifest.name}: the manifest's section {name} does not fit this edge-llm ({error}); "
            "install the edge-llm that wrote it, or export the bundle again"
        ) from error
