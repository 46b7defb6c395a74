"""The 8-bit KV cache on ONNX Runtime: both dialects, both forms of attention, refusals."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edge.backends.ort import session
from edge.backends.ort.gpu import OrtCudaBackend
from edge.backends.step import step_after
from edge.bundle import io_spec
from edge.bundle.kv_scales import dequantize_rows, quantize_rows
from edge.bundle.manifest import read_manifest
from edge.errors import BackendError, DependencyError
from edge.logprobs import log_softmax
from edge_lab.measure.divergence import kl_divergence
from tests.conftest import Bundles, require_even_rows, require_int8_cache
from tests.edge.backends.ort.test_cpu_attention import ATOL, export_heads
from tests.edge.backends.runner import Runner, history, random_ids
from tests.makers.manifests import as_written_before_scales
from tests.makers.tiny_models import KINDS, Kind
from tests.standins.slot_rows import by_name, stacked, tensor_name

DIALECTS = ("native", "portable")
# Tiny random models are worse at this than real ones: their heads have 16 or 32 channels to
# average an error over. Measured with these tokens: 0.002 to 0.011.
MEAN_KL = 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_operator_computes_what_the_graph_says(kind: Kind, tiny_bundles: Bundles) -> None:
    """Also where the two round."""
    require_int8_cache("native")
    bundle = tiny_bundles(kind, "native", kv_cache="int8")
    with Runner(bundle) as fused, Runner(bundle, fuse_attention=False) as plain:
        ours, theirs = history(fused), history(plain)
    assert_same_history(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_both_dialects_compute_the_same(kind: Kind, tiny_bundles: Bundles) -> None:
    require_int8_cache("native")
    found = []
    for dialect in DIALECTS:
        with Runner(tiny_bundles(kind, dialect, kv_cache="int8")) as runner:
            found.append(history(runner))
    assert_same_history(*found)


def test_a_bundle_without_scales_in_its_manifest_computes_the_same(
    tiny_bundles: Bundles, tmp_path: Path
) -> None:
    newer, older = tiny_bundles("qwen2", "portable", kv_cache="int8"), tmp_path / "bundle"
    shutil.copytree(newer, older)
    as_written_before_scales(older)
    with Runner(newer) as ours, Runner(older) as theirs:
        for one, other in zip(history(ours), history(theirs), strict=True):
            assert_array_equal(one, other)


def test_heads_that_the_operator_does_not_take(tmp_path: Path) -> None:
    require_int8_cache("native")
    found = []
    for dialect in DIALECTS:
        with Runner(export_heads(tmp_path, "llama", 20, dialect, "int8")) as runner:
            found.append(history(runner))
    assert_same_history(*found)


def assert_same_history(ours: list[Any], theirs: list[Any]) -> None:
    """Two ways to compute the same: floats that differ in their last bit round to one integer, but
    for the few that lie between two. What follows one of those differs by as much as a step of it.
    """
    logits, caches = ours[:-4], ours[-4:]
    steps = [np.abs(one - other) for one, other in zip(logits, theirs[:-4], strict=True)]
    assert max(step.max() for step in steps) < 0.01
    assert np.median(np.concatenate([step.ravel() for step in steps])) < ATOL
    for one, other in zip(caches, theirs[-4:], strict=True):
        if one.size:
            apart = np.abs(one - other)
            assert np.mean(apart > ATOL) < 0.002
            assert apart.max() < np.abs(other).max() / 64  # a step of the largest scale, and a bit


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("quant", ["fp16", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_stay_close_to_the_float_cache(
    kind: Kind, quant: str, dialect: str, tiny_bundles: Bundles
) -> None:
    require_int8_cache(dialect)
    logits, caches, scales = [], [], {}
    for kv_cache in ("float", "int8"):
        with Runner(tiny_bundles(kind, dialect, quant, kv_cache)) as runner:
            prompt = runner.step(random_ids(1, 40), [2])[0]
            steps = [runner.step(random_ids(1, 1, seed=i), [2])[0] for i in range(20)]
            logits.append(np.concatenate([prompt, *steps]))
            caches.append(runner.cache(2))
            scales = dict(runner.backend.kv_scales)
    kl = kl_divergence(log_softmax(logits[0]), log_softmax(logits[1]))
    assert 0 < kl.mean() < MEAN_KL
    # Nothing of the first layer depends on the cache, so its rows are those of floats, rounded.
    for plane in (0, 1):
        scale = scales[tensor_name(plane)]
        codes = quantize_rows(caches[0][plane], scale)
        found = quantize_rows(caches[1][plane], scale)
        assert np.abs(codes.astype(int) - found).max() <= 1  # sums in another order
        assert (codes == found).mean() > 0.999


@pytest.mark.parametrize("dialect", DIALECTS)
def test_alone_together_and_in_chunks(dialect: str, tiny_bundles: Bundles) -> None:
    """As for a float cache: other kernels run, which sum in another order."""
    require_int8_cache(dialect)
    bundle = tiny_bundles("qwen2", dialect, kv_cache="int8")
    ids = random_ids(3, 24)
    with Runner(bundle) as runner:
        together = runner.step(ids, [0, 1, 2])
        caches = [runner.cache(slot) for slot in range(3)]
    for row in range(3):
        with Runner(bundle, num_slots=1) as alone:
            whole = alone.step(ids[row : row + 1])[0]
            assert_allclose(alone.cache(0), caches[row], atol=ATOL, rtol=0)
        with Runner(bundle, num_slots=1) as chunked:
            parts = [chunked.step(ids[row : row + 1, at : at + 7])[0] for at in range(0, 24, 7)]
        assert_allclose(whole, together[row], atol=ATOL, rtol=0)
        assert_allclose(np.concatenate(parts), together[row], atol=ATOL, rtol=0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_slots_are_read_written_and_copied_without_loss(
    dialect: str, tiny_bundles: Bundles
) -> None:
    require_int8_cache(dialect)
    with Runner(tiny_bundles("llama", dialect, kv_cache="int8")) as runner:
        runner.step(random_ids(1, 30), [0])
        rows = runner.cache(0)
        assert rows.dtype == np.float32
        runner.backend.write_slot(1, by_name(rows))
        runner.backend.copy_slot(0, 3, 30)
        for slot in (1, 3):
            assert_array_equal(stacked(runner.backend.read_slot(slot, 30)), rows)
        runner.lengths = [30, 30, 0, 30]
        token = random_ids(1, 1)
        same = [runner.step(token, [slot]) for slot in (0, 1, 3)]
        assert_array_equal(same[0], same[1])
        assert_array_equal(same[0], same[2])
        runner.backend.write_slot(
            1, by_name(np.zeros_like(rows))
        )  # as a failed sequence is scrubbed
        assert not stacked(runner.backend.read_slot(1, 30)).any()
        before = stacked(runner.backend.read_slot(3, 30))
        rows[0, 0, 0, 0] = np.nan
        with pytest.raises(BackendError, match="not finite"):
            runner.backend.write_slot(3, by_name(rows))
        assert_array_equal(stacked(runner.backend.read_slot(3, 30)), before)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_cache_takes_a_quarter(dialect: str, tiny_bundles: Bundles) -> None:
    require_int8_cache(dialect)
    sizes = {}
    for kv_cache in ("float", "int8"):
        with Runner(tiny_bundles("qwen2", dialect, kv_cache=kv_cache)) as runner:
            manifest, backend = runner.manifest, runner.backend
            sizes[kv_cache] = backend.cache_bytes
            per_token = io_spec.kv_bytes_per_token(manifest.model, "fp32", manifest.int8_layers)
            assert backend.cache_bytes == per_token * backend.capacity * backend.num_slots
    assert sizes["float"] == 4 * sizes["int8"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_layers_that_stay_in_float(
    dialect: str, tiny_checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of both kinds of layers gives rows in order, and they are written back."""
    require_int8_cache(dialect)
    from export.pipeline import ExportConfig, export_checkpoint
    from export.quantize import kv_scales

    def export(name: str) -> Path:
        output = tmp_path / name
        export_checkpoint(
            ExportConfig(
                source=str(tiny_checkpoints("qwen2")),
                output=output,
                quant="fp16",
                dialect=dialect,  # type: ignore[arg-type]
                kv_cache="int8",
                kv_capacity=64,
            )
        )
        return output

    errors = read_manifest(export("all")).kv_cache
    assert errors is not None
    worst = int(np.argmax(errors.score_errors))
    monkeypatch.setattr(kv_scales, "SCORE_LIMIT", sum(errors.score_errors) / 2)
    with Runner(export("one")) as runner, Runner(tmp_path / "all") as every:
        kept = runner.manifest.kv_cache
        assert kept is not None
        assert kept.float_layers == (worst,)
        names = [f"{1 - worst}.key", f"{1 - worst}.value"]
        assert list(runner.backend.kv_scales) == names
        ids = random_ids(1, 20)
        logits = runner.step(ids, [0])
        assert_allclose(logits, every.step(ids, [0]), atol=1.0, rtol=0)
        rows = runner.cache(0)
        for plane in (2 * worst, 2 * worst + 1):
            assert len(np.unique(rows[plane])) > 300  # no integers
        runner.backend.write_slot(1, by_name(rows))
        runner.backend.copy_slot(0, 2, 20)
        for slot in (1, 2):
            assert_array_equal(stacked(runner.backend.read_slot(slot, 20)), rows)
        runner.lengths[1] = 20
        token = random_ids(1, 1)
        assert_array_equal(runner.step(token, [0]), runner.step(token, [1]))


