"""Evaluates on the devices of a fleet: every window of a text, or question of a task, on one.

Here the results come together, in the order of the text or of the questions, so that the figures
are those of one machine that computes as the devices do. Devices that compute differently may
differ in the last bits, so they are refused together unless somebody says that they may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from edge.bundle.trust import open_manifest
from edge.engine_config import EngineConfig
from edge.errors import ConfigError, DeadlineError, EdgeError
from edge_lab.measure.compare import WindowResult, num_scored
from edge_lab.measure.evaluator import TaskJob, TextJob
from edge_lab.measure.tasks import Item, ItemResult
from edge_lab.progress import Progress, uncounted

from .evaluator import Content, Kind, RemoteTask, RemoteText
from .fanout import fan_out, renamed
from .members import LostError

_AHEAD = 3
"""Windows in a row, per device, of which results may wait for an earlier one: with a reference each
holds up to 100 MB."""
_Answer = TypeVar("_Answer")


class Seat(Protocol):
    """An `evaluator.EvaluationAgent` on a device; all calls raise `LostError` without it."""

    def kind(self) -> Kind:
        """See `edge_fleet.devices.evaluator.EvaluationAgent.kind`."""
        ...

    def open(self, job: RemoteText | RemoteTask) -> str:
        """See `edge_fleet.devices.evaluator.EvaluationAgent.open`."""
        ...

    def score(self, window: Sequence[int]) -> WindowResult:
        """See `edge_fleet.devices.evaluator.EvaluationAgent.score`."""
        ...

    def answer(self, line: int, item: Item) -> ItemResult:
        """See `edge_fleet.devices.evaluator.EvaluationAgent.answer`."""
        ...

    def close(self) -> None:
        """End it, whatever it does."""
        ...


class FleetComputer:
    """A `edge_lab.measure.evaluator.Computer` of devices; close it, or use it in a ``with``.

    Args:
        seats: one for each device, by its name.
        mix: let devices of different kinds compute together.
        told: is told in a line which devices compute, and which are lost.

    Raises:
        ConfigError: the devices are of different kinds, or one has another edge-llm.
        DeadlineError: there is no device.
    """

    def __init__(
        self, seats: dict[str, Seat], *, mix: bool = False, told: Callable[[str], None]
    ) -> None:
        self._seats, self._told = seats, told
        try:
            kinds = self._all(lambda seat: seat.kind())
            self._mixed = _check_kinds(kinds, mix)
        except BaseException:
            self.close()
            raise
        for kind in dict.fromkeys(kinds.values()):
            told(f"on {', '.join(name for name in kinds if kinds[name] == kind)}: {kind}")

    def __enter__(self) -> FleetComputer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the devices."""
        for seat in self._seats.values():
            seat.close()

    def score(
        self, job: TextJob, windows: Sequence[Sequence[int]], progress: Progress
    ) -> tuple[str, Iterator[WindowResult]]:
        """See `edge_lab.measure.evaluator.Computer.score`."""
        reference = None if job.reference is None else _content(job.reference, job.engine)
        bundle = _content(job.bundle, job.engine)
        name = self._open(
            RemoteText(bundle, reference, job.window, _of_devices(job.engine)), progress
        )
        return name, self._scored(windows, progress)

    def _scored(
        self, windows: Sequence[Sequence[int]], progress: Progress
    ) -> Iterator[WindowResult]:
        done, total = 0, num_scored(windows)

        def count(window: Sequence[int]) -> None:
            nonlocal done
            done += len(window) - 1
            progress("score", done, total, "tokens")

        progress("score", 0, total, "tokens")
        return fan_out(
            windows,
            {name: seat.score for name, seat in self._seats.items()},
            ahead=_AHEAD * len(self._seats),
            lost=self._lose,
            done=count,
            late=self._say_late,
        )

    def answer(
        self, job: TaskJob, items: Sequence[tuple[int, Item]], progress: Progress
    ) -> list[ItemResult]:
        """See `edge_lab.measure.evaluator.Computer.answer`."""
        bundle = _content(job.bundle, job.engine)
        engine = _of_devices(job.engine)
        self._open(RemoteTask(bundle, engine, job.scoring, job.params, job.file), progress)
        done = 0

        def count(_: tuple[int, Item]) -> None:
            nonlocal done
            done += 1
            progress("answer", done, len(items), "questions")

        def worker(seat: Seat) -> Callable[[tuple[int, Item]], ItemResult]:
            return lambda part: seat.answer(*part)

        progress("answer", 0, len(items), "questions")
        workers = {name: worker(seat) for name, seat in self._seats.items()}
        return list(
            fan_out(
                items,
                workers,
                ahead=len(items),
                lost=self._lose,
                done=count,
                late=self._say_late,
            )
        )

    def _open(self, job: RemoteText | RemoteTask, progress: Progress) -> str:
        with uncounted(progress, "open"):
            names = set(self._all(lambda seat: seat.open(job)).values())
        if len(names) > 1 and not self._mixed:
            raise ConfigError(f"the devices opened it with {', '.join(sorted(names))}; {_MIX}")
        return " and ".join(sorted(names)) + (", unlike devices" if self._mixed else "")

    def _all(self, ask: Callable[[Seat], _Answer]) -> dict[str, _Answer]:
        """Ask all devices at once; those that are lost are left out from then on."""
        answers: dict[str, _Answer] = {}
        errors: dict[str, EdgeError] = {}
        with ThreadPoolExecutor(max(1, len(self._seats))) as pool:
            asked = {name: pool.submit(ask, seat) for name, seat in self._seats.items()}
            for name, answer in asked.items():
                try:
                    answers[name] = answer.result()
                except LostError as error:
                    self._lose(name, error)
                except EdgeError as error:
                    errors[name] = error
        if errors:
            said = "; ".join(f"{name}: {error}" for name, error in errors.items())
            raise renamed(next(iter(errors.values())), said)
        if not answers:
            raise DeadlineError(
                "no device of the fleet is there to compute; look at edge-llm fleet status, and "
                "run edge-llm fleet join on the devices"
            )
        return answers

    def _say_late(self, name: str, other: str) -> None:
        self._told(f"{name} is late with its part; {other} computes it, too")

    def _lose(self, name: str, error: LostError) -> None:
        self._told(f"{name} is lost, the others go on: {error}")
        self._seats.pop(name).close()


_MIX = (
    "their numbers may differ in the last digits: choose devices of one kind with --device, or say "
    "--mix"
)


def _check_kinds(kinds: dict[str, Kind], mix: bool) -> bool:
    """Return whether the devices are of different kinds."""
    found = {kind: [name for name in kinds if kinds[name] == kind] for kind in kinds.values()}
    listed = "; ".join(f"{', '.join(names)}: {kind}" for kind, names in found.items())
    if len({kind.edge_llm for kind in found}) > 1:
        raise ConfigError(f"the devices have different versions of edge-llm: {listed}; install one")
    if len(found) > 1 and not mix:
        raise ConfigError(f"the devices compute differently ({listed}), so {_MIX}")
    return len(found) > 1


def _content(bundle: Path, engine: EngineConfig) -> Content:
    return Content.of(bundle, open_manifest(bundle, engine.trusted_keys))


def _of_devices(engine: EngineConfig) -> EngineConfig:
    """Take over what changes numbers; keys and files are the devices' own."""
    return EngineConfig(
        backend="ort-cpu",
        num_threads=engine.num_threads,
        int8_activations=engine.int8_activations,
    )
