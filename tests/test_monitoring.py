"""The alerts and the dashboard in docs/monitoring, against what a server really exposes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_lab.telemetry import Snapshot
from tests.conftest import Bundles
from tests.edge_serve.scripted import Live, running
from tests.ports import free_port

pytestmark = pytest.mark.live

FOLDER = Path(__file__).parent.parent / "docs/monitoring"
ALERTS = FOLDER / "prometheus-alerts.yml"
WAIT_S = 30
SEEN = Snapshot(
    gpu_load_ratio=0.5,
    memory_total_bytes=8 << 30,
    memory_available_bytes=4 << 30,
    process_rss_bytes=1 << 30,
    temperatures_celsius={"gpu": 60.0},
    module_power_watts=12.0,
    throttled=False,
)
# Nothing is refused and no window of requests is full within this test.
EMPTY = {"edgellm_rejections_total", "edgellm_sampling_drift_psi"}


def queries() -> list[str]:
    """Every query of the dashboard, as Grafana would send it."""
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [one.replace("$__rate_interval", "10s").replace("$instance", ".*") for one in found]


def names(text: str) -> set[str]:
    return set(re.findall(r"\bedgellm_\w+", text))


@pytest.fixture(scope="module")
def server(tiny_bundles: Bundles) -> Iterator[Live]:
    with running(tiny_bundles("qwen2"), telemetry=lambda: SEEN) as live:
        live.engine.default = "a few words"
        yield live


def test_every_metric_that_is_named_is_exposed(server: Live):
    assert server.chat(max_tokens=4).status == 200
    text = server.ask("/metrics").body.decode()
    exposed = names(text)
    exposed |= {f"{name}_total" for name in re.findall(r"# TYPE (\w+) counter", text)}
    named = names(ALERTS.read_text()) | names("\n".join(queries()))
    assert len(named) > 20
    assert named <= exposed


@contextmanager
def prometheus(server: Live, folder: Path) -> Iterator[Callable[[str], Any]]:
    """Debian's Prometheus, which looks at the server every second; yields what asks its API."""
    port = free_port()
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {"job_name": "edge-llm", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}
        ],
    }
    config = folder / "prometheus.yml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    command = [
        *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=5) as answer:
            return json.loads(answer.read())["data"]

    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            until(lambda: _answers(ask), folder / "log")
            yield ask
        finally:
            process.terminate()


def _answers(ask: Callable[[str], Any]) -> bool:
    try:
        return any(one["health"] == "up" for one in ask("targets")["activeTargets"])
    except OSError:
        return False


def until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


def test_prometheus_takes_the_printed_settings(tmp_path: Path):
    if shutil.which("promtool") is None:
        pytest.skip("needs Debian's package prometheus")
    text = (FOLDER.parent / "service.md").read_text("utf-8")
    [printed] = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "prometheus.yml").write_text(printed)
    shutil.copy(ALERTS, tmp_path)
    command = ("promtool", "check", "config", "--syntax-only", tmp_path / "prometheus.yml")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r'job="([^"]+)"', ALERTS.read_text())) == {
        *re.findall(r"job_name: (\S+)", printed)
    }
    assert "credentials_file: " in printed  # the installer always makes keys


def test_prometheus_takes_the_alerts_and_answers_the_dashboard(server: Live, tmp_path: Path):
    if shutil.which("prometheus") is None:
        pytest.skip("needs Debian's package prometheus")
    with prometheus(server, tmp_path) as ask:

        def result(query: str) -> list[Any]:
            found: list[Any] = ask(f"query?query={urllib.parse.quote(query)}")["result"]
            return found

        # A rate needs two looks at a counter that is there.
        until(lambda: server.chat(max_tokens=4).status == 200, tmp_path / "log")
        ends = "edgellm_requests_total"
        until(lambda: bool(result(f"count_over_time({ends}[10s]) > 1")), tmp_path / "log")
        server.chat(max_tokens=4)
        empty = {query for query in queries() if not result(query)}
        assert {name for query in empty for name in names(query)} <= EMPTY

        def all_ran() -> bool:
            (group,) = ask("rules")["groups"]
            return all(rule["health"] != "unknown" for rule in group["rules"])

        until(all_ran, tmp_path / "log")
        (group,) = ask("rules")["groups"]
        assert [rule["name"] for rule in group["rules"] if rule["health"] != "ok"] == []
        assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []
        server.engine.backend.failed = "cudaErrorIllegalAddress"
        until(lambda: bool(result('ALERTS{alertname="EdgeLLMEngineFailed"}')), tmp_path / "log")
