"""Decodes a section of the manifest for the optional package that owns it.

The manifest carries `Manifest.extras` and knows no section. A capability that only some bundles
have keeps its struct in its own package. It writes the struct under its own name, and reads it here
when a bundle is opened for it. A section that no package reads stays in the bundle and changes
nothing.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edge.errors import BundleError

from .manifest import Manifest

Section = TypeVar("Section")


def read_extra(manifest: Manifest, name: str, kind: type[Section]) -> Section | None:
    """Decode a section; None if the bundle does not have it.

    Args:
        manifest: the bundle's manifest.
        name: the section's name, which is its package's.
        kind: a `msgspec.Struct` of the package. One with ``forbid_unknown_fields`` refuses the keys
            of a newer edge-llm instead of ignoring them.

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
