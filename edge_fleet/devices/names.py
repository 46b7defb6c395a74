"""Names by which Ray knows the fleet's parts; no Ray is needed to say them."""

from __future__ import annotations

HEAD_RESOURCE = "edge-llm-head"


def device_resource(name: str) -> str:
    """Return the name of the resource that only this device has."""
    return f"edge-llm-device-{name}"
