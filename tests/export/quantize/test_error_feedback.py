"""GPTQ's layers are rounded for what reaches them in the bundle, and make up for what was lost."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme
from edge.errors import CheckpointError, ConfigError
from edge.model.parts import Add, Norm
from edge_make.recipe import Recipe
from export.pipeline import ExportConfig
from export.quantize.calibrated import Calibrated, Method
from export.quantize.calibration import LayerRunner, linear_taps
from export.quantize.error_feedback import cross_moment, made_up
from export.quantize.plan import BlockPlan, linear_blocks
from export.quantize.rounded_twin import RoundedTwin, twin_taps
from export.quantize.rtn import integer_range
from export.quantize.scaled_checkpoint import ScaledCheckpoint
from export.quantize.statistics import second_moment
from export.sources.checkpoint import Checkpoint as OpenCheckpoint
from export.sources.checkpoint import Transformed
from export.sources.opening import open_checkpoint
from tests.conftest import Checkpoints
from tests.export.quantize.layers import plan_blocks, run_layers
from tests.export.quantize.made_layers import OfOtherLayers, without_rope
from tests.makers.goldens import Golden
from tests.makers.tiny_models import KINDS, Kind

FP16 = np.dtype(np.float16)
Array = NDArray[np.float32]


@pytest.mark.parametrize("shape", [(5, 24), (40, 24)])
@pytest.mark.parametrize("adds", [True, False])
def test_the_change_solves_the_damped_least_squares(shape: tuple[int, int], adds: bool):
    random = np.random.RandomState(0)
    rows, width = shape
    weights = random.normal(size=shape).astype(np.float32)
    exact = random.normal(size=(300, width)).astype(np.float32) * np.linspace(0.2, 3, width)
    rounded = (exact + 0.1 * random.normal(size=exact.shape)).astype(np.float32)
    missing = random.normal(size=(300, rows)).astype(np.float32) if adds else None
    factors = np.linspace(0.5, 2, width).astype(np.float32)
    inputs = rounded / factors
    given = (exact / factors).astype(np.float32)
    if missing is None:
        wanted = cross_moment(inputs, given) @ (weights * factors).T
    else:
        wanted = cross_moment(inputs, (exact @ weights.T + missing).astype(np.float32))
    found = made_up(weights * factors, wanted, second_moment(inputs), factors) / factors - weights

    moments = second_moment(rounded).astype(np.float64)
    damped = moments + np.diagonal(moments).mean() * np.eye(width)
    wanted = (exact - rounded).astype(np.float64) @ weights.T + (0 if missing is None else missing)
    expected = np.linalg.solve(damped, rounded.T.astype(np.float64) @ wanted / 300).T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turns", [True, False])
def test_without_rounding_both_models_see_the_same(
    kind: Kind, turns: bool, tiny_checkpoints: Checkpoints
):
    ids = Golden.load(kind).ids[None, :64]
    with open_checkpoint(str(tiny_checkpoints(kind))) as checkpoint:
        if not turns:
            checkpoint = without_rope(checkpoint)
        runner = LayerRunner(checkpoint, ids, taps=twin_taps)
        twin = RoundedTwin(checkpoint, 64)
        hidden = runner.embed()
        seen = runner.run(0, None)
        for index in range(checkpoint.spec.num_layers):
            layer = twin.layer(checkpoint, index, hidden)
            np.testing.assert_array_equal(layer.residual("o"), hidden.reshape(64, -1))
            for linear in linear_taps(checkpoint.spec.layer(index)).values():
                close(layer.inputs(linear), seen.inputs[linear])
            close(layer.residual("down"), seen.inputs["attention_residual"])
            close(layer.after(), seen.hidden)
            hidden = seen.hidden
            seen = runner.run(index + 1, hidden)


def test_a_norm_between_a_linear_and_its_add_is_run_in_both_models(tiny_checkpoints: Checkpoints):
    ids = Golden.load("llama").ids[None, :32]
    with open_checkpoint(str(tiny_checkpoints("llama"))) as checkpoint:
        layer = checkpoint.spec.layer(0)
        at = next(i for i, part in enumerate(layer) if isinstance(part, Add))
        after = (*layer[:at], Norm("q_norm", 64), *layer[at:])
        weight = np.linspace(0.5, 1.5, 64, dtype=np.float32)
        norm = {"model.layers.0.self_attn.q_norm.weight": weight}
        made = Replaced(OfOtherLayers(checkpoint, after), norm)
        runner = LayerRunner(made, ids, taps=twin_taps)
        seen = runner.run(0, None)
        rounded = RoundedTwin(made, 32).layer(made, 0, runner.embed())
        for linear in linear_taps(after).values():
            close(rounded.inputs(linear), seen.inputs[linear])
        close(rounded.residual("down"), seen.inputs["attention_residual"])
        close(rounded.after(), seen.hidden)


# GPTQ alone is the same without AWQ's factors, so one kind of model is enough for it.
@pytest.mark.parametrize(
    ("method", "kind"), [("gptq", "qwen2"), *(("awq+gptq", kind) for kind in KINDS)]
)
def test_the_twin_is_the_model_of_the_planned_integers(
    kind: Kind, method: Method, tiny_checkpoints: Checkpoints
):
    """Its hidden states are those of a float model with the bundle's weights, layer by layer."""
    ids = Golden.load(kind).ids[None, :64]
    with open_checkpoint(str(tiny_checkpoints(kind))) as checkpoint:
        plans = plan_blocks(gptq(checkpoint, ids, method))[:-1]
        bundle = run_layers(dequantized(checkpoint, plans), ids)
        exact = run_layers(checkpoint, ids)
        nearest = run_layers(dequantized(checkpoint, plans_alone(checkpoint, ids, method)), ids)
    for plan, rounded, seen in zip(plans, bundle, exact, strict=False):
        assert plan.hidden is not None
        close(plan.hidden[0], seen.hidden)
        close(plan.hidden[1], rounded.hidden)
        for linear in plan.linears:
            assert linear.kept is not None
            least, most = integer_range(linear.scheme)
            assert all(
                least <= part.codes.min() <= part.codes.max() <= most for part in linear.kept
            )
    # What it is for: less is lost in the end than where each layer is rounded for itself.
    assert error(bundle[-1].hidden, exact[-1].hidden) < error(nearest[-1].hidden, exact[-1].hidden)


