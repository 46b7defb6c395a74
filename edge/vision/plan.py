"""Finds the vision encoder of an engine: a second plan beside the decoder's.

``engine.json`` names it in the section ``vision`` of its ``extras``, so a signature of the record
covers both plans, and both are replaced in one step. `engine_file.open_plan` maps and hashes the
plan of the record that `vision_plan` returns. The plan has one profile: `PIXEL_VALUES` of 1 to
``max_tiles`` tiles, tuned for one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from edge.bundle.engine_file import ENGINE_JSON, EngineInfo, rebuild_command
from edge.bundle.manifest import Line, Sha256
from edge.errors import BundleError

from .section import SECTION


class VisionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section of ``engine.json``: the plan's file, its size, its hash, and its tiles."""

    plan: Line
    plan_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    plan_sha256: Sha256
    max_tiles: Annotated[int, msgspec.Meta(ge=1, le=256)]


def vision_plan(directory: Path, info: EngineInfo) -> EngineInfo:
    """Return an engine's record with the encoder's plan in place of the decoder's.

    Args:
        directory: the engine's directory.
        info: the engine's ``engine.json``.

    Raises:
        BundleError: the engine was built without an encoder, or its section is damaged.
    """
    again = f"build it again with: {rebuild_command(directory, info, again=True)}"
    if SECTION not in info.extras:
        raise BundleError(f"the engine {directory} has no vision encoder; {again}")
    try:
        found = msgspec.convert(info.extras[SECTION], VisionPlan)
    except msgspec.ValidationError as error:
        raise BundleError(f"{directory / ENGINE_JSON} is damaged ({error}); {again}") from error
    if Path(found.plan).name != found.plan or found.plan.startswith("."):
        raise BundleError(f"{directory / ENGINE_JSON} names a file outside its directory; {again}")
    return msgspec.structs.replace(
        info,
        plan=found.plan,
        plan_bytes=found.plan_bytes,
        plan_sha256=found.plan_sha256,
        outside=None,
    )
