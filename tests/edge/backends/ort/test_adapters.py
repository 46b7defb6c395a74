"""Adapters on ONNX Runtime: each slot has its own, and slots without one change in no bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from edge.adapters.graph_inputs import adapted_linears, slot_values
from edge.adapters.slots import AdapterSlots
from edge.adapters.weights import AdapterWeights
from edge.backends.step import step_after
from edge.engine_config import INT8_PREFILL_TOKENS
from edge.errors import BackendError
from export.pipeline import ExportConfig, export_checkpoint
from export.sources.opening import open_checkpoint
from export.sources.safetensors_file import SafetensorsFile
from tests.conftest import (
    FEW_TOKENS,
    RUNNABLE,
    TINY_KV_CAPACITY,
    Checkpoints,
    require_even_rows,
    require_kernels,
)
from tests.edge.backends.ort.test_gpu import CudaRunner
from tests.edge.backends.runner import Runner, random_ids
from tests.makers.run_time_adapters import random_adapter
from tests.makers.tiny_adapters import GOLDEN, golden_ids, write_case

RANK = 8
SLOTS = 4
IDS = random_ids(SLOTS, 6, seed=3)
Pair = Callable[..., "tuple[Path, Path]"]


@pytest.fixture(scope="module")
def pair(tiny_checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same bundle, without adapters and with; each is made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def bundles(quant: str, dialect: str = RUNNABLE, kind: Any = "qwen2") -> tuple[Path, Path]:
        require_kernels(dialect)
        key = f"{quant}-{dialect}-{kind}"
        if key not in made:
            root = tmp_path_factory.mktemp("adapters")
            for name, rank in (("plain", None), ("adapted", RANK)):
                export_checkpoint(
                    ExportConfig(
                        source=str(tiny_checkpoints(kind)),
                        output=root / name,
                        quant=quant.removesuffix("-awq"),  # type: ignore[arg-type]
                        group_size=None if quant in ("fp16", "bf16") else 32,
                        rotate=None if quant in ("fp16", "bf16") else False,
                        method="awq" if "awq" in quant else "rtn" if quant == "int4" else None,
                        calibration_tokens=FEW_TOKENS if "a" in quant else None,
                        dialect=dialect,  # type: ignore[arg-type]
                        adapters=rank,
                        kv_capacity=TINY_KV_CAPACITY,
                    )
                )
            made[key] = root / "plain", root / "adapted"
        return made[key]

    return bundles


def run(runner: Runner) -> NDArray[np.float32]:
    """Logits of a prompt of each slot, and of two decode steps of all slots together."""
    runner.lengths = [0] * SLOTS
    found = [runner.step(IDS[slot : slot + 1, :4], [slot])[:, -1] for slot in range(SLOTS)]
    steps = [runner.step(IDS[:, at : at + 1], list(range(SLOTS)))[:, 0] for at in (4, 5)]
    return np.stack([np.concatenate(found), *steps], axis=1)


def give(runner: Runner, *adapters: AdapterWeights | None) -> None:
    for slot, adapter in enumerate(adapters):
        runner.backend.set_adapter(slot, adapter)


def slots_of(runner: Runner) -> AdapterSlots:
    slots: AdapterSlots = runner.backend.set_adapter.__self__  # type: ignore[attr-defined]
    return slots


@pytest.mark.parametrize(
    ("quant", "dialect"),
    [
        ("fp16", "native"),
        ("int8", "native"),
        ("int4", "portable"),
        ("int4-awq", "native"),
        ("int8-w8a8", "portable"),
    ],
)
def test_each_slot_has_its_own_adapter_and_the_others_none(quant: str, dialect: str, pair: Pair):
    plain, adapted = pair(quant, dialect)
    with Runner(plain) as without:
        with pytest.raises(BackendError, match="export it again with --adapters"):
            without.backend.set_adapter(0, None)
        assert without.backend.adapter_rank == 0
        expected = run(without)
    with Runner(adapted, num_slots=SLOTS) as runner:
        assert runner.backend.adapter_rank == RANK
        model = runner.manifest.model
        one, two = random_adapter(model, RANK), random_adapter(model, 3, seed=1)
        assert_array_equal(run(runner), expected)
        give(runner, None, one, None, two)
        mixed = run(runner)
        assert_array_equal(mixed[[0, 2]], expected[[0, 2]])
        give(runner, two, None, None, None)
        alone = run(runner)
        give(runner, one, one, two, two)
        four = run(runner)
        assert_array_equal(four[1], mixed[1])
        assert_array_equal(four[3], mixed[3])
        assert np.abs(four - expected).max() > 0.1
        give(runner, two, None, None, None)
        assert_array_equal(run(runner), alone)
        give(runner, None, None, None, None)
        assert_array_equal(run(runner), expected)


def test_an_onnxruntime_that_leaves_empty_products_unwritten_multiplies_zeros(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
):
    plain, adapted = pair("fp16")
    with Runner(plain) as without:
        expected = run(without)
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.0")
    with Runner(adapted, num_slots=SLOTS) as runner:
        assert not any(0 in shape for _, shape, _ in slots_of(runner).inputs(0, SLOTS, 0))
        assert_array_equal(run(runner), expected)


# ------------------------------------------------------------------------------- what peft makes


def peft_case(root: Path) -> tuple[Path, AdapterWeights]:
    """The base model of "qwen2 all linears", and its adapter, of which peft's logits are known."""
    model, directory = write_case(root, "qwen2 all linears")
    config = json.loads((directory / "adapter_config.json").read_bytes())
    scaling = config["lora_alpha"] / config["r"]
    file = SafetensorsFile(directory / "adapter_model.safetensors")
    with open_checkpoint(str(model)) as checkpoint:
        tensors = {}
        for layer in adapted_linears(checkpoint.spec):
            parts = len(layer.rows)
            modules = [f"base_model.model.{n.removesuffix('.weight')}" for n in layer.weights]
            a = np.concatenate([file.tensor(f"{m}.lora_A.weight") for m in modules])
            b, first = np.zeros((layer.shape[1], parts * config["r"]), np.float32), 0
            for part, (module, rows) in enumerate(zip(modules, layer.rows, strict=True)):
                columns = slice(part * config["r"], (part + 1) * config["r"])
                b[first : first + rows, columns] = scaling * file.tensor(f"{module}.lora_B.weight")
                first += rows
            tensors[layer.name] = (a.astype(np.float32), b)
    return model, AdapterWeights("peft", "peft", config["r"], tensors)


