"""``edge-llm watch`` against the real service: the two must speak the same language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge.errors import EXIT_GATE_MISSED
from edge_lab.cli.watch import watch
from edge_lab.measure.defaults import EVAL_TEXT
from edge_lab.measure.watch import eval_text, perplexity
from edge_lab.measure.watch_server import ServerAnswerer
from tests.conftest import Bundles, write_secret
from tests.edge_serve.scripted import running

pytestmark = pytest.mark.live

KEY = "a-key-of-the-real-service"


def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(watch, [*map(str, arguments), "--json"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    code = result.return_value
    assert isinstance(code, int)
    return code, json.loads(result.stdout)


def test_a_service_that_forgets(tiny_bundles: Bundles, tmp_path: Path):
    keys, golden = tmp_path / "keys", tmp_path / "golden.jsonl"
    write_secret(keys, f"me:{KEY}\n")
    golden.write_text(
        "".join(
            json.dumps({"id": f"q{at}", "prompt": f"Say {at}.", "answer": "yes"}) + "\n"
            for at in range(8)
        )
    )
    baseline, traffic, state = (tmp_path / f"{name}.json" for name in ("b", "t", "s"))
    with running(tiny_bundles("qwen2"), api_key_file=keys, default_model="tiny") as live:
        live.engine.default = "yes " * 60  # some go by before the answer begins
        arguments = (
            *("--server", live.url, "--api-key-file", keys, "--golden", golden),
            *("--baseline", baseline, "--traffic", traffic, "--state", state, "--record-missing"),
            *("--max-tokens", "16", "--text-tokens", "64"),
        )
        code, found = run(*arguments)
        assert code == 0
        assert found["notes"][0] == f"recorded 8 answers in {baseline}"
        code, found = run(*arguments)
        assert (code, found["alarms"]) == (0, [])
        figures = {check["name"]: check for check in found["checks"]}
        assert figures["wrong_rate"]["value"] == 0
        assert figures["perplexity"]["value"] > 1
        stats = live.ask("/stats", headers={"authorization": f"Bearer {KEY}"}).json
        assert sum(stats["requests"].values()) >= 16  # counted,
        assert stats["asked"]["requests"] == 0  # but nothing that a client asked for
        live.engine.default = "no " * 60
        code, found = run(*arguments)
        assert code == EXIT_GATE_MISSED
        assert found["alarms"] == ["wrong_rate"]
        # Clients' requests are compared; the watch's own and refused ones are not.
        assert live.chat(max_tokens=2).status == 401
        headers = {"authorization": f"Bearer {KEY}"}
        for at in range(50):
            body = {"model": "tiny", "prompt": f"Go {at}", "max_tokens": 2}
            assert live.ask("/v1/completions", body, headers=headers).status == 200
        _, found = run(*arguments)
        assert found["requests"] == 50
        assert f"recorded 50 requests in {traffic}" in found["notes"]


def test_the_choices_of_a_request_are_one_request(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2")) as live:
        assert live.chat(n=3, max_tokens=2).status == 200
        stats = live.ask("/stats").json
    assert sum(stats["requests"].values()) == 3  # sequences
    assert stats["asked"]["requests"] == 1


def test_perplexity_through_the_service_is_that_of_the_bundle(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2")) as live:
        server = ServerAnswerer(live.url, model="tiny")
        text = server.eval_text(EVAL_TEXT, 1200)
        inside = eval_text(live.engine.llm, EVAL_TEXT, 1200)
        # One place of each window is left for the answer; each begins with the begin token.
        assert [len(window) for window in text.windows] == [511, 511, 181]
        served, direct = ([i for w in t.windows for i in w[1:]] for t in (text, inside))
        assert served == direct
        assert (text.sha256, text.name) == (inside.sha256, inside.name)
        found = server.perplexity(text)
        assert found == pytest.approx(perplexity(live.engine.llm, text), rel=1e-6)
        assert found > 10  # random logits know nothing
