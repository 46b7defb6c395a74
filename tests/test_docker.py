"""The container files, as far as they can be checked without a container engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCKER = Path(__file__).parent.parent / "docker" / "jetson"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml: Any = pytest.importorskip("yaml")
    parsed: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
    return parsed


def test_there_is_one_for_each_jetpack():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.jp62", "Dockerfile.jp72"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_stages_are_pinned_and_not_root(path: Path):
    text = path.read_text("utf-8")
    images = re.findall(r"^ARG \w*IMAGE=(\S+)$", text, re.MULTILINE)
    assert images
    assert all(re.search(r":(r?\d[\w.-]*)$", image) for image in images)
    assert "latest" not in text
    assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE) == ["build", "runtime"]
    runtime = text.split(" AS runtime")[1]
    assert re.search(r"^USER 10001:10001$", runtime, re.MULTILINE)
    assert 'ENTRYPOINT ["edge-llm"]' in runtime
    assert "g++" not in runtime
    for package in re.findall(r"(?:pycuda|cuda-bindings)\S*", text):
        assert re.fullmatch(r"[\w-]+==[\d.]+", package)
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((DOCKER.parent.parent / name).exists() for name in source.split())


def test_services_are_confined(compose: dict[str, Any]):
    for service in compose["services"].values():
        assert service["runtime"] == "nvidia"
        assert service["user"] == "10001:10001"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "healthcheck" not in service  # there is no server to ask
    (volume,) = compose["services"]["run"]["volumes"]
    assert volume.endswith(":ro")


def test_services_run_real_verbs(compose: dict[str, Any]):
    verbs = set(
        re.findall(
            r'^([\w-]+) = "\w', (DOCKER.parents[1] / "pyproject.toml").read_text(), re.MULTILINE
        )
    )
    for service in compose["services"].values():
        command, verb = service["entrypoint"]
        assert command == "edge-llm"
        assert verb in verbs
