"""The arithmetic of an 8-bit cache: rounding, packing, and scales that a graph lacks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from msgspec import structs

from edge.bundle import io_spec
from edge.bundle.graph_scales import graph_scales
from edge.bundle.kv_scales import (
    dequantize_rows,
    pack_rows,
    quantize_rows,
    read_scales,
    scales_section,
    scales_sha256,
    unpack_rows,
)
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.errors import BackendError, BundleError, IntegrityError
from edge.model.cache import Rows, cache_tensors
from tests.conftest import Bundles
from tests.standins.slot_rows import by_name, stacked, tensor_name

SHAPE = (2, 3, 4)
SCALES = st.floats(2.0**-14, 8.0, width=32)


@given(
    codes=arrays.arrays(np.int8, SHAPE),
    scale=arrays.arrays(np.float32, (2, 1, 4), elements=SCALES),
)
def test_rows_read_as_floats_are_written_back_as_they_were(codes: Any, scale: Any) -> None:
    floats = dequantize_rows(codes, scale)
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(quantize_rows(floats, scale), codes)


@given(
    rows=arrays.arrays(np.float32, SHAPE, elements=st.floats(-900, 900, width=32)),
    scale=arrays.arrays(np.float32, (2, 1, 4), elements=SCALES),
)
def test_rounding_errs_by_half_a_step_and_saturates(rows: Any, scale: Any) -> None:
    found = dequantize_rows(quantize_rows(rows, scale), scale)
    inside = np.clip(rows, -128 * scale, 127 * scale)
    assert (np.abs(found - inside) <= scale * np.float32(0.5001)).all()


@given(
    data=st.data(),
    planes=st.integers(1, 4),
    length=st.integers(0, 3),
    dtype=st.sampled_from(["fp32", "fp16"]),
)
def test_packed_rows_come_back(data: Any, planes: int, length: int, dtype: Any) -> None:
    shape = (planes, 2, length, 4)
    in_int8 = data.draw(st.sets(st.integers(0, planes - 1)))
    scale = np.full((2, 1, 4), 0.25, np.float32)
    scales = dict.fromkeys(map(tensor_name, in_int8), scale)
    kinds: dict[str, Any] = {
        tensor_name(at): "int8" if at in in_int8 else dtype for at in range(planes)
    }
    codes = data.draw(arrays.arrays(np.int8, shape))
    rows = (codes / 4).astype(dtype.replace("fp", "float"))
    packed = pack_rows(by_name(rows), scales)
    tensors = {name: Rows(2, 4, kind) for name, kind in kinds.items()}
    assert packed.nbytes == length * sum(each.row_bytes for each in tensors.values())
    found = unpack_rows(packed, tensors, length, scales)
    np.testing.assert_array_equal(stacked(found), rows)
    for name, array in found.items():
        assert array.dtype == (np.float32 if name in scales or dtype == "fp32" else np.float16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    rows = np.zeros(SHAPE, np.float32)
    rows[1, 2, 3] = value
    with pytest.raises(BackendError, match="not finite"):
        quantize_rows(rows, np.ones((2, 1, 4), np.float32))


def test_the_hash_knows_values_and_places() -> None:
    one, two = np.full((2, 1, 4), 0.5, np.float32), np.full((2, 1, 4), 0.25, np.float32)
    assert scales_sha256({}) == ""
    made = {"0.key": one}, {"0.value": one}, {"0.key": two}, {"0.key": one, "1.key": two}
    found = {scales_sha256(each) for each in made}
    assert len(found) == 4


def test_a_graph_without_a_scale_is_refused(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    manifest = read_manifest(bundle)
    path = bundle / manifest.graphs.cpu
    data = path.read_bytes()
    scales = graph_scales(OnnxFile(data), manifest, path)
    assert list(scales) == list(cache_tensors(manifest.model, "fp32"))
    name = io_spec.cache_scale("1.value").encode()
    renamed = OnnxFile(data.replace(name, name[:-1] + b"x"))
    with pytest.raises(BundleError, match=r"layers\.1\.v\.cache_scale are missing.*--kv-cache"):
        graph_scales(renamed, manifest, path)
    raw = scales["1.value"].astype("<f4").tobytes()
    for wrong in (0.0, -1.0, np.nan, np.inf):
        bad = np.float32(wrong).tobytes() + raw[4:]
        with pytest.raises(BundleError, match="not above zero"):
            graph_scales(OnnxFile(data.replace(raw, bad)), manifest, path)


def test_the_manifest_repeats_what_the_graphs_hold(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    manifest = read_manifest(bundle)
    assert "kv_scales" in manifest.extras
    for name in (manifest.graphs.decoder, manifest.graphs.cpu):
        path = bundle / name
        held = graph_scales(OnnxFile(path.read_bytes()), manifest, path)
        found = read_scales(bundle, manifest, name)
        assert scales_sha256(found) == scales_sha256(held) != ""
        older = structs.replace(manifest, extras={})
        assert scales_sha256(read_scales(bundle, older, name)) == scales_sha256(held)


def test_a_damaged_graph_of_an_older_bundle_gives_no_scales(
    tiny_bundles: Bundles, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2", "portable", kv_cache="int8"), bundle)
    older = structs.replace(read_manifest(bundle), extras={})
    path = bundle / older.graphs.decoder
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match=older.graphs.decoder):
        read_scales(bundle, older, older.graphs.decoder)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf, "short", "long"])
def test_scales_that_do_not_fit_are_refused(tiny_bundles: Bundles, wrong: float | str) -> None:
    bundle = tiny_bundles("qwen2", "portable", kv_cache="int8")
    manifest = read_manifest(bundle)
    scales = dict(read_scales(bundle, manifest, manifest.graphs.cpu))
    if wrong == "short":
        del scales["0.key"]
    elif wrong == "long":
        scales["2.key"] = scales["0.key"]
    else:
        last = scales["1.value"]
        scales["1.value"] = np.where(np.arange(last.shape[-1]) == 1, wrong, last)
    extras = {"kv_scales": scales_section(scales)}
    with pytest.raises(BundleError, match=r"section kv_scales has not .* above zero.*--kv-cache"):
        read_scales(bundle, structs.replace(manifest, extras=extras), manifest.graphs.cpu)
