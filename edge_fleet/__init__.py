"""Bundles on their way to devices, and many devices behind one endpoint; see ``docs/fleet.md``.

`registry` pushes and pulls, `rollout` switches a device, `signing` signs, `devices` joins devices
on Ray or HAProxy, `cli` has the verbs pull, bundle and fleet. It stands on `edge`, `edge_lab` and
`edge_serve`; none of them imports it. Ray is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .devices.client import Fleet
    from .devices.config import FleetConfig
    from .devices.rollout import FleetRollout

_HOMES = {
    "Fleet": ".devices.client",
    "FleetConfig": ".devices.config",
    "FleetRollout": ".devices.rollout",
}

__all__ = ["Fleet", "FleetConfig", "FleetRollout"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_fleet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
