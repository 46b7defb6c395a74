"""The manifests: held against Kubernetes' own schemas, and their settings against the server."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from edge_serve.cli.serve import serve
from edge_serve.config_file import load_settings
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles
from tests.edge_serve.http.test_connections import chat_request
from tests.edge_serve.scripted import running, until

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[3]
MANIFESTS = ROOT / "edge_fleet" / "kubernetes"
VERSIONS = ("1.28", "1.34")


def _documents() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="manifests need kubernetes-validate")
    listed = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text("utf-8"))["resources"]
    found = {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) == found
    return [yaml.safe_load((MANIFESTS / name).read_text("utf-8")) for name in listed]


def _devices() -> dict[str, Any]:
    (found,) = (each for each in _documents() if each["kind"] == "DaemonSet")
    spec: dict[str, Any] = found["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them(version: str):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="manifests need kubernetes-validate"
    )
    for document in _documents():
        validate.validate(document, version, strict=True)
    broken = next(each for each in _documents() if each["kind"] == "DaemonSet")
    broken["spec"]["template"]["spec"]["containers"][0]["nonsense"] = 1
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, version, strict=True)


def test_the_server_takes_its_settings(tiny_bundles: Bundles):
    spec = _devices()
    (container,) = spec["containers"]
    environ = {each["name"]: each["value"] for each in container["env"]}
    name, _, path = environ["EDGE_LLM_SERVE_MODEL"].partition("=")
    environ["EDGE_LLM_SERVE_MODEL"] = f"{name}={tiny_bundles('qwen2')}"
    settings = load_settings(ServerSettings, environ=environ).settings
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert path.startswith("/data/")
    assert "/data" in mounts
    assert str(settings.api_key_file).startswith("/run/edge-llm/")
    assert settings.default_model in settings.model
    assert settings.vllm_metrics
    assert settings.drain_timeout_s + 10 <= spec["terminationGracePeriodSeconds"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"http": settings.port, "probes": settings.probe_port}
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/ready", "port": "probes"}
    assert f'("127.0.0.1", {settings.probe_port}, ' in _liveness(settings.probe_port)
    serve.make_context("serve", list(container["args"][1:]))


def test_the_pod_is_confined_as_the_unit_is():
    spec = _devices()
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"]
    assert not spec["enableServiceLinks"]
    for container in (*spec["initContainers"], *spec["containers"]):
        confined = container["securityContext"]
        assert not confined["allowPrivilegeEscalation"]
        assert confined["readOnlyRootFilesystem"]
        assert confined["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
    assert all("hostPath" not in each or each["name"] == "bundles" for each in spec["volumes"])
    policy = next(each for each in _documents() if each["kind"] == "NetworkPolicy")["spec"]
    assert policy["egress"] == []
    names = [policy["podSelector"]["matchLabels"]]
    names += [each["spec"]["selector"] for each in _documents() if each["kind"] == "Service"]
    (daemon,) = (each for each in _documents() if each["kind"] == "DaemonSet")
    assert all(each == daemon["spec"]["template"]["metadata"]["labels"] for each in names)


def _liveness(port: int | None) -> str:
    """The program of the liveness probe, which asks this port."""
    python, option, program = _devices()["containers"][0]["livenessProbe"]["exec"]["command"]
    assert (python, option) == ("/opt/edge-llm/bin/python", "-c")
    assert isinstance(program, str)
    return program.replace('("127.0.0.1", 9000, ', f'("127.0.0.1", {port}, ')


def _is_alive(port: int, timeout_s: float = 5) -> bool:
    program = _liveness(port).replace("timeout=5", f"timeout={timeout_s}")
    ran = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert b"Traceback" not in ran.stderr, ran.stderr
    return ran.returncode == 0


@pytest.mark.parametrize(
    ("status", "code", "is_alive"),
    [
        (200, "", True),
        (503, "loading", True),
        (503, "draining", True),
        (503, "thermal", True),
        (503, "engine_stalled", False),
        (503, "engine_dead", False),
        (503, "loop_stalled", False),
    ],
)
def test_only_what_hangs_or_failed_is_restarted(status: int, code: str, is_alive: bool):
    class Ready(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            body = b'{"error": {"code": "%s"}}' % code.encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        port = server.server_address[1]
        threading.Thread(target=server.handle_request).start()
        assert _is_alive(port) == is_alive
    assert not _is_alive(port)  # nobody listens


def test_a_busy_server_is_not_restarted():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert _is_alive(port, 0.2)  # it says nothing in time

        def cut() -> None:
            server.accept()[0].close()

        threading.Thread(target=cut).start()
        assert _is_alive(port)


def test_a_real_server_that_hangs_is_restarted(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2"), probe_port=0, stall_s=0.3) as live:
        assert live.service.probes is not None
        port = live.service.probes.port
        assert _is_alive(port)
        live.engine.running.clear()
        with closing(live.connect()) as sock:
            sock.sendall(chat_request())
            until(lambda: not _is_alive(port))