def test_outputs_to_the_residual_stream_make_up_for_its_errors(
    tiny_checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    """``o`` and ``down`` are to lead from the rounded model's stream to the float model's."""
    ids = Golden.load("qwen2").ids[None, :64]
    asked: list[Array] = []

    def recorded(weights: Array, wanted: Array, moments: Array, factors: Array) -> Array:
        asked.append(wanted.copy())
        return made_up(weights, wanted, moments, factors)

    monkeypatch.setattr("export.quantize.calibrated.made_up", recorded)
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        plans = plan_blocks(gptq(checkpoint, ids, "gptq"))[:-1]
        exact = LayerRunner(checkpoint, ids, taps=twin_taps)
        bundle = LayerRunner(dequantized(checkpoint, plans), ids, taps=twin_taps)
        before = [runner.embed() for runner in (exact, bundle)]
        for index in range(checkpoint.spec.num_layers):
            float_seen = exact.run(index, before[0] if index else None)
            seen = bundle.run(index, before[1] if index else None)
            streams = (float_seen.inputs["attention_residual"], float_seen.hidden.reshape(64, -1))
            ours = (before[1].reshape(64, -1), seen.inputs["attention_residual"])
            for name, place, stream, own in zip(("o", "down"), (1, 3), streams, ours, strict=True):
                close(asked[4 * index + place], cross_moment(seen.inputs[name], stream - own))
            before = [float_seen.hidden, seen.hidden]


def test_a_linear_that_is_not_int4_is_taken_as_exact(tiny_checkpoints: Checkpoints):
    ids = Golden.load("qwen2").ids[None, :64]
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        keep = (("*.qkv", "int8"), ("*.o", "float"), ("*.gate_up", "int8"), ("*.down", "float"))
        schemes = Recipe("int4", group_size=32, keep=keep).schemes(checkpoint.spec)
        plans = plan_blocks(gptq(checkpoint, ids, "gptq", schemes))[:-1]
    for plan in plans:
        assert plan.hidden is not None
        close(plan.hidden[1], plan.hidden[0])
        assert all(linear.kept is None for linear in plan.linears)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "part",
    ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
)
@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("gptq", np.nan, "NaN or infinite"),
        ("awq+gptq", np.inf, "NaN or infinite"),
        ("gptq", 7e4, "FP16 ends"),  # a factor of AWQ may make it fit
    ],
)
def test_a_damaged_weight_is_named(
    method: Method, part: str, value: float, message: str, tiny_checkpoints: Checkpoints
):
    ids = Golden.load("qwen2").ids[None, :64]
    name = f"model.layers.1.{part}.weight"
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        weights = checkpoint.tensor(name).astype(np.float32)
        weights[3, 5] = value
        spoiled = Replaced(checkpoint, {name: weights})
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} holds .*{message}"):
            plan_blocks(gptq(spoiled, ids, method))


