"""Puts an evaluation onto devices through Ray: an actor on each, which ends with the driver."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from edge.errors import BackendError, EdgeError
from edge_lab.measure.compare import WindowResult
from edge_lab.measure.tasks import Item, ItemResult

from .config import FleetConfig
from .evaluator import EvaluationAgent, Kind, Piece, RemoteTask, RemoteText, join, split
from .members import LostError
from .names import device_resource

_SHARE = 0.001  # of a device's resource, as the fleet's own actor takes
_START_S = 120.0
_NICE = 10
_PIECES = 4
"""Pieces of a result that may wait to be fetched: a few MB each, in a store of 100 MB."""


class EvaluationActor:
    """An `EvaluationAgent` as an actor: it lets the device's service go first."""

    def __init__(self) -> None:
        os.nice(_NICE)
        self._agent = EvaluationAgent()

    def kind(self) -> Kind:
        """See `EvaluationAgent.kind`."""
        return self._agent.kind()

    def open(self, job: RemoteText | RemoteTask) -> str:
        """See `EvaluationAgent.open`."""
        return self._agent.open(job)

    def score(self, window: Sequence[int]) -> Iterator[Piece]:
        """Run a window; yields what `edge_fleet.devices.evaluator.join` puts together."""
        yield from split(self._agent.score(window))

    def answer(self, line: int, item: Item) -> ItemResult:
        """See `EvaluationAgent.answer`."""
        return self._agent.answer(line, item)


class RaySeat:
    """A `edge_fleet.devices.evaluation.Seat`.

    Args:
        name: of the device, which must be there.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = (
            ray.remote(EvaluationActor)
            .options(num_cpus=0, resources={device_resource(name): _SHARE}, max_restarts=0)
            .remote()
        )

    def kind(self) -> Kind:
        """See `edge_fleet.devices.evaluation.Seat`."""
        kind: Kind = self._get(self._actor.kind.remote(), _START_S)
        return kind

    def open(self, job: RemoteText | RemoteTask) -> str:
        """See `edge_fleet.devices.evaluation.Seat`."""
        engine: str = self._get(self._actor.open.remote(job))
        return engine

    def score(self, window: Sequence[int]) -> WindowResult:
        """See `edge_fleet.devices.evaluation.Seat`."""
        ask = self._actor.score.options(
            num_returns="streaming", _generator_backpressure_num_objects=_PIECES
        )
        with _translated():
            return join(ray.get(piece) for piece in ask.remote(window))

    def answer(self, line: int, item: Item) -> ItemResult:
        """See `edge_fleet.devices.evaluation.Seat`."""
        result: ItemResult = self._get(self._actor.answer.remote(line, item))
        return result

    def close(self) -> None:
        """See `edge_fleet.devices.evaluation.Seat`."""
        with contextlib.suppress(RayError):
            ray.kill(self._actor)

    def _get(self, answer: Any, timeout_s: float | None = None) -> Any:
        with _translated():
            return ray.get(answer, timeout=timeout_s)


def present(config: FleetConfig) -> set[str]:
    """Return the names of the devices that have joined."""
    resources = ray.cluster_resources()
    return {name for name in config.devices if resources.get(device_resource(name), 0) > 0}


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except GetTimeoutError as error:
        raise LostError(f"it did not begin within {_START_S:g} s") from error
    except RayTaskError as error:
        if isinstance(error.cause, EdgeError):
            raise error.cause from error
        raise BackendError(f"its evaluation failed: {error.cause!r}") from error
    except RayError as error:
        raise LostError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
