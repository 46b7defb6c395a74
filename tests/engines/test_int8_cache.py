"""The 8-bit cache of a bundle, compiled by TensorRT for RTX on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge.errors import BuildError, EdgeError
from engines.build_plan import plan_build
from engines.builder.fallbacks import scales_to_try
from engines.check.check import check_bundle
from engines.config import BuildConfig
from engines.graph.adapt import has_half_scales, prepare_graph, widen_scales
from engines.rules.bundle import check_bundle_rules
from engines.rules.check import check_graph
from engines.rules.table import VERSIONS
from tests.conftest import Bundles
from tests.makers.tiny_models import Kind


def build_plan(bundle: Path, **options: Any) -> Any:
    from edge.bundle.manifest import read_manifest

    config = BuildConfig(bundle, **{"max_prefill": 32, **options})
    return plan_build(config, read_manifest(bundle))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "quant", "options"),
    [
        ("qwen2", "fp16", {"max_batch": 4}),
        ("llama", "int4", {"kv_capacity": 64}),
        ("qwen3", "bf16", {"kv_buckets": (32, 128)}),
    ],
)
def test_it_compiles_and_passes_the_audit(
    kind: Kind, quant: str, options: dict[str, Any], tiny_bundles: Bundles
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = tiny_bundles(kind, "portable", quant, "int8")
    report = check_bundle(BuildConfig(bundle, max_prefill=32, **options))
    assert report.problems == ()
    assert report.plan_bytes > 0


def test_the_native_dialect_is_refused_before_anything_is_built(tiny_bundles: Bundles) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = tiny_bundles("qwen2", "native", kv_cache="int8")
    with pytest.raises((BuildError, EdgeError), match="cache and update are of one float type"):
        check_bundle(BuildConfig(bundle, max_prefill=32))


def test_int8_missing_from_the_operator_list_is_a_warning(tiny_bundles: Bundles) -> None:
    def warned(bundle: Path) -> dict[str, int]:
        verdicts = check_bundle_rules(bundle, list(VERSIONS))
        return {
            verdict.version.name: len(finding.nodes)
            for verdict in verdicts
            for finding in verdict.findings
            if finding.rule == "int8-moved" and not finding.refused
        }

    found = warned(tiny_bundles("qwen2", "portable", kv_cache="int8"))
    assert set(found) == {version.name for version in VERSIONS if version.flavour == "tensorrt"}
    assert all(found.values())
    assert warned(tiny_bundles("qwen2", "portable")) == {}


def test_the_strictest_version_takes_wide_scales(tiny_bundles: Bundles) -> None:
    """10.16 refuses INT8 with scales of 16 bits; the build's last rung widens the cache's, too."""
    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    asked = build_plan(bundle)
    assert scales_to_try(asked) == ("stored", "fp32")
    stored = prepare_graph((bundle / "decoder.onnx").read_bytes(), asked.shapes, "slice")
    assert has_half_scales(stored)
    wide = widen_scales(stored, bundle)
    assert not has_half_scales(wide)

    def refusing(graph: bytes) -> set[str]:
        verdicts = check_graph(graph, bundle, VERSIONS)
        return {verdict.version.name for verdict in verdicts if not verdict.legal}

    assert refusing(stored) == {"10.16"}
    assert refusing(wide) == set()
    plain = tiny_bundles("qwen2", "portable")
    assert scales_to_try(build_plan(plain)) == ("stored",)
