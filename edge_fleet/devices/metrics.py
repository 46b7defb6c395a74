"""What the head tells Prometheus: the state of each device, and what became of requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from edge.errors import DependencyError, install_command
from edge_serve.observe.metric_families import Pulled, gauge

from .members import Member

if TYPE_CHECKING:
    from prometheus_client.core import Metric

OUTCOMES = ("answered", "busy", "lost")
"""Of a request at a device: answered, refused by it as its queue is full, or lost with it."""

_STATE = {
    "fleet_device_ready": ("takes", "1 if the head sends requests there."),
    "fleet_device_requests": ("in_flight", "Requests of the head that run or wait there."),
    "fleet_device_slots": ("slots", "Requests that the device computes at once."),
}


def render(members: Iterable[Member], rejections: Mapping[str, int]) -> bytes:
    """Write all metrics in Prometheus' text format.

    Args:
        members: the devices.
        rejections: requests that the head refused, by reason; of the same name as a device's own.

    Raises:
        DependencyError: prometheus-client is missing.
    """
    try:
        from prometheus_client import generate_latest
    except ImportError as error:
        raise DependencyError(
            f"the head's metrics need prometheus-client; run: {install_command('fleet')}"
        ) from error
    text: bytes = generate_latest(Pulled(lambda: _families([*members], rejections)))
    return text


def _families(members: list[Member], rejections: Mapping[str, int]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    for name, (attribute, text) in _STATE.items():
        values: dict[tuple[str, ...], float | None] = {
            (member.name,): float(getattr(member, attribute)) for member in members
        }
        yield gauge(name, text, ("device",), values)
    requests = CounterMetricFamily(
        "edgellm_fleet_requests", "Requests by device and outcome.", labels=["device", "outcome"]
    )
    for member in members:
        for outcome in OUTCOMES:
            requests.add_metric([member.name, outcome], member.counts[outcome])
    yield requests
    refused = CounterMetricFamily(
        "edgellm_rejections", "Requests refused, by reason.", labels=["reason"]
    )
    for reason, count in sorted(rejections.items()):
        refused.add_metric([reason], count)
    yield refused
