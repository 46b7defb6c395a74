"""Every name that a verb prints is taken by every verb that takes such a name."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge import DeepSeekModel
from edge.bundle.library import CATALOGUE
from edge.bundle.model_names import bundle_name
from edge.errors import BundleError
from edge_lab.planner.devices import MODULES
from tests.command_line import Result, edge_llm  # noqa: F401

EdgeLlm = Callable[..., Result]
NAME = re.compile(r"deepseek-r1:[\w.-]*\w|DeepSeek-R1-[\w.-]*\w|deepseek-ai/[\w.-]*\w")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def printed(run: EdgeLlm) -> Iterator[str]:
    """What the verbs print of models: results, refusals and help."""
    for words in (
        "list",
        "recommend --memory 4GB",
        "recommend --memory 1GB",
        *(f"plan {name}" for name in CATALOGUE),
        "recommend --model gemma",
        "plan 1.5b",
        "plan 8b",
        "plan gemma",
        "run 8b hello",
        "pull 8b",
        "pull gemma",
        "export r1-qwen -o x",
        "pull --help",
        "plan --help",
        "export --help",
        "--help",
    ):
        done = run(*words.split())
        yield done.out + done.err


@pytest.mark.slow
def test_names_of_models(edge_llm: EdgeLlm, root: Path):  # noqa: F811
    found = set(NAME.findall("\n".join(printed(edge_llm))))
    assert found >= {*CATALOGUE, *CATALOGUE.values()}
    planned: dict[str, set[str]] = {}
    for name in sorted(found):
        plan = json.loads(edge_llm("plan", name, "--quant", "int4", "--json").out)
        chosen = json.loads(edge_llm("recommend", "--model", name, "--json").out)
        assert {row["model"] for row in chosen["candidates"]} == {plan["model"]}
        source = CATALOGUE[plan["model"]]
        pulled = edge_llm("pull", name).err.splitlines()[0]
        target = root / bundle_name(source, "int4")
        assert shlex.split(pulled)[:6] == ["$", "edge-llm", "export", source, "-o", str(target)]
        # Nothing is downloaded here; that it is looked for on the hub shows that it was known.
        assert "offline" in edge_llm("export", name, "-o", str(root / "x")).err.lower(), name
        with pytest.raises(BundleError, match=f"edge-llm export {source} "):
            DeepSeekModel(name, "int4")
        planned.setdefault(plan["model"], set()).add(name)
    assert set(planned) == set(CATALOGUE)


@pytest.mark.slow
def test_names_of_precisions(edge_llm: EdgeLlm, root: Path):  # noqa: F811
    chosen = json.loads(edge_llm("recommend", "--json").out)
    names = {row["quant"] for row in chosen["candidates"]}
    assert names == {"fp16", "int8", "int8-w8a8", "int4"}
    for name in sorted(names):
        for spelling in (name, name.upper(), name.replace("-", "_")):
            plan = json.loads(edge_llm("plan", "1.5b", "--quant", spelling, "--json").out)
            assert [option["quant"] for option in plan["options"]] == [name]
            (root / (kept := bundle_name(CATALOGUE["deepseek-r1:7b"], name))).mkdir(exist_ok=True)
            pulled = edge_llm("pull", "1.5b", "--quant", spelling).err.splitlines()[0]
            assert str(root / bundle_name(CATALOGUE["deepseek-r1:1.5b"], name)) in pulled
            with pytest.raises(BundleError, match=f"no bundle at {root / kept}: cannot read"):
                DeepSeekModel("7B", spelling)


@pytest.mark.slow
def test_names_of_devices(edge_llm: EdgeLlm, root: Path):  # noqa: F811
    help_text = edge_llm("plan", "--help").out
    refused = edge_llm("plan", "1.5b", "--device", "tx2").err
    for text in (help_text, refused):
        names = set(re.findall(r"\b(?:agx|orin)-[a-z0-9-]+\b|\bcpu\b", text))
        assert names >= {*MODULES, "cpu"}
        for name in sorted(names):
            found = json.loads(edge_llm("plan", "1.5b", "--device", name, "--json").out)["device"]
            assert found.startswith(name)
            if name != "cpu":
                assert edge_llm("recommend", "--device", name, "--json").code in (0, 3)
