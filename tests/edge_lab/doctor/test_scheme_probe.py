"""The graphs of the scheme probe: a real builder takes them, and ONNX Runtime computes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto

from edge.bundle.onnx_file import Node, OnnxFile
from edge_lab.doctor import machine, scheme_probe
from edge_lab.doctor.machine import Machine
from edge_lab.doctor.scheme_probe import SCHEMES, Verdict, probe_schemes
from export.graph.block_rotation import rotate_blocks
from tests.conftest import require_kernels
from tests.makers.goldens import FP16_KERNELS
from tests.standins.cuda import FakeGpu
from tests.standins.inspector import inspector_json
from tests.standins.network import Planted
from tests.standins.tensorrt import emptied, install


def test_tensorrt_for_rtx_builds_every_scheme() -> None:
    pytest.importorskip("tensorrt_rtx")
    verdicts = list(probe_schemes("tensorrt_rtx", "8.6", widths=(500, 640)))
    assert [verdict.scheme for verdict in verdicts] == list(SCHEMES)
    for verdict in verdicts:
        assert verdict.built, verdict
        assert verdict.detail == "built"  # no driver here opens the plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("10.3.0.30", {"attention": "rule opset", "kv-update": "rule opset"}),
        ("10.13.3.9", {"attention": "rule operators", "kv-update": "rule operators"}),
        ("10.16.2.10", {"w8a8": "rule int8-half-scale"}),
        ("11.4.0.106", {}),
    ],
)
def test_each_tensorrt_takes_what_the_table_of_rules_says(
    version: str, refused: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stand-in, which knows no more of the schemes than their graphs."""
    gpu = FakeGpu()
    install(monkeypatch, gpu, version=version)
    gpu.push()  # TensorRT takes the primary context by itself
    with emptied(gpu):
        verdicts = {each.scheme: each for each in probe_schemes()}
        gpu.pop()
    assert list(verdicts) == list(SCHEMES)
    assert {name for name, each in verdicts.items() if not each.built} == set(refused)
    for name, words in refused.items():
        assert words in verdicts[name].detail


