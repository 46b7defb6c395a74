"""The kernels, run by Triton's interpreter, compute what NumPy does, and touch nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.backends.tensorrt.launch_rules import PART_LOGITS
from engines.kernels import launch, reference
from engines.kernels.attention import attention, part_tactics
from engines.kernels.layout import pack_weights
from engines.kernels.top_k import top_k
from engines.kernels.variants import BY_NAME, VARIANTS

from .interpreted import Buffer, Trace, run

settings.register_profile("load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("load")
EXAMPLES = 12


def execute(
    job: launch.Job, own_sort: bool = True, **inputs: NDArray[Any]
) -> tuple[dict[str, Buffer], Trace]:
    """Run a job; what no input fills holds NaN, or -1."""
    buffers = {}
    for name, (shape, dtype) in job.buffers.items():
        filler = np.nan if dtype.kind == "f" else -1
        array = inputs.pop(name, np.full(shape, filler, dtype))
        assert (array.shape, array.dtype) == (shape, dtype), name
        buffers[name] = Buffer(array)
    assert not inputs
    return buffers, run(list(job.launches), buffers, own_sort=own_sort)


@st.composite
def halves(draw: st.DrawFn, shape: tuple[int, ...], largest: float = 100.0) -> Any:
    """Values of very different sizes, of one sign, all equal, or zero."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "wide", "positive", "equal", "outlier", "zero"]))
    values = random.standard_normal(shape)
    if kind == "wide":
        values *= 10.0 ** random.uniform(-6, 1, shape)
    elif kind == "positive":
        values = np.abs(values)
    elif kind == "equal":
        values = np.full(shape, random.standard_normal())
    elif kind == "outlier":
        values[..., random.integers(shape[-1])] = largest
    elif kind == "zero":
        values = np.zeros(shape)
    return values.clip(-largest, largest).astype(np.float16)


TACTICS = [tactic for planes in (1, 2) for tactic in launch.w4_tactics(planes)]