def all_logits(runner: Runner) -> NDArray[np.float32]:
    runner.lengths = [0] * len(runner.lengths)
    logits: NDArray[np.float32] = runner.step(golden_ids()[None])[0]
    return logits


@pytest.mark.parametrize(("rank", "dialect"), [(4, "native"), (RANK, "portable")])
def test_logits_in_floats_are_pefts(rank: int, dialect: Any, tmp_path: Path):
    require_kernels(dialect)
    model, adapter = peft_case(tmp_path)
    bundle = tmp_path / "bundle"
    export_checkpoint(
        ExportConfig(source=str(model), output=bundle, quant="fp16", dialect=dialect, adapters=rank)
    )
    with np.load(GOLDEN) as golden, Runner(bundle) as runner:
        runner.backend.set_adapter(0, adapter)
        assert_allclose(all_logits(runner), golden["qwen2 all linears"], atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "awq+gptq"])
def test_an_adapter_changes_an_int4_bundle_as_peft_changes_the_model(method: Any, tmp_path: Path):
    """Also where calibration has folded factors into the layers that it meets."""
    model, adapter = peft_case(tmp_path)
    changes = []
    for name, options in (
        ("float", {"quant": "fp16"}),
        ("int4", {"quant": "int4", "method": method, "group_size": 32}),
    ):
        bundle = tmp_path / name
        few = {"calibration_tokens": FEW_TOKENS} if "a" in str(options.get("method")) else {}
        config: dict[str, Any] = {**options, **few}
        config |= {"dialect": RUNNABLE, "adapters": RANK}
        export_checkpoint(ExportConfig(source=str(model), output=bundle, **config))
        with Runner(bundle, int8_activations=None if name == "float" else False) as runner:
            before = all_logits(runner)
            runner.backend.set_adapter(0, adapter)
            changes.append(all_logits(runner) - before)
    error = np.abs(changes[1] - changes[0]).mean() / np.abs(changes[0]).mean()
    assert error < 0.6  # 0.38 to 0.45; 1.4 without the factors


def test_prompts_in_int8_have_their_adapters_in_floats(pair: Pair):
    plain, adapted = pair("int4", "portable")
    prompt = random_ids(1, INT8_PREFILL_TOKENS + 3, seed=4)

    def last(runner: Runner) -> NDArray[np.float32]:
        runner.lengths = [0] * len(runner.lengths)
        table, ids = runner.table[prompt], np.array([[prompt.shape[1] - 1]])
        logits: NDArray[np.float32] = runner.backend.forward(step_after([1], [0], table, ids))
        return np.array(logits[0, 0])

    with Runner(plain, int8_prompts=True) as runner:
        expected = last(runner)
    with Runner(adapted, int8_prompts=True) as runner, Runner(adapted) as reference:
        assert_array_equal(last(runner), expected)
        before = last(reference)
        for each in (runner, reference):
            each.backend.set_adapter(1, random_adapter(runner.manifest.model, RANK, size=0.05))
        change, wanted = last(runner) - expected, last(reference) - before
        assert np.abs(change - wanted).mean() < 0.5 * np.abs(wanted).mean()
        runner.backend.set_adapter(1, None)
        assert_array_equal(last(runner), expected)


