from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_fleet.registry.client import Registry
from edge_fleet.registry.reference import Reference, parse_reference

from .live import LiveRegistry, write_bundle

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRegistry]:
    """A real registry; a test that ends it starts it again."""
    registry = LiveRegistry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.kill()


@pytest.fixture(autouse=True)
def no_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the machine's keys nor somebody's credentials decide what these tests see."""
    monkeypatch.delenv("EDGE_LLM_TRUSTED_KEYS", raising=False)
    monkeypatch.setattr("edge.bundle.trust.DEFAULT_KEYS", tmp_path / "no-keys")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))


@pytest.fixture
def reference(live: LiveRegistry) -> Reference:
    """A repository that no other test uses."""
    return parse_reference(f"{live.address}/team/bundle-{next(_numbers)}:v1")


@pytest.fixture
def registry(reference: Reference) -> Iterator[Registry]:
    with Registry(reference) as registry:
        yield registry


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to push; treat it as read-only."""
    return write_bundle(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[float]]:
    """No pause between two tries, only in the clock; tells how long they would have been."""
    pauses: list[float] = []
    clock = SimpleNamespace(
        sleep=pauses.append, monotonic=lambda: 1.0 + sum(pauses), strftime=time.strftime
    )
    monkeypatch.setattr("edge_fleet.registry.client.time", clock)
    return lambda: pauses