@st.composite
def products(draw: st.DrawFn, planes: int, rows: st.SearchStrategy[int]) -> tuple[Any, ...]:
    group = draw(st.sampled_from(launch.GROUPS))
    depth = group * draw(st.integers(1, 640 // group))
    columns = draw(st.sampled_from([1, 2, 31, 32, 63, 64, 65, 96, 130]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = [random.integers(-8, 8, (depth, columns)).astype(np.int8) for _ in range(planes)]
    extreme = draw(st.sampled_from([None, -8, 7, 0]))
    if extreme is not None:
        weights = [np.full_like(plane, extreme) for plane in weights]
    scales = (random.uniform(0.2, 2.0, (depth // group, columns)) * 0.01).astype(np.float16)
    scales[0, 0] = np.float16(6e-8)  # the smallest that is not zero
    bias = draw(st.none() | halves((columns,)))
    return draw(halves((draw(rows), depth))), weights, scales, bias, group


def check_product(job: launch.Job, case: tuple[Any, ...]) -> None:
    """Run it: the numbers, and what it reads and writes."""
    x, planes, scales, bias, _ = case
    inputs = {"x": x, "weights": pack_weights(planes), "scales": scales}
    if bias is not None:
        inputs["bias"] = bias
    buffers, trace = execute(job, **inputs)
    (only,) = job.launches
    exact, bound = getattr(reference, only.variant.function)(x, planes, scales, bias)
    assert (np.abs(buffers["y"].array - exact) <= bound).all()
    # Each weight once for the rows of a program.
    assert (trace.reads(buffers["weights"]) == only.grid[1]).all()
    assert (trace.writes(buffers["y"]) == 1).all()
    if bias is None:
        assert (trace.reads(buffers["bias"]) == 0).all()


def sizes(case: tuple[Any, ...]) -> dict[str, Any]:
    x, planes, _, bias, group = case
    names = ("rows", "depth", "columns", "group", "bias")
    values = (*x.shape, planes[0].shape[1], group, bias is not None)
    return dict(zip(names, values, strict=True))


@settings(max_examples=EXAMPLES)
@given(st.data(), st.integers(1, 2))
def test_a_product_is_that_of_numpy(data: st.DataObject, planes: int):
    case = data.draw(products(planes, st.integers(1, 8)))
    check_product(launch.w4_gemv(planes=planes, **sizes(case)), case)


@pytest.mark.parametrize("tactic", TACTICS, ids=lambda tactic: tactic.variant.name)
@settings(max_examples=3)
@given(st.data())
def test_each_of_tensorrts_tactics_takes_any_number_of_rows(
    tactic: launch.Tactic, data: st.DataObject
):
    tiles, rest = data.draw(st.integers(0, 3)), data.draw(st.integers(1, tactic.rows))
    planes = int(tactic.variant.constants["PLANES"])
    case = data.draw(products(planes, st.just(tiles * tactic.rows + rest)))
    job = launch.product(tactic, **sizes(case))
    assert job.launches[0].grid[1] == tiles + 1
    check_product(job, case)


@pytest.mark.parametrize("tactic", TACTICS, ids=lambda tactic: tactic.variant.name)
def test_one_weight_is_seen_by_one_output(tactic: launch.Tactic):
    """Every place of the layout, on its own: a wrong place cannot hide in a sum."""
    depth, columns = 64, 33
    planes = [
        (np.arange(depth * columns).reshape(depth, columns) * step % 16 - 8).astype(np.int8)
        for step in (7, 5)[: int(tactic.variant.constants["PLANES"])]
    ]
    scales = np.ones((2, columns), np.float16)
    x = np.eye(depth, dtype=np.float16)
    job = launch.product(tactic, depth, columns, depth, group=32)
    buffers, _ = execute(job, x=x, weights=pack_weights(planes), scales=scales)
    weights = sum(plane.astype(int) * 16**n for n, plane in enumerate(planes))
    assert (buffers["y"].array == weights).all()


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    batch, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    tokens = draw(st.integers(1, 8) | st.sampled_from([15, 16, 17, 33]))
    heads = draw(st.integers(1, 12 if tokens <= 8 else 3))
    width = draw(st.sampled_from([64, 128]))
    capacity = draw(st.sampled_from([1, 63, 64, 65, 128, 200, 300]))
    starts = draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch))
    rows, new = (batch, groups, capacity, width), (batch, groups, tokens, width)
    return {
        "query": draw(halves((batch, groups * heads, tokens, width), 8.0)),
        "keys": draw(halves(rows, 8.0)),
        "values": draw(halves(rows)),
        "new_keys": draw(halves(new, 8.0)),
        "new_values": draw(halves(new)),
        "positions": (np.array(starts)[:, None] + np.arange(tokens)).astype(np.int32),
    }


def check_attention(case: dict[str, Any], tile: int | None, join: int | None) -> None:
    """Run it: the numbers, and that each row that counts is read once per tile, and no other."""
    batch, all_heads, tokens, width = case["query"].shape
    _, groups, capacity, _ = case["keys"].shape
    starts = case["positions"][:, 0]
    for sequence, start in enumerate(starts):  # a read of these would be seen in the sums
        case["keys"][sequence, :, start:] = np.nan
        case["values"][sequence, :, start:] = np.nan
    heads = all_heads // groups
    job = attention(batch, groups, heads, tokens, width, capacity, tile=tile, join=join)
    buffers, trace = execute(job, **case)
    exact = reference.attention(**case)
    # Weights are FP16 in the second product: half a unit of each, of values up to the largest.
    size = max(np.nanmax(np.abs(case[name]), initial=0) for name in ("values", "new_values"))
    assert (np.abs(buffers["output"].array - exact) <= 2.5e-3 * float(size) + 1e-6).all()
    tiles = job.launches[0].grid[0]
    rows = part_tactics(width)[0 if "rows16" in job.launches[0].variant.name else 1].rows
    last = (np.minimum((np.arange(tiles) + 1) * rows, heads * tokens) - 1) // heads
    old = np.where(np.arange(capacity) < starts[:, None], tiles, 0)
    new = (last[:, None] >= np.arange(tokens)).sum(0)
    for name in ("keys", "values"):
        assert (trace.reads(buffers[name]) == old[:, None, :, None]).all(), name
        assert (trace.reads(buffers[f"new_{name}"]) == new[:, None]).all(), f"new {name}"
    assert (trace.writes(buffers["output"]) == 1).all()
    assert (trace.reads(buffers["query"]) >= 1).all()


@settings(max_examples=3 * EXAMPLES)
@given(attentions(), st.sampled_from([0, 1]), st.sampled_from([0, 1]))
def test_attention_is_that_of_numpy_and_reads_no_row_that_does_not_count(
    case: dict[str, Any], tile: int, join: int
):
    check_attention(case, tile, join)


@pytest.mark.parametrize(("tile", "join"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_over_many_parts(tile: int, join: int, tokens: int):
    """More parts than are joined at once, and rows that do not divide evenly among them."""
    random = np.random.default_rng(0)
    capacity, width = 1500, 64
    shapes = {
        "query": (2, 2, tokens, width),
        **dict.fromkeys(("keys", "values"), (2, 1, capacity, width)),
        **dict.fromkeys(("new_keys", "new_values"), (2, 1, tokens, width)),
    }
    case = {
        name: random.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()
    }
    starts = np.array([[1497], [130]])
    case["positions"] = (starts + np.arange(tokens)).astype(np.int32)
    check_attention(case, tile, join)


@pytest.mark.parametrize("position", [-(2**31), -1, 2**31 - 1])
def test_impossible_positions_access_no_memory_out_of_bounds(position: int):
    """TensorRT times kernels on inputs that it makes up."""
    job = attention(2, 1, 2, 3, 64, 200)
    inputs: dict[str, Any] = {
        name: np.zeros(*job.buffers[name])
        for name in ("query", "keys", "values", "new_keys", "new_values")
    }
    buffers, trace = execute(job, positions=np.full((2, 3), position, np.int32), **inputs)
    for addresses in (*trace.loads, *trace.stores):
        assert np.any([each.holds(addresses) for each in buffers.values()], axis=0).all()
    # The join does not know the capacity: beyond it, it adds up parts that nobody wrote.
    assert position > 200 or (buffers["output"].array == 0).all()


@st.composite
def logits(draw: st.DrawFn) -> tuple[NDArray[np.float16], int]:
    """Rows, and how many of each are to be kept."""
    rows = draw(st.integers(1, 2))
    columns = draw(
        st.sampled_from(
            [1, 63, 300, PART_LOGITS - 1, PART_LOGITS, PART_LOGITS + 1, 3 * PART_LOGITS + 17]
        )
    )
    keep = draw(st.sampled_from([1, 2, 64, 255, 256, 257, 1000, 1024]).filter(columns.__ge__))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = ["normal", "few values", "equal", "zeros", "falling", "masked", "wide", "strange"]
    kind = draw(st.sampled_from(kinds))
    values = (random.standard_normal((rows, columns)) * 5).astype(np.float16)
    if kind == "few values":
        values = random.integers(-2, 3, values.shape).astype(np.float16)
    elif kind == "equal":
        values[...] = values[0, 0]
    elif kind == "zeros":
        values = np.copysign(np.zeros_like(values), values)
    elif kind == "falling":
        values = np.linspace(6e4, -6e4, columns).astype(np.float16)[None].repeat(rows, 0)
    elif kind == "masked":
        values[random.random(values.shape) < 0.9] = -np.inf
    elif kind == "wide":
        values = random.integers(0, 1 << 16, values.shape).astype(np.uint16).view(np.float16)
        values[~np.isfinite(values)] = -np.inf
    elif kind == "strange":
        few = [np.inf, -np.inf, np.nan, -np.nan, 1]
        values = random.choice(few, values.shape).astype(np.float16)
    return values, keep


BIG = (np.arange(151_936) * 7 % 1009).reshape(1, -1).astype(np.float16)


@settings(max_examples=EXAMPLES)
@given(logits())
@example((np.full((1, 1025), -np.inf, np.float16), 70))
@example((BIG, 256))
@example((np.full((1, 64 * PART_LOGITS), 3, np.float16), 1024))
def test_the_largest_logits_and_the_mass_of_the_others_are_those_of_numpy(
    given: tuple[NDArray[np.float16], int],
):
    values, keep = given
    (rows, columns), unread = values.shape, np.full(keep, np.nan, np.float32)
    buffers, trace = execute(top_k(rows, columns, keep), logits=values, keep=unread)
    best, places, rest = reference.top_k(values, keep)
    np.testing.assert_array_equal(buffers["values"].array, best)
    assert not np.signbit(buffers["values"].array[best == 0]).any()
    np.testing.assert_array_equal(buffers["places"].array, places)
    found = buffers["rest"].array[:, 0].astype(np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(rest))
    known = ~np.isnan(rest)
    bound = reference.top_k_error() * rest + 2 * columns * 2.0**-126
    assert (np.abs(found - rest)[known] <= bound[known]).all()
    assert (trace.reads(buffers["logits"]) == 1).all()
    assert (trace.writes(buffers["keys"]) == 1).all()
    assert (trace.writes(buffers["places"]) == 2).all()  # in order of place, and sorted
    assert (trace.reads(buffers["keep"]) == 0).all()


@settings(max_examples=EXAMPLES)
@given(st.integers(0, 2**32), st.sampled_from([-0x80000000, 0x7FFF0000]), st.floats(0, 1))
def test_impossible_keys_access_no_memory_out_of_bounds(seed: int, key: int, share: float):
    """TensorRT times the second kernel on whatever is in memory; `run` looks at each address."""
    job, random = top_k(1, 9000, 70), np.random.default_rng(seed)
    buffers = {
        name: Buffer(
            random.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
        )
        for name, (shape, dtype) in job.buffers.items()
    }
    buffers["keys"].array[random.random(buffers["keys"].array.shape) < share] = key
    run([job.launches[1]], buffers, own_sort=True)


def test_tritons_sort_gives_the_same():
    values = (np.arange(70)[None] * 29 % 41).astype(np.float16)
    found = [
        execute(top_k(1, 70, 9), own_sort=own, logits=values, keep=np.zeros(9, np.float32))[0]
        for own in (True, False)
    ]
    for name in ("keys", "values", "places", "rest"):
        assert (found[0][name].array == found[1][name].array).all()


def test_every_variant_was_run():
    """Shapes that the tests above draw lead to each kernel that is compiled."""
    jobs = [
        *(launch.w4_gemv(r, 1, 32, group=32, planes=p) for r in range(1, 9) for p in (1, 2)),
        *(launch.w4_gemm(9, 1, 32, group=32, planes=p) for p in (1, 2)),
        *(attention(1, 1, 17, n, w, 64) for n in (1, 300) for w in (64, 128)),
        *(attention(1, 1, 1, 1, w, 64, join=n) for n in (0, 1) for w in (64, 128)),
        *(top_k(1, 300, keep) for keep in (256, 257)),
    ]
    used = {each.variant.name for job in jobs for each in job.launches}
    assert used == set(BY_NAME) == {variant.name for variant in VARIANTS}
