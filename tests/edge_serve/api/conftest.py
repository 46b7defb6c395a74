"""Services that the protocols ask alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edge_serve.api.weather import ANSWER, CALL, CALLING, QUESTION, THINKING, WEATHER
from tests.edge_serve.scripted import Live, running


@pytest.fixture
def says_answer(request: pytest.FixtureRequest) -> None:
    """A test's `live` answers the question."""
    if "live" in request.fixturenames:
        request.getfixturevalue("live").engine.say(QUESTION, ANSWER)


@pytest.fixture(scope="module")
def tools(tool_bundle: Path) -> Iterator[Live]:
    with running(tool_bundle) as live:
        yield live


@pytest.fixture(scope="module")
def served(tool_bundle: Path, client_keys: Path) -> Iterator[Live]:
    """For clients that others wrote: it wants `KEY`."""
    with running(tool_bundle, api_key_file=client_keys) as live:
        live.engine.say(QUESTION, "<think>\nhm\n</think>\n\nHello there.")
        yield live


@pytest.fixture(scope="module")
def service(tool_bundle: Path) -> Iterator[Live]:
    """For tests of every field: two calls, and thoughts."""
    pytest.importorskip("llguidance")
    with running(tool_bundle, llm={"kv_capacity": 1024, "reuse_prefix": False}) as live:
        live.engine.say(CALLING, f"{CALL}\n{CALL}", tools=[WEATHER])
        live.engine.say(THINKING, "<think>hm hm hm</think>yes")
        yield live