def test_one_operator_per_layer_with_its_scales(tiny_bundles: Bundles) -> None:
    from edge.backends.ort.cpu import load_cpu_graph

    require_int8_cache("native")
    bundle = tiny_bundles("qwen3", "native", kv_cache="int8")
    manifest = read_manifest(bundle)
    graph = load_cpu_graph(bundle, manifest, 64, fuse_attention=True, int8_activations=True)
    graph.prune()
    ops = Counter(node.op_type for node in graph.nodes)
    assert ops["GroupQueryAttention"] == manifest.model.num_layers
    assert not {"TensorScatter", "QuantizeLinear", "DequantizeLinear", "Div"} & ops.keys()
    fused = [node for node in graph.nodes if node.op_type == "GroupQueryAttention"]
    for layer, node in enumerate(fused):
        assert node.inputs[12:] == [
            io_spec.cache_scale(f"{layer}.{name}") for name in ("key", "value")
        ]


@pytest.mark.parametrize(
    ("dialect", "version", "fits"),
    [
        ("native", "1.26.0", False),
        ("native", "1.27.0", False),
        ("native", "1.28.0", True),
        ("portable", "1.23.2", True),
        ("portable", "1.22.0", False),
    ],
)
def test_an_older_onnx_runtime_is_refused(
    dialect: str, version: str, fits: bool, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    manifest = read_manifest(tiny_bundles("qwen2", dialect, kv_cache="int8"))
    if fits:
        session.import_onnxruntime(manifest, "a test needs it", "cpu")
        return
    needed = r"1\.28" if dialect == "native" else r"1\.23"
    with pytest.raises(DependencyError, match=rf"8-bit KV cache\) needs onnxruntime >= {needed}"):
        session.import_onnxruntime(manifest, "a test needs it", "cpu")


def test_onnx_runtime_on_a_gpu_refuses_it(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    with pytest.raises(DependencyError, match=r"ort-cuda has no 8-bit KV cache.*ort-cpu"):
        OrtCudaBackend(bundle, read_manifest(bundle))


def test_a_manifest_and_a_graph_that_do_not_fit(tiny_bundles: Bundles) -> None:
    from edge.errors import BundleError

    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    manifest = msgspec.structs.replace(read_manifest(bundle), kv_cache=None)
    with pytest.raises(BundleError, match=r"does not fit the decoder's contract.*int8"):
        session.load_graph(bundle / manifest.graphs.cpu, manifest, "fp32", 64)


def test_a_saturated_row_is_finite(tiny_bundles: Bundles) -> None:
    """Inputs far outside of what calibration saw: the cache clips, and nothing overflows."""
    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    with Runner(bundle) as runner:
        embeds = 1000 * np.ones((1, 6, runner.manifest.model.hidden_size), np.float32)
        logits = runner.backend.forward(step_after([0], [0], embeds, np.array([[5]])))
        assert np.isfinite(logits).all()
        rows = runner.backend.read_slot(0, 6)
        for plane, scale in runner.backend.kv_scales.items():
            codes = quantize_rows(rows[plane], scale)
            assert_array_equal(dequantize_rows(codes, scale), rows[plane])


def test_it_can_be_deterministic(tiny_bundles: Bundles) -> None:
    require_int8_cache("native")
    require_even_rows()
    bundle = tiny_bundles("qwen2", "native", "int4", "int8")
    ids = random_ids(2, 12)
    with Runner(bundle, deterministic=True) as runner:
        alone = runner.step(ids[:1], [0])
        runner.step(ids[1:], [1])
        token = random_ids(2, 1)
        together = runner.step(token, [0, 1])
        runner.lengths = [0] * 4
        assert_array_equal(runner.step(ids[:1], [2]), alone)
        assert_array_equal(runner.step(token[:1], [2])[0], together[0])
