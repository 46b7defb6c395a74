"""Names by which Ray knows the fleet's parts; no Ray is needed to say them."""

from __future__ import annotations

HEAD_APP = "edge-llm-fleet"
HEAD_RESOURCE = "edge-llm-head"


def device_app(name: str) -> str:
    """Return the name of a device's application."""
    return f"edge-llm-device-{name}"


def device_resource(name: str) -> str:
    """Return the name of the resource that only this device has."""
    return f"edge-llm-device-{name}"
