"""Many devices behind one endpoint, on Ray; see ``docs/fleet.md``.

Each device keeps its own ``edge-llm serve``. What is here joins them: `fleet.head` chooses a device
for every request and `fleet.device` hands it to the device's own service. Nothing else of edge-llm
imports this package, and Ray is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import Fleet
    from .config import FleetConfig
    from .rollout import FleetRollout

_HOMES = {"Fleet": ".client", "FleetConfig": ".config", "FleetRollout": ".rollout"}

__all__ = ["Fleet", "FleetConfig", "FleetRollout"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fleet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