# ------------------------------------------------------------------------------- on a device


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_the_cuda_backend_gives_each_slot_its_own(quant: str, dialect: str, pair: Pair):
    plain, adapted = pair(quant, dialect)
    with CudaRunner(plain, num_slots=SLOTS) as without:
        expected = run(without)
    rounds = {"int8_activations": False} if quant == "int4" else {}
    with CudaRunner(adapted, num_slots=SLOTS) as runner, Runner(adapted, **rounds) as reference:
        assert_array_equal(run(runner), expected)
        one = random_adapter(runner.manifest.model, RANK)
        two = random_adapter(runner.manifest.model, 3, seed=1)
        for each in (runner, reference):
            give(each, None, one, None, two)
        mixed = run(runner)
        assert_array_equal(mixed[[0, 2]], expected[[0, 2]])
        wanted = run(reference)
        assert np.abs(wanted - expected)[[1, 3]].max() > 1
        assert_allclose(mixed, wanted, atol=0.05)
        give(runner, two, None, None, None)
        assert_array_equal(run(runner)[[1, 2, 3]], expected[[1, 2, 3]])


# ------------------------------------------------------------------------------- memory and errors


def test_memory_is_taken_when_the_first_adapter_comes(pair: Pair):
    with Runner(pair("fp16")[1], num_slots=SLOTS) as runner:
        slots = slots_of(runner)
        run(runner)
        give(runner, None, None)
        assert slots.num_bytes == 0
        give(runner, random_adapter(runner.manifest.model, 1))
        assert slots.num_bytes == 4 * SLOTS * slot_values(runner.manifest.model, RANK)


def test_an_adapter_that_a_slot_held_last_is_not_copied_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
):
    with Runner(pair("fp16")[1], num_slots=SLOTS) as runner:
        one = random_adapter(runner.manifest.model, 2)
        give(runner, one)
        slots = slots_of(runner)
        monkeypatch.setattr(slots, "_fill", lambda *_: pytest.fail("copied"))
        give(runner, None)
        give(runner, one)


def test_what_does_not_fit_is_refused_and_changes_nothing(pair: Pair):
    with Runner(pair("fp16")[1], num_slots=SLOTS) as runner:
        model = runner.manifest.model
        one = random_adapter(model, 2)
        give(runner, one)
        expected = run(runner)
        a, b = one.tensors["layers.0.qkv"]
        wrong = (
            random_adapter(model, RANK + 1),
            AdapterWeights("x", "1", 2, {"layers.0.qkv": (a, b[:-1])}),
            AdapterWeights("x", "2", 2, {"layers.0.qkv": (a[:-1], b)}),
            AdapterWeights("x", "3", 1, {"layers.0.qkv": (a, b)}),
            AdapterWeights("x", "4", 2, {"lm_head": (a, b)}),
        )
        for each in wrong:
            with pytest.raises(BackendError, match="does not fit the bundle"):
                runner.backend.set_adapter(0, each)
        assert_array_equal(run(runner), expected)


def test_a_bundle_without_adapters_loads_nothing_of_them(pair: Pair):
    code = (
        "import sys; from pathlib import Path; from tests.edge.backends.runner import Runner\n"
        f"with Runner(Path({str(pair('fp16')[0])!r})) as runner: runner.step([[1, 2]])\n"
        "sys.exit(any(name.startswith('edge.adapters') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("quant", ["int4", "fp16"])
def test_deterministic_holds_with_adapters(quant: str, pair: Pair):
    require_even_rows()
    with Runner(pair(quant)[1], num_slots=SLOTS, deterministic=True) as runner:
        slots = slots_of(runner)
        assert slots.num_bytes == 0  # what tried them is gone
        one, two = (random_adapter(runner.manifest.model, RANK, seed=n) for n in (0, 1))
        give(runner, one, two, None, one)
        together = run(runner)
        runner.lengths = [0] * SLOTS
        for slot in range(SLOTS):
            alone = [runner.step(IDS[slot : slot + 1, :4], [slot])[:, -1]]
            alone += [runner.step(IDS[slot : slot + 1, at : at + 1], [slot])[:, 0] for at in (4, 5)]
            assert_array_equal(np.concatenate(alone), together[slot])
