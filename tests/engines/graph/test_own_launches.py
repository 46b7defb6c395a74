"""What plugins of Python launch: as the compiled plugins do, and by hand what is computed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import shutil
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies
from numpy.testing import assert_allclose, assert_array_equal

from edge.backends.tensorrt import launch_rules, plugins
from edge.backends.tensorrt.launch_rules import (
    JOIN,
    NUMBERS,
    PARTS,
    PRODUCT,
    TOP_K_MERGE,
    TOP_K_PARTS,
    PluginRule,
)
from edge.bundle.engine_file import read_engine_info
from edge.errors import BackendError
from engines.kernels import launch, plugin, plugin_v3, reference
from engines.kernels.attention import attention, join_tactics, part_tactics
from engines.kernels.layout import pack_weights
from engines.kernels.own_plugins import element_types, fitting_tactics
from engines.kernels.package import load_ptx
from engines.kernels.top_k import top_k, top_k_merge_tactics, top_k_parts_tactics
from tests.engines.kernels.ptx import run as run_ptx
from tests.engines.own_builds import JETPACK6
from tests.standins.cuda import FakeGpu
from tests.standins.plugin import Plugins, Shape, TensorDesc
from tests.standins.plugin_v3 import REGISTRY, Desc
from tests.standins.tensorrt import make_module

DATA = Path(__file__).parents[2] / "data"


def test_a_plugins_exception_does_not_keep_it_alive() -> None:
    made, recorder = make_plugin(PRODUCT, 1)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    recorder.ran = fail
    attached = made.attach_to_context(None)
    gone = weakref.ref(attached)
    with pytest.raises(plugins.KeptError):
        enqueue_on(attached, [(1, 32), (1, 1, 1, 4), (1, 1), (1,)], 1)
    del attached
    with pytest.raises(BackendError, match="ZeroDivisionError") as raised:
        made.own_kernels.raise_failure()
    gc.collect()
    assert gone() is None
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


@functools.cache
def known_ptx() -> Any:
    return load_ptx()


class Recorder:
    """A driver that hands each launch to a function.

    Attributes:
        ran: given the module's PTX, the entry, the grid, threads, shared bytes and values.
    """

    ran: Callable[..., None]

    def module(self) -> Any:
        module: Any = types.ModuleType("cuda.bindings.driver")
        module.CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
        modes = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        module.CUstreamCaptureMode = modes
        module.cuCtxGetCurrent = lambda: (0, 1)
        module.cuModuleLoadData = lambda image: (0, image)
        module.cuModuleGetFunction = lambda image, name: (0, (image, name))
        module.cuLaunchKernel = self._launch
        return module

    def _launch(self, function: Any, *arguments: Any) -> tuple[int]:
        x, y, z, threads, height, depth, shared, stream, (values, _), extra = arguments
        assert (height, depth, stream, extra) == (1, 1, 0x9, 0)
        image, name = function
        text = image.decode().removesuffix("\0")
        self.ran(text, name.decode(), (x, y, z), threads, shared, values)
        return (0,)


@functools.cache
def make_plugin(rule: PluginRule, value: int) -> tuple[Any, Recorder]:
    """A plugin of the runtime, by way of its fields, and the driver that it launches through."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.driver", recorder.module())
        patch.setattr(REGISTRY, "creators", weakref.WeakValueDictionary())
        patch.setattr(plugins, "_registered", {})
        module = make_module(FakeGpu(), JETPACK6)
        plugin_v3.register(module, load_ptx(), load_ptx())
        own_kernels = plugins.register(module)
        creator = REGISTRY.creators[rule.name, "v3", "edge_llm"]
    fields = own_kernels.for_build(rule, value).get_fields_to_serialize()
    return creator.create_plugin("", fields, module.TensorRTPhase.RUNTIME), recorder


def enqueue_on(attached: Any, shapes: Sequence[tuple[int, ...]], tactic: int) -> list[int]:
    """Launch for inputs of some shapes; returns all addresses, those of outputs last."""
    attached.set_tactic(tactic)
    inputs, addresses = [Desc(shape, None) for shape in shapes], list(range(16, 176, 16))
    outputs = [Desc((), None)] * len(RULES[attached.plugin_name].outputs)
    attached.on_shape_change(inputs, outputs)
    given, taken = addresses[: len(inputs)], addresses[7 : 7 + len(outputs)]
    attached.enqueue(inputs, outputs, given, taken, 0, 0x9)
    return given + taken


RULES = {rule.name: rule for rule in launch_rules.PLUGINS}
TYPES = {"fp16": "HALF", "fp32": "FLOAT", "int32": "INT32"}
SIZES = strategies.integers(1, 600)


@functools.cache
def compiled_plugins() -> Plugins:
    known = Plugins()
    types_of = element_types(make_module(FakeGpu(), "10.13.3"))
    plugin.register(known.module(), known_ptx(), types_of)
    return known


