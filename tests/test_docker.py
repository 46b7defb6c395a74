"""The container files, as far as they can be checked without a container engine."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click import Context

from edge.cli import cli
from edge_serve.settings import ServerSettings
from tests.packages import PACKAGES

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker" / "jetson"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml: Any = pytest.importorskip("yaml")
    parsed: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
    return parsed


def copied(dockerfile: Path) -> set[str]:
    """What it takes from the checkout."""
    text = dockerfile.read_text("utf-8")
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    return {name for line in lines for name in line.split()}


def test_there_is_one_for_each_jetpack():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.jp62", "Dockerfile.jp72"]


def test_the_page_says_what_each_jetpack_sets_first(compose: dict[str, Any]):
    """What compose takes by default is that of one JetPack."""
    text = (DOCKER / "README.md").read_text("utf-8")
    table = text[: text.index("**Not tested:**")]
    set_first = dict(re.findall(r"`export EDGE_LLM_DOCKERFILE=(\S+) EDGE_LLM_TAG=(\S+)`", table))
    assert set(set_first) == {path.name for path in DOCKERFILES}
    for path in DOCKERFILES:
        assert f"-t edge-llm:{set_first[path.name]} ." in path.read_text("utf-8")
    taken = compose["x-edge-llm"]
    default = re.findall(r":-([\w.-]+)}", taken["build"]["dockerfile"] + taken["image"])
    assert tuple(default) in set_first.items()
    assert "docker build -f docker/jetson/$EDGE_LLM_DOCKERFILE -t edge-llm:$EDGE_LLM_TAG ." in text


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
    lock = {"jp62": "jetpack6", "jp72": "jetpack7"}[path.suffix[1:]]
    locks = re.findall(r"/src/(requirements/\S+\.txt)", text)
    assert locks == [f"requirements/{lock}.txt"]
    assert re.search(r"^RUN .*install-pycuda \S+ \\\n    \|\| echo", text, re.MULTILINE)
    for command in re.findall(r"pip install [^&]+?(?=&&|\n[A-Z#])", text):
        assert "--no-deps" in command  # nothing that no lock names
        assert "--require-hashes" in command or command.rstrip().endswith("/src")
    for name in [*locks, "requirements/pycuda.txt"]:
        packages = re.findall(r"^([\w.-]+)==", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        assert packages
        assert not any(package.startswith("tensorrt") for package in packages)  # the image has it
    sources = copied(path)
    assert all((ROOT / name).exists() for name in sources)
    # What the wheel is made of: a package that is missing breaks the help, which loads every verb.
    assert set(PACKAGES) <= sources


def test_a_build_is_sent_what_it_copies_and_nothing_else():
    """A folder of bundles takes minutes, and keys that belong to the service's user end a build."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line for line in lines if not line.startswith("#")]
    assert patterns[0] == "*"
    assert {line[1:] for line in patterns if line.startswith("!")} == set.union(
        *map(copied, DOCKERFILES)
    )
    assert [line for line in patterns[1:] if not line.startswith("!")] == ["**/__pycache__"]


def test_services_are_confined(compose: dict[str, Any]):
    for service in compose["services"].values():
        assert service["runtime"] == "nvidia"
        assert service["user"] == "10001:10001"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["logging"] == {"driver": "local"}  # json-file, the default, keeps all
    for name in ("doctor", "run", "serve"):  # only a build writes
        assert compose["services"][name]["volumes"][0].endswith(":/data:ro")
    networks = {name: service["network_mode"] for name, service in compose["services"].items()}
    assert networks == {"doctor": "none", "run": "none", "build": "none", "serve": "bridge"}


def test_the_server_is_published_on_loopback_with_keys(compose: dict[str, Any]):
    serve = compose["services"]["serve"]
    assert serve["ports"] == ["127.0.0.1:8000:8000"]
    assert serve["depends_on"] == {"doctor": {"condition": "service_completed_successfully"}}
    assert compose["services"]["doctor"]["command"][0] == "--wait-gpu"
    keys = serve["volumes"][1]
    assert keys["read_only"] is True
    assert keys["bind"] == {"create_host_path": False}  # or a missing file would become a folder
    prefix = "EDGE_LLM_SERVE_"
    given = {name[len(prefix) :].lower(): value for name, value in serve["environment"].items()}
    assert all(name.startswith(prefix) for name in serve["environment"])
    assert set(given) <= {field.name for field in fields(ServerSettings)}
    assert given["api_key_file"] == keys["target"]
    port = serve["environment"]["EDGE_LLM_SERVE_PROBE_PORT"]
    assert f":{port}/ready" in serve["healthcheck"]["test"][-1]
    assert serve["restart"] == "unless-stopped"  # on-failure leaves it down after a clean reboot
    assert serve["stop_grace_period"] == f"{ServerSettings().drain_timeout_s + 10:g}s"


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
    for name in ("doctor", "serve"):
        service = compose["services"][name]
        verb = cli.get_command(Context(cli), service["entrypoint"][1])
        assert verb is not None
        words = [re.sub(r"^/data/.*", str(DOCKER), word) for word in service["command"]]
        verb.make_context(name, words)
