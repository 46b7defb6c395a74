"""The compiled kernels in the package, their manifest, and which of them a GPU gets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.backends.tensorrt.launch_rules import PLUGINS, number_of_parts, room
from edge.bundle.schemes import HIGH_PLANE
from edge.errors import ConfigError, DependencyError, IntegrityError
from engines.kernels import launch
from engines.kernels.attention import attention, join_tactics, part_tactics
from engines.kernels.layout import pack_weights, unpack_weights
from engines.kernels.own_plugins import TACTICS
from engines.kernels.package import DATA, choose_architecture, load_cubins, load_ptx
from engines.kernels.top_k import top_k
from engines.kernels.variants import ARCHITECTURES, BY_NAME, VARIANTS
from export.quantize.packing import split_planes, unpack_int4
from tools.kernels.compile import make_portable
from tools.kernels.sass import budget, read_sass, resident_warps

MANIFEST = json.loads((DATA / "manifest.json").read_text("utf-8"))


def test_the_package_has_every_kernel_for_every_architecture():
    assert {int(name) for name in MANIFEST["architectures"]} == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        cubins = load_cubins(f"{architecture // 10}.{architecture % 10}")
        assert set(cubins) == set(BY_NAME)
        for variant in VARIANTS:
            assert cubins[variant.name].threads == 32 * variant.warps
            cubin = cubins[variant.name]
            assert cubin.entry == variant.name
            assert b".text." + cubin.entry.encode() + b"\0" in cubin.image


def test_tensorrts_tactics_are_in_the_package_as_ptx():
    found = load_ptx()
    assert tuple(TACTICS) == PLUGINS
    variants = [tactic.variant for planes in (1, 2) for tactic in launch.w4_tactics(planes)]
    for width in (64, 128):
        variants += [tile.variant for tile in (*part_tactics(width), *join_tactics(width))]
    variants += [each.variant for keep in (256, 257) for each in top_k(1, 300, keep).launches]
    assert {variant.name for variant in variants} == set(found) == set(BY_NAME)
    for variant in variants:
        ptx = found[variant.name]
        assert ptx.text.startswith(".version 8.0\n.target sm_80\n")
        assert re.findall(r"\.entry (\w+)", ptx.text) == [ptx.entry] == [variant.name]
        assert f".reqntid {ptx.threads}\n" in ptx.text
        assert ptx.threads == 32 * variant.warps
        # TensorRT passes these, in this order, and nothing behind them.
        sizes = {"*fp16": "u64", "*fp32": "u64", "*i32": "u64", "i32": "u32"}
        expected = [sizes[kind] for kind in variant.parameters.values()]
        assert re.findall(r"^\s*\.param \.(u\d+)", ptx.text, re.MULTILINE) == expected
        # What a launch may have without being asked for.
        assert ptx.shared_bytes <= 48 * 1024


@pytest.mark.parametrize("planes", [1, 2])
def test_the_order_of_tactics_is_fixed(planes: int):
    """Engines keep a tactic by its number."""
    assert [(each.variant.name, each.rows, each.columns) for each in launch.w4_tactics(planes)] == [
        *((f"w4_gemv_rows{rows}_planes{planes}", rows, 64) for rows in (1, 2, 4, 8)),
        (f"w4_gemm_planes{planes}", 128, 64),
    ]


@pytest.mark.parametrize("width", [64, 128])
def test_the_order_of_attention_tactics_is_fixed(width: int):
    parts = [(each.variant.name, each.rows) for each in part_tactics(width)]
    assert parts == [(f"attention_parts_rows{n}_width{width}", n) for n in (16, 64)]
    joins = [(each.variant.name, each.rows) for each in join_tactics(width)]
    assert joins == [(f"attention_join_rows{n}_width{width}", n) for n in (1, 8)]


@pytest.mark.parametrize("jetson", ["87", "110"])
def test_nothing_is_spilled_on_a_jetson_and_the_package_stays_small(jetson: str):
    records = MANIFEST["architectures"][jetson].values()
    assert all(record["spilled_bytes"] == 0 for record in records)
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2_000_000


@pytest.mark.parametrize(
    ("capability", "taken"),
    [("8.7", 87), ("8.6", 86), ("8.8", 86), ("8.9", 89), ("9.0", 90), ("10.3", 100), ("11.0", 110)],
)
def test_a_gpu_gets_its_own_code_or_that_of_an_older_one_of_its_generation(
    capability: str, taken: int
):
    assert choose_architecture(capability, [80, 86, 87, 89, 90, 100, 110]) == taken


@pytest.mark.parametrize("capability", ["7.5", "11.1", "13.0"])
def test_a_gpu_that_nothing_is_compiled_for_gets_none(capability: str):
    with pytest.raises(DependencyError, match=f"this GPU has {capability}"):
        load_cubins(capability)


def test_an_orin_runs_no_code_of_other_gpus():
    with pytest.raises(DependencyError, match=r"this GPU has 8\.7"):
        choose_architecture("8.7", [80, 86])


def test_a_damaged_file_is_refused(tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    manifest: dict[str, Any] = json.loads(json.dumps(MANIFEST))
    manifest["architectures"]["87"]["top_k_parts"]["offset"] += 1
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"top_k_parts .* damaged.*install"):
        load_cubins("8.7", data)
    manifest["ptx"]["w4_gemm_planes1"]["bytes"] -= 1
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"w4_gemm_planes1 .* damaged.*install"):
        load_ptx(data)
    (data / "manifest.json").write_text(json.dumps(MANIFEST))
    (data / "ptx.xz").unlink()
    with pytest.raises(IntegrityError, match=r"do not read.*ptx\.xz"):
        load_ptx(data)
    (data / "sm87.xz").write_bytes((DATA / "sm87.xz").read_bytes()[:-20])
    with pytest.raises(IntegrityError, match="do not read"):
        load_cubins("8.7", data)


def test_the_kernels_order_holds_the_exporters_integers():
    """An INT8 weight goes through the exporter's two planes of ONNX INT4, and comes back."""
    random = np.random.default_rng(0)
    weights = random.integers(-128, 120, (96, 5)).astype(np.int8)
    planes = [unpack_int4(packed, weights.shape) for packed in split_planes(weights)]
    packed = pack_weights(planes)
    assert packed.nbytes == weights.nbytes
    low, high = unpack_weights(packed)
    assert (low.astype(int) + HIGH_PLANE * high.astype(int) == weights).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: launch.w4_gemv(9, 64, 64, group=32), "1 to 8 rows, not 9"),
        (lambda: launch.w4_gemv(1, 64, 64, group=16), "not 16"),
        (lambda: launch.w4_gemv(1, 64, 96, group=64), "multiple of the group 64, not 96"),
        (lambda: launch.w4_gemv(1, 64, 64, group=32, planes=3), "not 3"),
        (lambda: launch.w4_gemm(9, 64, 96, group=64), "w4_gemm .* group 64, not 96"),
        (lambda: launch.w4_gemm(0, 64, 64, group=64), "at least one row"),
        (lambda: launch.w4_tactics(3), "not 3"),
        (lambda: attention(1, 1, 1, 1, 96, 64), "not 96"),
        (lambda: attention(0, 1, 1, 1, 64, 64), "at least one sequence"),
        (lambda: attention(1, 1, 1, 0, 64, 64), "token and cache row, not 1, 1, 1, 0"),
        (lambda: top_k(1, 1 << 19, 256), "up to 262144"),
        (lambda: top_k(0, 300, 256), "at least one row"),
        (lambda: top_k(1, 300, 301), "not 1 of 300 and 301"),
        (lambda: top_k(1, 3000, 1025), "top_k keeps 1 to 1024 logits, not 1025"),
        (lambda: pack_weights([np.zeros((33, 2), np.int8)]), "multiple of 32, not 33"),
        (lambda: pack_weights([np.zeros((32, n), np.int8) for n in (1, 2)]), "same shape"),
    ],
)
def test_unsupported_sizes_are_refused(make: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize("rows", [1, 12, 96, 128, 129, 4096, 4097, 8192, 8193, 200_000])
def test_parts_of_an_attention_fill_a_gpu_and_their_sums_have_room(rows: int):
    parts = number_of_parts(rows)
    assert 1 <= parts <= 64
    assert parts * rows <= room(rows) == max(8192, rows)
    assert parts == 64 or (parts + 1) * rows > 8192


def test_attention_launches_follow_from_shapes():
    few, many = attention(2, 3, 4, 2, 64, 500), attention(2, 3, 4, 400, 64, 500)
    assert few.launches[0].variant.name == "attention_parts_rows16_width64"
    assert few.launches[0].grid == (1, 6, 64)
    assert few.launches[1].variant.name == "attention_join_rows1_width64"
    assert few.launches[1].grid == (48, 1, 1)
    assert many.launches[0].variant.name == "attention_parts_rows64_width64"
    assert many.launches[0].grid == (25, 6, 1)
    assert many.launches[1].variant.name == "attention_join_rows8_width64"
    assert many.launches[1].grid == (1200, 1, 1)


@pytest.mark.parametrize(
    ("rows", "columns", "keep", "grids", "last"),
    [
        (1, 151_936, 256, [(38, 1, 1), (1, 1, 1)], "top_k_merge_most256"),
        (8, 32_000, 257, [(8, 8, 1), (8, 1, 1)], "top_k_merge_most1024"),
        (3, 1, 1, [(1, 3, 1), (3, 1, 1)], "top_k_merge_most256"),
    ],
)
def test_best_logits_launches_follow_from_shapes(
    rows: int, columns: int, keep: int, grids: Any, last: str
):
    job = top_k(rows, columns, keep)
    assert [each.grid for each in job.launches] == grids
    assert [each.variant.name for each in job.launches] == ["top_k_parts", last]
    assert job.buffers["keys"][0] == (rows, grids[0][0], keep)
    # As `edge.bundle.io_spec.best_outputs` has them.
    found = [job.buffers[name] for name in job.outputs]
    kinds = [np.float16, np.int32, np.float32]
    assert found == [((rows, n), np.dtype(k)) for n, k in zip((keep, keep, 1), kinds, strict=True)]


PTX = """//
// Generated by LLVM NVPTX Back-End
//

.version 8.0
.target sm_80
.address_size 64

	// .globl	w4_gemv // -- Begin function w4_gemv
.visible .entry w4_gemv(
{parameters}
)
.reqntid 128
{{
	ld.param.b64 	%rd1, [w4_gemv_param_{loaded}]; // a load
	ret;
}}
"""


def make_ptx(parameters: int = 12, loaded: int = 9) -> str:
    names = [f"\t.param .u64 .ptr .global .align 1 w4_gemv_param_{n}" for n in range(parameters)]
    return PTX.format(parameters=",\n".join(names), loaded=loaded)


def test_ptx_loses_tritons_two_parameters_and_gets_the_name_of_its_variant():
    variant = BY_NAME["w4_gemv_rows4_planes2"]
    lines = make_portable(make_ptx(), variant).splitlines()
    assert lines[3] == f".visible .entry {variant.name}("
    assert lines[13].endswith(f" {variant.name}_param_9")
    assert lines[14:] == [
        ")",
        ".reqntid 128",
        "{",
        f"\tld.param.b64 \t%rd1, [{variant.name}_param_9];",
        "\tret;",
        "}",
    ]


@pytest.mark.parametrize(
    ("ptx", "said"),
    [
        (make_ptx(loaded=10), "uses scratch memory, w4_gemv_param_10"),
        (make_ptx(loaded=11), "uses scratch memory, w4_gemv_param_11"),
        (make_ptx(parameters=11), "other PTX than expected"),
        (make_ptx().replace("sm_80", "sm_80a"), "other PTX than expected"),
        (make_ptx().replace("8.0", "8.7"), "other PTX than expected"),
    ],
)
def test_ptx_that_an_engine_could_not_run_is_refused(ptx: str, said: str):
    with pytest.raises(RuntimeError, match=said):
        make_portable(ptx, BY_NAME["w4_gemv_rows4_planes2"])


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @P0  LDG.E.128 R4, [R2.64] ;
.L_x_2:
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/              @P1  BRA `(.L_x_2) ;
        /*0040*/             @!UP0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   BRA `(.L_x_3);
"""


def test_loops_and_loads_are_read_from_machine_code():
    sass = read_sass(SASS)
    assert sass.loops == ((2, 3), (1, 4))
    assert sass.count("LDG.E.128", *sass.loops[1]) == 1
    assert sass.count("LDG.E.128", *sass.loops[0]) == 0


def test_the_orins_limits():
    assert budget(1) == pytest.approx(7.3, abs=0.05)
    assert resident_warps({"threads": 256, "registers": 64, "shared_bytes": 0}) == 32
    assert resident_warps({"threads": 256, "registers": 32, "shared_bytes": 0}) == 48
    assert resident_warps({"threads": 128, "registers": 32, "shared_bytes": 80 * 1024}) == 8
