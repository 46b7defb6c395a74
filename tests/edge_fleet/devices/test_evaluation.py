"""Evaluations on devices in this process: their figures are one machine's to the bit. No Ray."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.bundle.manifest import read_manifest
from edge.engine_config import EngineConfig
from edge.errors import BundleError, ConfigError, DeadlineError
from edge_fleet.devices.evaluation import FleetComputer
from edge_fleet.devices.evaluator import (
    Content,
    EvaluationAgent,
    Kind,
    RemoteTask,
    RemoteText,
    join,
    split,
)
from edge_fleet.devices.members import LostError
from edge_lab.measure.compare import WindowResult, cache_sums
from edge_lab.measure.evaluator import ThisMachine, evaluate_task, evaluate_text
from edge_lab.measure.tasks import Item, ItemResult
from edge_lab.place import update_manifest

ENGINE = EngineConfig(backend="ort-cpu", num_threads=1)


class InProcess:
    """A `Seat` in this process, whose device dies in its nth part.

    Args:
        dies_at: number of the part, from 0; None never.
        kind: what it says of itself; None is the truth.
    """

    def __init__(self, dies_at: int | None = None, kind: Kind | None = None) -> None:
        self._agent = EvaluationAgent()
        self._dies_at, self._kind = dies_at, kind
        self.parts = 0
        self.closed = False

    def kind(self) -> Kind:
        return self._kind or self._agent.kind()

    def open(self, job: RemoteText | RemoteTask) -> str:
        return self._agent.open(pickle.loads(pickle.dumps(job)))

    def score(self, window: Sequence[int]) -> WindowResult:
        result: WindowResult = self._part(lambda: join(split(self._agent.score(window))))
        return result

    def answer(self, line: int, item: Item) -> ItemResult:
        result: ItemResult = self._part(lambda: self._agent.answer(line, item))
        return result

    def _part(self, work: Callable[[], Any]) -> Any:
        result = work()
        self.parts += 1
        if self._dies_at is not None and self.parts > self._dies_at:
            raise LostError("it was killed with the result in its hands")
        return result

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._agent.close()


@pytest.fixture
def library(tiny_bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all devices of this test keep their bundles."""
    for quant in ("int4", "fp16"):
        shutil.copytree(tiny_bundles("qwen2", quant=quant), tmp_path / "library" / quant)
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "library"))
    return tmp_path / "library"


def devices(*dies_at: int | None, **more: Any) -> FleetComputer:
    seats: dict[str, Any] = {f"d{i}": InProcess(death) for i, death in enumerate(dies_at)}
    return FleetComputer(seats, told=more.pop("told", lambda line: None), **more)


@pytest.mark.parametrize("deaths", [(None,), (None, None, None), (0, None), (0, 0, None)])
def test_a_text_comes_to_the_same_figures(library: Path, deaths: tuple[int | None, ...]):
    bundles, reference = [library / "int4", library / "fp16"], library / "fp16"
    options: dict[str, Any] = {"tokens": 700, "window": 64}
    with ThisMachine() as machine:
        wanted = evaluate_text(machine, bundles, reference, ENGINE, **options)
    told: list[str] = []
    seats = {f"d{i}": InProcess(death) for i, death in enumerate(deaths)}
    meeting = threading.Barrier(len(seats))
    for seat in seats.values():  # so each has a part, and no two die of the same one
        _wait_once(seat, meeting)
    with FleetComputer(dict(seats), told=told.append) as computer:
        found = evaluate_text(computer, bundles, reference, ENGINE, **options)
    assert json.dumps(found) == json.dumps(wanted)
    assert wanted[0]["layers"][1]["value_error"] > 0
    assert sum("is lost" in line for line in told) == len(deaths) - deaths.count(None)