def test_int4_is_tried_in_every_group_at_the_widths_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs are rounded up to whole groups: the 1.5B has such widths, SmolLM2 has not."""
    seen: dict[str, tuple[Any, ...]] = {}

    def look(_trt: Any, graph: bytes, _sm: Any) -> tuple[bool, str]:
        file = OnnxFile(graph)
        names = [TensorProto.FromString(data) for data in file.initializers]
        shapes = {each.name: tuple(each.dims) for each in names}
        kinds = [name for name in SCHEMES if name not in seen]
        seen[kinds[0]] = tuple(
            (shapes[name], shapes[name.replace(".weight", ".scale")])
            for name in shapes
            if name.endswith(".weight")
        )
        return True, "built"

    monkeypatch.setattr(scheme_probe, "_try", look)
    assert len(list(probe_schemes("math", widths=(576, 1536)))) == len(SCHEMES)
    for group in (32, 64, 128):
        one = (640, 1536), (640 // group, 1536)
        assert seen[f"int4-g{group}"] == (one,)
        assert seen[f"int4-planes-g{group}"] == (one, one)


def test_attention_without_a_kernel_of_its_own_is_told_by_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu()
    install(monkeypatch, gpu, planted=Planted(no_fused="no tactic for head_dim 128"))
    gpu.push()
    with emptied(gpu):
        (verdict,) = (each for each in probe_schemes() if each.scheme == "attention")
        gpu.pop()
    assert verdict.built
    assert "in several kernels only; in one: " in verdict.detail
    assert "no tactic for head_dim 128" in verdict.detail


@pytest.mark.parametrize(
    ("operator", "words"), [("MatMul", "must have same input types"), ("Frobnicate", "Frobnicate")]
)
def test_the_reason_is_tensorrts_own(
    operator: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")

    def make() -> bytes:
        weight = scheme_probe._weight("w", "fp32", (256, 64), bytes(4 * 256 * 64))
        return scheme_probe._matmul_model([Node(operator, ["x", "w"], ["y"])], [weight])

    monkeypatch.setattr(scheme_probe, "SCHEMES", {"fp16": SCHEMES["fp16"]._replace(make=make)})
    (verdict,) = probe_schemes("tensorrt_rtx", "8.6")
    assert not verdict.built
    assert words in verdict.detail


@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_graphs_mean_what_they_say(name: str) -> None:
    """Each on ONNX Runtime, against plain arithmetic."""
    ort = pytest.importorskip("onnxruntime")
    if name in ("attention", "kv-update"):
        require_kernels("native")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    scheme = SCHEMES[name]
    graph = scheme.make(scheme.group, (384, 72)) if scheme.group else scheme.make()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    kv = 7
    feeds: dict[str, Any] = {}
    for each in session.get_inputs():
        shape = [{"batch": 1, "kv": kv}.get(size, size) for size in each.shape]
        if each.type == "tensor(float16)":
            feeds[each.name] = random.integers(-3, 4, shape).astype(np.float16)
        elif each.type == "tensor(bool)":
            feeds[each.name] = (np.arange(kv) < 5).reshape(shape)
        else:
            feeds[each.name] = np.array([3], dtype=np.int64)
    (found,) = session.run(None, feeds)
    assert found.dtype == np.float16
    if name == "kv-update":
        wanted = feeds["past"].copy()
        wanted[:, :, 3:4] = feeds["new"]
        assert np.array_equal(found, wanted)
    elif name == "attention":
        blind = {**feeds, "k": feeds["k"].copy(), "v": feeds["v"].copy()}
        blind["k"][:, :, 5:], blind["v"][:, :, 5:] = 9, 9  # masked rows do not count
        assert np.array_equal(session.run(None, blind)[0], found)
    else:
        planes = 2 if name.startswith("int4-planes") else 1
        inputs = feeds["x"].astype(np.float32)
        if name == "w8a8-token":
            inputs = rotate_blocks(inputs[0], 64)[None]
            largest = np.abs(inputs).max(axis=-1, keepdims=True)
            inputs = np.clip(np.round(inputs / largest * 128), -128, 127) / 128 * largest
        elif name.startswith("w8a8"):
            inputs = np.clip(np.round(inputs * 128), -128, 127) / 128
        wanted = np.broadcast_to(inputs.sum(-1, keepdims=True) * planes / 128, found.shape)
        # Two planes are two sums of FP16, which Arm rounds before it adds them.
        atol = 2e-2 if FP16_KERNELS else 1e-2
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=atol)


def test_attention_in_several_kernels_only_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def build(_trt: Any, _graph: bytes, _sm: Any, *, decomposable: bool) -> tuple[bool, str, bool]:
        asked.append(decomposable)
        return decomposable, "built" if decomposable else "no tactic for head_dim 128", True

    monkeypatch.setattr(scheme_probe, "_build", build)
    built, detail = scheme_probe._try(None, b"", None)
    assert built
    assert asked == [False, True]
    assert detail == "built, in several kernels only; in one: no tactic for head_dim 128"


def test_the_verdict_lists_the_engines_layers(tiny_bundles: Any) -> None:
    from edge.bundle.manifest import read_manifest

    text = inspector_json(read_manifest(tiny_bundles("qwen2", quant="int4")), unpacked=("lm_head",))
    engine = SimpleNamespace(
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _form: text)
    )
    trt = SimpleNamespace(
        Runtime=lambda _logger: SimpleNamespace(deserialize_cuda_engine=lambda _plan: engine),
        LayerInformationFormat=SimpleNamespace(JSON=1),
    )
    found = scheme_probe._describe(trt, None, b"")
    assert "gemv_w4a16_sm80 (int4)" in found
    assert found.endswith("UNPACKS its weights each time")


def test_the_child_answers_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    spawn = machine._spawn_probe
    monkeypatch.setattr(
        machine,
        "_spawn_probe",
        lambda *asked, module: spawn(*asked, "tensorrt_rtx", "8.6", module=module),
    )
    verdicts, failure = Machine().schemes((100, 64))
    assert failure is None
    assert [verdict.scheme for verdict in verdicts] == list(SCHEMES)


def test_a_child_that_ends_on_the_way_leaves_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    line = msgspec.json.encode(Verdict("fp16", True, "built", 0.1)).decode()
    monkeypatch.setattr(
        machine,
        "_spawn_probe",
        lambda *_, **__: (f"{line}\n{line[:9]}", [], "it crashed with SIGSEGV"),
    )
    verdicts, failure = Machine().schemes()
    assert [verdict.scheme for verdict in verdicts] == ["fp16"]
    assert failure == "it crashed with SIGSEGV"


def test_a_missing_module_is_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = machine._spawn_probe
    monkeypatch.setattr(
        machine,
        "_spawn_probe",
        lambda *asked, module: spawn(*asked, "tensorrt_of_nobody", module=module),
    )
    verdicts, failure = Machine().schemes()
    assert verdicts == []
    assert failure == "ModuleNotFoundError: No module named 'tensorrt_of_nobody'"
