"""What a build tries where it has a choice, in which order, and what it keeps of the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge.bundle.engine_file import read_engine_info, rebuild_command
from edge.bundle.manifest import read_manifest
from edge.errors import BuildError, ConfigError
from edge_lab.cli.inspect import inspect
from engines.build_plan import BuildPlan, plan_build
from engines.builder import build as build_module
from engines.builder.build import build_engine
from engines.builder.fallbacks import climb, make_rungs
from engines.builder.target import Target
from engines.cli import build
from engines.compiler import compat
from engines.compiler.compat import Compiler, TensorRT
from engines.config import BuildConfig
from engines.trtexec.command import command_for_bundle
from tests.conftest import Bundles

REASON = "no fused kernel for head_dim 16 (planted)"


def asked(bundle: Path, **options: Any) -> BuildPlan:
    return plan_build(BuildConfig(bundle, max_prefill=32, **options), read_manifest(bundle))


@pytest.mark.parametrize(
    ("dialect", "version", "options", "expected"),
    [
        ("native", "10.16", {}, ["slice decomposed"]),
        ("native", "10.16", {"attention": "fused"}, ["slice fused"]),
        ("native", "10.16", {"kv_read": "full"}, ["full decomposed"]),
        ("native", "10.16", {"kv_read": "auto"}, ["slice decomposed", "full decomposed"]),
        (
            "native",
            "11.4",
            {"kv_read": "auto", "attention": "decomposed"},
            ["slice decomposed", "full decomposed", "lengths decomposed"],
        ),
        ("portable", "10.3", {}, ["slice None"]),
        ("portable", "11.4", {"kv_read": "auto"}, ["slice None", "full None"]),
    ],
)
def test_the_rungs_and_their_order(
    tiny_bundles: Bundles,
    dialect: str,
    version: str,
    options: dict[str, Any],
    expected: list[str],
) -> None:
    plan = asked(tiny_bundles("qwen2", dialect), **options)
    rungs = make_rungs(plan, TensorRT(None, "tensorrt", version))
    assert [f"{rung.kv_read} {rung.attention}" for rung in rungs] == expected
    for rung in rungs:
        # Of `slice` alone there are several numbers of rows.
        assert (len(rung.shapes.kv_buckets) == 1) or rung.kv_read == "slice"
        assert rung.config.max_prefill == 32


@pytest.mark.parametrize("version", ["10.3", "10.13"])
def test_own_attention_is_tried_before_tensorrts(tiny_bundles: Bundles, version: str) -> None:
    rt = TensorRT(None, "tensorrt", version)
    plan = asked(tiny_bundles("qwen2", "portable"), kernels="own")
    assert [rung.attention for rung in make_rungs(plan, rt)] == ["own", None]
    named = asked(tiny_bundles("qwen2", "portable"), kernels="own", attention="own")
    assert [rung.attention for rung in make_rungs(named, rt)] == ["own"]


def test_the_first_that_is_built_is_taken(tiny_bundles: Bundles) -> None:
    plan = asked(tiny_bundles("qwen2", "native"), kv_read="auto")
    rungs = make_rungs(plan, TensorRT(None, "tensorrt", "10.16"))

    def attempt(rung: BuildPlan) -> str:
        if rung.kv_read == "slice":
            raise BuildError(f"{REASON} {rung.kv_read}")
        return f"{rung.kv_read} {rung.attention}"

    built, climbed = climb(plan, rungs, attempt)
    assert built == "full decomposed"
    assert climbed.build is rungs[1]
    assert [each.reason for each in climbed.refused] == [f"{REASON} slice"]
    assert climbed.options["kv_read"] == "auto"  # what a rebuild repeats is the question


def test_nothing_built_tells_every_reason_once(tiny_bundles: Bundles) -> None:
    plan = asked(tiny_bundles("qwen2", "native"), kv_read="auto")
    rungs = make_rungs(plan, TensorRT(None, "tensorrt", "10.16"))

    def differing(rung: BuildPlan) -> str:
        raise BuildError(f"reason of {rung.kv_read}")

    def alike(rung: BuildPlan) -> str:
        raise BuildError("the graph is of no use")

    with pytest.raises(BuildError, match=r"none of 2 variants.*reason of slice.*of full"):
        climb(plan, rungs, differing)
    with pytest.raises(BuildError, match=r"\Athe graph is of no use\Z"):
        climb(plan, rungs, alike)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Target:
    """TensorRT for RTX with two faults more: no attention in one kernel, no slice of a cache."""
    pytest.importorskip("tensorrt_rtx")
    parse, build = Compiler.parse, Compiler.build

    def refuse_slice(self: Compiler, graph: bytes, path: Path, kv_read: str, *args: Any) -> Any:
        if kv_read == "slice":
            raise BuildError(REASON)
        return parse(self, graph, path, kv_read, *args)  # type: ignore[arg-type]

    def refuse(self: Compiler, *args: Any, **kwargs: Any) -> Any:
        if not all(each.decomposable for each in self._attentions().values()):
            raise BuildError(REASON)
        return build(self, *args, **kwargs)

    monkeypatch.setattr(Compiler, "parse", refuse_slice)
    monkeypatch.setattr(Compiler, "build", refuse)
    target = Target(compat.load("tensorrt-rtx"), None, "8.6")
    monkeypatch.setattr(build_module, "find_target", lambda **_options: target)
    return target


def run(command: Any, *arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False)


def test_the_record_says_what_was_refused_and_what_was_taken(
    bundle: Path, refusing: Target
) -> None:
    arguments = [str(bundle), "--max-prefill", "32", "--kv-read", "auto", "--json"]
    result = json.loads(run(build, *arguments).stdout)
    assert (result["attention"], result["kv_read"]) == ("decomposed", "full")
    (refused,) = result["refused"]
    assert refused == {
        "kv_read": "slice",
        "attention": "decomposed",
        "reason": REASON,
        "scales": "stored",
        "kernels": "tensorrt",
    }
    directory = Path(result["engine"])
    info = read_engine_info(directory)
    assert (info.attention, info.kv_read) == ("decomposed", "full")
    assert [each.reason for each in info.refused] == [REASON]
    log = (directory / "build.log").read_text()
    assert log.index("decomposed, cache read as slice") < log.index(
        "decomposed, cache read as full"
    )
    assert REASON in " ".join(run(inspect, str(directory)).stdout.split())
    assert "--kv-read auto --attention auto" in rebuild_command(directory, info)
    assert not build_engine(
        BuildConfig(bundle, max_prefill=32, kv_read="auto"), target=refusing
    ).built


def test_an_explicit_choice_fails_with_the_reason(bundle: Path, refusing: Target) -> None:
    with pytest.raises(BuildError, match=r"\Ano fused kernel"):
        run(build, str(bundle), "--max-prefill", "32", "--attention", "fused", "--kv-read", "full")
    assert not list((bundle / "engines").glob("*/engine.json"))


def test_a_choice_that_builds_first_lists_no_refusals(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    target = Target(compat.load("tensorrt-rtx"), None, "8.6")
    info = build_engine(BuildConfig(bundle, max_prefill=32, kv_read="auto"), target=target).info
    assert (info.kv_read, info.attention, info.refused) == ("slice", "decomposed", ())
    assert info.options["kv_read"] == "auto"


@pytest.mark.parametrize("options", [{"kv_read": "auto"}, {"attention": "fused"}, {"tune": True}])
def test_trtexec_has_no_such_choice(bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs the Python API"):
        command_for_bundle(BuildConfig(bundle, max_prefill=32, **options), (10, 16))


def test_options_that_make_no_sense(tiny_bundles: Bundles) -> None:
    with pytest.raises(ConfigError, match="none of auto, fused, decomposed"):
        BuildConfig(Path(), attention="flash")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="may take another way; leave one of the two out"):
        BuildConfig(Path(), kv_read="auto", kv_buckets=(128,))
    with pytest.raises(ConfigError, match=r"--attention fused .* portable does not use"):
        asked(tiny_bundles("qwen2", "portable"), attention="fused")