@pytest.mark.parametrize("deaths", [(None, None), (1, None)])
@pytest.mark.parametrize("layout", ["choices", "number"])
def test_a_task_comes_to_the_same_answers(
    library: Path, tmp_path: Path, deaths: tuple[int | None, ...], layout: str
):
    rest = {"choices": ["the sea", "hello", "world"]} if layout == "choices" else {}
    rows = [
        {"question": f"{'the sea and ' * i}what?", "answer": i % 3 if rest else str(i), **rest}
        for i in range(9)
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {"temperature": 0.8, "max_tokens": 12} if layout == "number" else {}
    arguments = ([library / "int4"], library / "fp16", ENGINE, task)
    with ThisMachine() as machine:
        wanted = evaluate_task(machine, *arguments, **options)
    with devices(*deaths) as computer:
        found = evaluate_task(computer, *arguments, **options)
    assert json.dumps(found) == json.dumps(wanted)
    assert wanted[0]["items"] == len(rows)


def test_every_device_works_and_only_those_that_are_left(library: Path):
    seats = {"a": InProcess(), "b": InProcess()}
    meeting = threading.Barrier(2)
    for seat in seats.values():  # the first part of each waits for the other's
        _wait_once(seat, meeting)
    with FleetComputer(dict(seats), told=lambda line: None) as computer:
        evaluate_text(computer, [library / "fp16"], None, ENGINE, tokens=640, window=64)
    assert sum(seat.parts for seat in seats.values()) == 11  # 63 scored tokens and one given each
    assert min(seat.parts for seat in seats.values()) >= 1
    assert all(seat.closed for seat in seats.values())
    with (
        devices(0, 0) as computer,
        pytest.raises(DeadlineError, match=r"lost with the same part|all devices were lost"),
    ):
        evaluate_text(computer, [library / "fp16"], None, ENGINE, tokens=640, window=64)


def _wait_once(seat: InProcess, meeting: threading.Barrier) -> None:
    score = seat.score

    def waits(window: Sequence[int]) -> WindowResult:
        if not seat.parts:
            meeting.wait(30)
        return score(window)

    seat.score = waits  # type: ignore[method-assign]


def test_devices_that_compute_differently_are_not_mixed(library: Path):
    ours = EvaluationAgent().kind()
    other = msgspec.structs.replace(ours, onnxruntime="1.0")
    older = msgspec.structs.replace(ours, edge_llm="0.0.1")

    def computer(kind: Kind, mix: bool) -> FleetComputer:
        seats: dict[str, Any] = {"a": InProcess(), "b": InProcess(kind=kind), "c": InProcess()}
        return FleetComputer(seats, mix=mix, told=lambda line: None)

    with pytest.raises(ConfigError, match=r"compute differently \(a, c: .*; b: .*1\.0.*--mix"):
        computer(other, mix=False)
    with computer(other, mix=True) as mixed:
        (found,) = evaluate_text(mixed, [library / "fp16"], None, ENGINE, tokens=100, window=64)
    assert found["engine"].endswith(", unlike devices")
    with pytest.raises(ConfigError, match="different versions of edge-llm"):
        computer(older, mix=True)


def test_a_bundle_is_found_by_what_is_in_it(library: Path, tmp_path: Path):
    given = shutil.copytree(library / "int4", tmp_path / "given")
    content = Content.of(given, read_manifest(given))
    (library / "int4").rename(library / "renamed")
    manifest = read_manifest(given)
    update_manifest(given, msgspec.structs.replace(manifest, quality={"text": {"kl_mean": 1.0}}))
    assert Content.of(given, read_manifest(given)) == content
    with devices(None) as computer:
        (found,) = evaluate_text(computer, [given], None, ENGINE, tokens=100, window=64)
    assert found["tokens"] == 100
    shutil.rmtree(library / "renamed")
    (library / "broken").mkdir()
    (library / "broken" / "manifest.json").write_text("{")
    with devices(None, None) as computer, pytest.raises(BundleError) as info:
        evaluate_text(computer, [given], None, ENGINE, tokens=100, window=64)
    said = str(info.value)
    for name in ("d0", "d1"):
        assert f"{name}: there is no bundle with the content of {content}" in said
    assert "only broken (unreadable: " in said
    assert str(Content.of(library / "fp16", read_manifest(library / "fp16"))) in said
    assert str(library) in said


def test_a_device_that_is_lost_before_it_opens_is_left_out(library: Path):
    seats: dict[str, Any] = {"a": InProcess(), "b": InProcess()}

    def gone(job: RemoteText | RemoteTask) -> str:
        raise LostError("no route")

    seats["a"].open = gone
    told: list[str] = []
    with FleetComputer(dict(seats), told=told.append) as computer:
        evaluate_text(computer, [library / "fp16"], None, ENGINE, tokens=100, window=64)
    assert told[-1] == "a is lost, the others go on: no route"
    assert seats["a"].parts == 0
    assert seats["a"].closed
    with pytest.raises(DeadlineError, match="no device of the fleet is there"):
        FleetComputer({}, told=told.append)


def test_progress_counts_what_is_done(library: Path):
    seen: list[tuple[str, float, float]] = []

    def progress(step: str, done: float, total: float, unit: str = "", detail: str = "") -> None:
        seen.append((step, done, total))

    with devices(1, None) as computer:
        evaluate_text(
            computer, [library / "fp16"], None, ENGINE, tokens=640, window=64, progress=progress
        )
    scored = [done for step, done, total in seen if step == "fp16: score" and total == 640]
    assert scored[0] == 0
    assert scored == sorted(scored)
    assert scored[-1] == 640


def test_a_result_travels_a_layer_at_a_time():
    random = np.random.RandomState(0)
    caches = random.standard_normal((2, 8, 2, 30, 4))
    columns = random.standard_normal((5, 30))
    result = WindowResult((30,), columns, cache_sums(caches[0], caches[1]))
    pieces = list(split(result))
    assert len(pieces) == 1 + 4
    found = join(pieces)
    assert found.cache is not None
    assert result.cache is not None
    np.testing.assert_array_equal(found.cache.keys, result.cache.keys)
    np.testing.assert_array_equal(found.cache.values, result.cache.values)
    assert found.cache.errors() == result.cache.errors()
    bare = WindowResult((30,), columns, None)
    assert join(split(bare)) is bare