def test_layers_that_depend_on_each_other_cannot_be_rounded_side_by_side(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--workers 2 does not go with --method awq\+gptq"):
        ExportConfig("x", tmp_path, quant="int4", method="awq+gptq", workers=2)
    with pytest.raises(ConfigError, match=r"the default --method awq\+gptq, .* --method awq$"):
        ExportConfig("x", tmp_path, quant="int4", workers=2)


class Replaced(Transformed):
    """A model some of whose weights are others."""

    def __init__(self, checkpoint: OpenCheckpoint, weights: dict[str, Array]) -> None:
        super().__init__(checkpoint)
        self._weights = weights

    def tensor(self, name: str) -> NDArray[np.generic]:
        return self._weights[name] if name in self._weights else super().tensor(name)


def dequantized(checkpoint: OpenCheckpoint, plans: list[BlockPlan]) -> Replaced:
    """A model in float with the weights that were planned."""
    factors = {name: each for plan in plans for name, each in plan.factors.items()}
    weights = {
        name: part.dequantize()
        for plan in plans
        for linear in plan.linears
        for name, part in zip(linear.layer.weights, linear.kept or (), strict=True)
    }
    return Replaced(ScaledCheckpoint(checkpoint, factors), weights)


def gptq(
    checkpoint: OpenCheckpoint,
    ids: NDArray[np.int64],
    method: Method,
    schemes: dict[str, TensorScheme] | None = None,
) -> Calibrated:
    schemes = schemes or Recipe("int4", group_size=32).schemes(checkpoint.spec)
    runner = LayerRunner(checkpoint, ids, taps=twin_taps)
    twin = RoundedTwin(checkpoint, ids.shape[1])
    return Calibrated(runner, schemes, method, "mse", FP16, twin)


def plans_alone(
    checkpoint: OpenCheckpoint, ids: NDArray[np.int64], method: Method
) -> list[BlockPlan]:
    """Plans of layers that all begin with the float model's hidden states."""
    calibrated = gptq(checkpoint, ids, method)
    plans: list[BlockPlan] = []
    for block in linear_blocks(checkpoint.spec)[:-1]:
        hidden = None
        if plans:
            before = plans[-1].hidden
            assert before is not None
            hidden = np.stack([before[0]] * 2)
        plans.append(calibrated.plan(block, calibrated.look(block, hidden)))
    return plans


def close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def error(found: Array, expected: Array) -> float:
    return float(np.square(found.astype(np.float64) - expected).sum())