def check_launch(
    rule: PluginRule, value: int, shapes: Sequence[tuple[int, ...]], tactic: int
) -> None:
    """A launch is that of the plugin that TensorRT compiles into engines."""
    seen: list[Any] = []
    made, recorder = make_plugin(rule, value)
    recorder.ran = lambda *launched: seen.append(launched)
    addresses = enqueue_on(made.attach_to_context(None), shapes, tactic)
    ((text, entry, grid, threads, shared, values),) = seen
    implement = compiled_plugins().known[f"edge_llm::{rule.name}"].implement
    assert implement is not None
    descs = [
        TensorDesc(shape, TYPES[kind])
        for shape, kind in zip(shapes, rule.inputs.values(), strict=True)
    ]
    other_entry, other_text, other, numbers = implement(*descs, None, tactic)
    assert (entry, text) == (other_entry, other_text)
    assert (*grid, threads, shared) == (
        *(other.grid_x, other.grid_y, other.grid_z, other.block_x, other.shared_mem),
    )
    read = len(shapes)
    assert values == (*addresses[:read], *numbers, *addresses[read:])


@given(
    leading=strategies.lists(SIZES, min_size=1, max_size=3),
    columns=strategies.integers(1, 152_000),
    groups=strategies.integers(1, 300),
    group=strategies.sampled_from(launch.GROUPS),
    planes=strategies.integers(1, 2),
    tactic=strategies.integers(1, 5),
    bias=strategies.booleans(),
)
def test_launches_are_those_of_the_compiled_plugin(
    leading: list[int],
    columns: int,
    groups: int,
    group: int,
    planes: int,
    tactic: int,
    bias: bool,
) -> None:
    depth = groups * group
    shapes: list[tuple[int, ...]] = [
        *((*leading, depth), (depth // 32, planes, columns, 4), (groups, columns)),
        (columns if bias else 1,),
    ]
    check_launch(PRODUCT, planes, shapes, tactic)
    (output,) = PRODUCT.output_shapes(shapes, NUMBERS)
    assert output == (*leading, columns)


def test_partial_sums_have_the_documented_room():
    """128 programs of 64 heads of tokens, eight for each of an Orin's 16 multiprocessors."""
    assert launch_rules.room(1) == 16 * 8 * 64
    assert launch_rules.room(10_000) == 10_000
    page = Path(__file__).parents[3].joinpath("docs/kernels.md").read_text("utf-8")
    assert f"{launch_rules.room(1):,} of them, or one per head and token of the step" in page


@given(
    batch=strategies.integers(1, 16),
    groups=strategies.integers(1, 16),
    heads=strategies.integers(1, 8),
    tokens=strategies.integers(1, 4096),
    capacity=strategies.integers(1, 131_072),
    width=strategies.sampled_from((64, 128)),
    tactic=strategies.integers(1, 2),
)
def test_launches_of_attention_are_those_of_the_compiled_plugins(
    batch: int, groups: int, heads: int, tokens: int, capacity: int, width: int, tactic: int
) -> None:
    job = attention(
        *(batch, groups, heads, tokens, width, capacity), tile=tactic - 1, join=tactic - 1
    )
    for rule, launched in zip((PARTS, JOIN), job.launches, strict=True):
        shapes = [job.buffers[name][0] for name in rule.inputs]
        check_launch(rule, width, shapes, tactic)
        found = rule.output_shapes(shapes, NUMBERS)
        assert found == tuple(job.buffers[name][0] for name in rule.outputs)
        # Every head of a token has a program, and the partial sums of every part have room.
        (x, y, z), rows = launched.grid, batch * groups * heads * tokens
        size = launched.variant.constants["ROWS"]
        if rule is PARTS:
            assert (x - 1) * size < heads * tokens <= x * size
            assert (y, z * rows <= found[0][0]) == (batch * groups, True)
        else:
            assert (x - 1) * size < rows <= x * size
            assert launched.arguments[7] == job.launches[0].grid[2]


@pytest.mark.slow
@given(
    leading=strategies.lists(strategies.integers(1, 64), min_size=1, max_size=2),
    columns=strategies.integers(1, 262_144),
    keep=strategies.integers(1, 1024),
)
def test_launches_of_the_search_are_those_of_the_compiled_plugins(
    leading: list[int], columns: int, keep: int
) -> None:
    keep = min(keep, columns)
    job = top_k(int(np.prod(leading)), columns, keep)
    for rule, launched in zip((TOP_K_PARTS, TOP_K_MERGE), job.launches, strict=True):
        flat = [job.buffers[name][0] for name in rule.inputs]
        shapes = [(*leading, *each[1:]) if len(each) > 1 else each for each in flat]
        check_launch(rule, keep, shapes, 1)
        tactic = launch.Tactic(launched.variant, 1, launch_rules.PART_LOGITS)
        assert rule.launch(shapes, tactic, NUMBERS) == rule.launch(flat, tactic, NUMBERS)
        for found, wanted in zip(
            rule.output_shapes(shapes, NUMBERS),
            (job.buffers[name][0] for name in rule.outputs),
            strict=True,
        ):
            assert tuple(found) == (*leading, *wanted[1:])


@pytest.mark.parametrize(
    ("usual", "largest", "expected"),
    [
        (1, 1, (1,)),  # a decode step of one sequence
        (2, 2, (2, 5)),
        (3, 4, (3, 5)),
        (8, 8, (4, 5)),
        (9, 9, (5,)),
        (512, 512, (5,)),  # a chunk of a prompt
        (1, 64, (4,)),  # logits: one row of a prompt, several of a draft
        (4, 64, (4, 5)),
    ],
)
def test_few_rows_read_the_weights_once_and_many_on_tensor_cores(
    usual: int, largest: int, expected: tuple[int, ...]
) -> None:
    def shapes(rows: int) -> list[tuple[int, ...]]:
        return [(1, rows, 64), (2, 1, 8, 4), (2, 8), (1,)]

    assert fitting_tactics(PRODUCT, shapes(usual), shapes(largest)) == expected
    assert fitting_tactics(PRODUCT, shapes(usual), shapes(largest)) == tuple(
        place + 1 for place in launch.w4_places(usual, largest)
    )


@given(
    batch=strategies.integers(1, 16),
    groups=strategies.integers(1, 16),
    heads=strategies.integers(1, 8),
    tokens=strategies.integers(1, 1024),
)
def test_attention_is_timed_with_what_is_launched_for_its_shapes(
    batch: int, groups: int, heads: int, tokens: int
) -> None:
    job = attention(batch, groups, heads, tokens, 64, 128)
    for rule, launched, tactics in zip(
        (PARTS, JOIN), job.launches, (part_tactics(64), join_tactics(64)), strict=True
    ):
        shapes = [job.buffers[name][0] for name in rule.inputs]
        (number,) = fitting_tactics(rule, shapes, shapes)
        assert tactics[number - 1].variant is launched.variant


def test_a_compiled_plugin_offers_tactics_for_all_its_profiles() -> None:
    """NVIDIA's class keeps the answer to the last question for all profiles."""

    def ask(known: Plugins, desc: list[TensorDesc], rows: int) -> list[int]:
        for each, shape in zip(desc, ((1, rows, 64), (2, 1, 8, 4), (2, 8), (1,)), strict=True):
            each.shape = Shape.of([shape])
        tune = known.known["edge_llm::w4_linear"].tune
        assert tune is not None
        ((combination),) = tune(*desc, ())
        return list(combination.tactics)

    def desc() -> list[TensorDesc]:
        return [TensorDesc((1,), None) for _ in range(4)]

    one, other = desc(), desc()
    known = compiled_plugins()
    assert ask(known, one, 1) == [1]
    assert ask(known, one, 512) == [1, 5]
    assert ask(known, other, 512) == [5]
    assert ask(known, one, 1) == [1, 5]


class Interpreted:
    """A driver that runs the very PTX that it is given, by the instruction.

    Attributes:
        arrays: by name; their addresses are those that `enqueue_on` hands over.
    """

    def __init__(self, rule: PluginRule, arrays: dict[str, Any]) -> None:
        self._rule, self.arrays = rule, arrays

    def run(self, value: int, tactic: launch.Tactic, place: int) -> None:
        made, recorder = make_plugin(self._rule, value)
        recorder.ran = functools.partial(self._run, tactic)
        shapes = [self.arrays[name].shape for name in self._rule.inputs]
        self._leading = len(shapes)
        enqueue_on(made.attach_to_context(None), shapes, place)

    def _run(
        self,
        tactic: launch.Tactic,
        text: str,
        entry: str,
        grid: Any,
        threads: int,
        shared: int,
        values: tuple[int, ...],
    ) -> None:
        kernel = dataclasses.replace(
            known_ptx()[tactic.variant.name],
            text=text,
            entry=entry,
            threads=threads,
            shared_bytes=shared,
        )
        reads, writes = tuple(self._rule.inputs), tuple(self._rule.outputs)
        numbers = values[len(reads) : -len(writes)]
        used = {name: self.arrays[name] for name in (*reads, *writes)}
        launched = launch.Launch(tactic.variant, grid, (*reads, *numbers, *writes))
        run_ptx(kernel, launched, used, writes)


@pytest.mark.parametrize(
    ("planes", "tactic", "leading", "bias"), [(1, 1, (2, 3), True), (2, 5, (1, 2), False)]
)
def test_launches_compute_the_product(
    planes: int, tactic: int, leading: tuple[int, int], bias: bool
) -> None:
    rows, columns, depth, group = int(np.prod(leading)), 70, 192, 64
    random = np.random.default_rng(planes)
    weights = [random.integers(-8, 8, (depth, columns), np.int8) for _ in range(planes)]
    arrays: dict[str, Any] = {
        "x": random.standard_normal((*leading, depth)).astype(np.float16),
        "weights": pack_weights(weights),
        "scales": (random.uniform(0.2, 2, (depth // group, columns)) * 0.01).astype(np.float16),
        "bias": random.standard_normal(columns if bias else 1).astype(np.float16),
        "y": np.full((rows, columns), np.nan, np.float16),
    }
    chosen = launch.w4_tactics(planes)[tactic - 1]
    Interpreted(PRODUCT, arrays).run(planes, chosen, tactic)
    compute = getattr(reference, chosen.variant.function)
    x, scales = arrays["x"].reshape(rows, depth), arrays["scales"]
    exact, bound = compute(x, weights, scales, arrays["bias"] if bias else None)
    assert (np.abs(arrays["y"] - exact) <= bound).all()


@pytest.mark.parametrize(
    ("width", "tactic", "starts", "tokens"), [(64, 1, (300, 5), 2), (128, 2, (9,), 20)]
)
def test_launches_compute_attention(
    width: int, tactic: int, starts: tuple[int, ...], tokens: int
) -> None:
    job = attention(len(starts), 2, 3, tokens, width, 310)
    random = np.random.default_rng(tokens)
    arrays: dict[str, Any] = {
        name: random.standard_normal(shape).astype(dtype)
        for name, (shape, dtype) in job.buffers.items()
    }
    arrays["positions"] = (np.array(starts)[:, None] + np.arange(tokens)).astype(np.int32)
    for name in ("partial", "stats", "output"):
        arrays[name][...] = np.nan
    for rule, tactics in ((PARTS, part_tactics(width)), (JOIN, join_tactics(width))):
        Interpreted(rule, arrays).run(width, tactics[tactic - 1], tactic)
    exact = reference.attention(**{name: arrays[name] for name in PARTS.inputs})
    # As in `tests.engines.kernels.test_ptx`.
    assert np.abs(arrays["output"] - exact).max() <= 2.5e-3 * 4


def test_launches_find_the_best_logits() -> None:
    rows, columns, keep = 1, 9000, 7
    job = top_k(rows, columns, keep)
    random = np.random.default_rng(7)
    arrays: dict[str, Any] = {
        name: np.zeros(shape, dtype) for name, (shape, dtype) in job.buffers.items()
    }
    arrays["logits"][...] = random.standard_normal((rows, columns)) * 4
    for rule, tactics in (
        (TOP_K_PARTS, top_k_parts_tactics(keep)),
        (TOP_K_MERGE, top_k_merge_tactics(keep)),
    ):
        Interpreted(rule, arrays).run(keep, tactics[0], 1)
    values, places, rest = reference.top_k(arrays["logits"], keep)
    assert_array_equal(arrays["values"], values)
    assert_array_equal(arrays["places"], places)
    assert_allclose(arrays["rest"].ravel(), rest.ravel(), rtol=1e-4)


def test_an_engine_json_of_products_alone_still_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by edge-llm at 21bd782, before attention was a plugin of this kind; PTX was cut."""
    shutil.copy(DATA / "engine-python-products.json", tmp_path / "engine.json")
    info, seen, recorder = read_engine_info(tmp_path), [], Recorder()
    recorder.ran = lambda *launched: seen.append(launched)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", recorder.module())
    monkeypatch.setattr(REGISTRY, "creators", weakref.WeakValueDictionary())
    monkeypatch.setattr(plugins, "_registered", {})
    module = make_module(FakeGpu(), JETPACK6)
    own_kernels = plugins.register(module)
    for packed in info.python_kernels:
        own_kernels.add(packed)
    number = np.array([-1623882644], np.int32)  # what the plan has
    field = module.PluginField("kernels", number, module.PluginFieldType.INT32)
    fields = module.PluginFieldCollection([field])
    creator = REGISTRY.creators["w4_linear", "v3", "edge_llm"]
    made = creator.create_plugin("", fields, module.TensorRTPhase.RUNTIME)
    shapes = [(2, 3, 64), (2, 2, 200, 4), (2, 200), (1,)]
    addresses = enqueue_on(made.attach_to_context(None), shapes, 3)
    ((text, entry, grid, threads, shared, values),) = seen
    assert f".entry {entry}(" in text
    assert (entry, grid, threads) == ("w4_gemv_rows4_planes2", (4, 2, 1), 128)
    assert shared == known_ptx()[entry].shared_bytes
    assert values == (*addresses[:4], 6, 200, 64, 0, 0, addresses[4])
