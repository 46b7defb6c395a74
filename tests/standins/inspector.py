"""What TensorRT's engine inspector prints for a decoder, in the layout of TensorRT 10 and of 11.

The layers are invented; names, keys and forms are those of real ones: a compiled block is ``gemm``
for products, ``kgen`` for kernels that the compiler wrote, ``Reformat`` for layouts; fused
attention is ``_gemm_mha_v2`` with many queries and ``_gemv_mha_v1`` with one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from edge.bundle.manifest import Manifest

_TYPES = {"fp16": "Half", "bf16": "BFloat16", "int4": "Int4", "int8": "Int8"}
_SEPARATOR = "\x1f"


def inspector_json(
    manifest: Manifest,
    *,
    release: tuple[int, int] = (10, 16),
    detailed: bool = True,
    fused: bool = True,
    unpacked: tuple[str, ...] = (),
    own: tuple[str, ...] = (),
    copies_cache: bool = False,
    profiles: Sequence[int] = (0, 1),
) -> str:
    """JSON of an engine with the profiles prefill, decode and perhaps others.

    Args:
        manifest: of the bundle.
        release: of TensorRT; 11.0 changed the keys of tensors.
        detailed: False is an engine whose layers have names only.
        fused: attention in one kernel.
        unpacked: linear layers whose weights a kernel of its own writes as floats.
        copies_cache: one layer's cache is reformatted before it is read.
        own: linear layers and attentions that plugins compute, and the search for best logits.
        profiles: those that are told of.
    """
    layers = [
        _finish(layer, profile, release)
        for profile in profiles
        for layer in _layers(manifest, profile, fused, unpacked, own)
    ]
    if copies_cache:
        floats = _TYPES[manifest.dtype]
        for profile in profiles:
            copy = _layer("Reformatting CopyNode 1", "Reformat", [floats], [floats], "0x3e8", [])
            copy["Inputs"][0]["Name"] = "past_key_values.0.key"
            layers.append(_finish(copy, profile, release))
    names = ["inputs_embeds", "logits"]
    found: dict[str, Any] = {"Layers": layers if detailed else [each["Name"] for each in layers]}
    if release < (11, 0):
        # Of all profiles, whichever the layers are of.
        found["Bindings"] = [*names, *(f"{name} [profile 1]" for name in names)]
    else:
        found["I/O Tensors"] = [{"Name": name, "DataType": "Half"} for name in names]
    return json.dumps(found)


def layer_names(manifest: Manifest, profile: int, own: tuple[str, ...] = ()) -> list[str]:
    """Names that a profiler reports for the layers of a profile, as the inspector has them."""
    text = inspector_json(manifest, own=own, profiles=[profile])
    return [each["Name"] for each in json.loads(text)["Layers"]]


def _layers(
    manifest: Manifest, profile: int, fused: bool, unpacked: tuple[str, ...], own: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    floats = _TYPES[manifest.dtype]
    yield _layer("Reformatting CopyNode for Input Tensor 0 to {ForeignNode[mask]}", "Reformat", [
        "Int64"
    ], ["Int64"], "0x00000000000003ea", [])  # fmt: skip
    for i in range(manifest.model.num_layers):
        name = f"layers.{i}"
        yield _layer(
            f"__myl_MulMeaAddSqrDivMul_myl0_{i}",
            "kgen",
            ["Float", floats],
            [floats],
            "__myl_MulMeaAddSqrDivMul_0x4c6f",
            [f"{name}.input_norm.out/RMSNormalization", f"{name}.attention_residual/Add"],
        )
        yield from _linear(manifest, f"{name}.qkv", floats, unpacked, own)
        attention = f"{name}.attended/Attention"
        if f"{name}.attention" in own:
            for part, reads, writes in (("parts", floats, "Float"), ("join", "Float", floats)):
                node = f"{name}.attention/attention_{part}"
                yield _layer(node, "PluginV3", [reads, "Int32"], [writes], "0x1", [node])
        elif fused:
            kernel = "_gemv_mha_v1" if profile == 1 else "_gemm_mha_v2"
            nodes = [f"present.{i}.key.read/Slice", attention]
            yield _layer(f"{kernel}_myl0_{i}", "kgen", [floats, "Bool"], [floats], kernel, nodes)
        else:
            for part in ("gemm", "kgen", "gemm"):
                tactic = "sm80_xmma_gemm_f16f16_f16f16_f16_tn" if part == "gemm" else "MaxSubExp"
                yield _layer(
                    f"attend_{part}_myl0_{i}", part, [floats], [floats], tactic, [attention]
                )
        for linear in ("o", "gate_up", "down"):
            yield from _linear(manifest, f"{name}.{linear}", floats, unpacked, own)
    yield from _linear(manifest, "lm_head", floats, unpacked, own)
    if "top_k" in own:
        kept = ["Int32", "Float"]
        for part, read, wrote in (("parts", [floats, "Float"], kept), ("merge", kept, [floats])):
            node = f"top_k/top_k_{part}"
            yield _layer(node, "PluginV3", read, wrote, "0x1", [node])


def _linear(
    manifest: Manifest, name: str, floats: str, unpacked: tuple[str, ...], own: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    if name in own:
        inputs = [floats, "Int32", floats, floats]
        node = f"{name}/w4_linear"
        yield _layer(node, "PluginV3", inputs, [floats], "0x0000000000000001", [node])
        return
    scheme = manifest.quantization.linears[name].scheme.kind
    nodes = ["logits/MatMul" if name == "lm_head" else f"{name}.out/MatMul"]
    if scheme == "float":
        kernel = "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n"
        yield _layer(f"{name}_myl0", "gemm", [floats, floats], [floats], kernel, nodes)
        return
    packed = "Int8" if scheme == "w8a8" else _TYPES.get(scheme, "Int4")
    unpack = f"{name}.dequantized/DequantizeLinear"
    if name in unpacked:
        yield _layer(f"__myl_Deq_{name}", "kgen", [packed, floats], [floats], "__myl_Deq", [unpack])
        yield _layer(f"{name}_myl0", "gemm", [floats, floats], [floats], "f16f16_gemm", nodes)
        return
    kernel = "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n" if scheme == "w8a8" else "gemv_w4a16_sm80"
    inputs = ["Int8", "Int8"] if scheme == "w8a8" else [floats, packed, floats]
    yield _layer(f"{name}_myl0", "gemm", inputs, [floats], kernel, [unpack, *nodes])


def _layer(
    name: str, kind: str, reads: list[str], writes: list[str], tactic: str, nodes: list[str]
) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": f"in{i}", "Dimensions": [1, 8], "T": t} for i, t in enumerate(reads)],
        "Outputs": [
            {"Name": f"out{i}", "Dimensions": [1, 8], "T": t} for i, t in enumerate(writes)
        ],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": _SEPARATOR.join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def _finish(layer: dict[str, Any], profile: int, release: tuple[int, int]) -> dict[str, Any]:
    if profile:
        layer["Name"] += f" [profile {profile}]"
    for tensor in [*layer["Inputs"], *layer["Outputs"]]:
        dtype = tensor.pop("T")
        if release < (11, 0):
            # A layer outside of the compiler describes its layout, too.
            described = layer["LayerType"] == "Reformat"
            tensor["Format/Datatype"] = f"Row major linear {dtype} format" if described else dtype
        else:
            tensor["Format"], tensor["Datatype"] = "Row major linear", dtype
    return layer
