"""Lists the rules for each version of TensorRT, each with its source.

A `Rule` has steps: a value holds from a release on, until the next step. So the table also answers
for releases between the columns of `VERSIONS`. Where sources disagree, the rule takes the stricter
one and its ``note`` says so. The note also says if the source is not NVIDIA's.

Sources: ``NvInfer.h`` is include/NvInfer.h of github.com/NVIDIA/TensorRT at a tag, with its lines;
``operators.md`` and ``onnxOpImporters.cpp`` are from github.com/onnx/onnx-tensorrt at the commit
that the tag names as its parser. The parser's source was read at 10.1 and 10.16, its list of
operators at 11.1 too. For 11.2 and newer only release notes were read: their steps are those of
11.1, with the operator DFT from 11.2 on and opset 25 from 11.5 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge.bundle.engine_file import Flavour

Release = tuple[int, int]


@dataclass(frozen=True)
class Version:
    """A version of TensorRT.

    Attributes:
        name: release such as ``10.3``, or ``rtx``.
        release: major and minor version.
        where: device that has this version.
    """

    name: str
    release: Release
    flavour: Flavour = "tensorrt"
    where: str = ""

    def __str__(self) -> str:
        return f"TensorRT {self.name}" if self.flavour == "tensorrt" else "TensorRT for RTX"


VERSIONS: tuple[Version, ...] = (
    Version("10.3", (10, 3), where="JetPack 6.1 and 6.2"),
    Version("10.7", (10, 7), where="JetPack 6.2 after an upgrade"),
    Version("10.13", (10, 13), where="JetPack 7.0 and 7.1 (Thor)"),
    Version("10.16", (10, 16), where="JetPack 7.2"),
    Version("11.1", (11, 1), where="no Jetson"),
    Version("11.4", (11, 4), where="JetPack 7.2.2, as a package"),
    Version("rtx", (1, 7), "tensorrt-rtx", where="GeForce RTX, and edge-llm check"),
)
LAST_CONFIRMED: Release = (11, 1)
"""The newest release whose header and list of operators were read."""


def version_of(flavour: Flavour, release: Release) -> Version:
    """Find the column of an installed TensorRT, or make one between two columns."""
    if flavour == "tensorrt-rtx":
        return VERSIONS[-1]
    for version in VERSIONS:
        if version.release == release and version.flavour == flavour:
            return version
    return Version(f"{release[0]}.{release[1]}", release)


@dataclass(frozen=True)
class Step:
    """A value of a rule that holds from a release on, until the next step.

    Attributes:
        since: the first release.
        value: value that the rule's check compares with; None if the rule does not hold.
        source: where NVIDIA writes it.
    """

    since: Release
    value: Any
    source: str


@dataclass(frozen=True)
class Rule:
    """One rule about the graphs that TensorRT takes.

    Attributes:
        name: name for people and for ``--json``.
        says: what TensorRT takes; ``{value}`` is the step's value.
        instead: what to export instead.
        steps: steps by release, ascending.
        rtx: step for TensorRT for RTX; None if the rule does not hold there.
        refuses: False if a graph that breaks the rule may still work; it is then a warning.
        note: disagreement between sources, or what could not be confirmed.
    """

    name: str
    says: str
    instead: str
    steps: tuple[Step, ...]
    rtx: Step | None
    refuses: bool = True
    note: str = ""

    def sentence(self, step: Step) -> str:
        """Say what TensorRT takes, with the value of a step."""
        value = step.value
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return self.says.replace("{value}", shown)

    def at(self, version: Version) -> Step | None:
        """Find the step that holds for a version; None if the rule does not."""
        if version.flavour == "tensorrt-rtx":
            return self.rtx
        found = None
        for step in self.steps:
            if step.since <= version.release:
                found = step
        return found if found is not None and found.value is not None else None


_RTX = (1, 0)
_COMPILED = "compiled with TensorRT for RTX 1.7.1"
_PARSER = "onnxOpImporters.cpp, QuantDequantLinearHelper (TensorRT 10.16: 6bde659)"
_AGAIN = "export the bundle again with this edge-llm"
_PLAIN_EXPORT = "export without own operators: edge-llm export writes plain ONNX only"


def _always(value: Any, source: str) -> tuple[Step, ...]:
    return (Step((10, 0), value, source),)


def _everywhere(value: Any, source: str) -> tuple[tuple[Step, ...], Step]:
    return _always(value, source), Step(_RTX, value, f"{source}; taken for RTX too")


# Marked ``Y`` in operators.md of TensorRT 10.0; all but DeformConv also in 10.1's (96e7811).
_OPERATORS_10_0 = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
GreaterOrEqual GridSample GroupNormalization GRU HardSigmoid HardSwish Hardmax Identity If
ImageScaler InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization
Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or Pad ParametricSoftplus Pow PRelu
QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize ReverseSequence RNN RoiAlign Round ScaledTanh Scan Scatter
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
Unsqueeze Upsample Where Xor
"""
_NEWER_OPERATORS: tuple[tuple[Release, str], ...] = (
    ((10, 1), "DeformConv"),
    ((10, 4), "BlackmanWindow HammingWindow HannWindow"),
    ((10, 5), "STFT"),
    ((10, 14), "Attention"),
    ((10, 15), "RotaryEmbedding RMSNormalization TensorScatter"),
    ((11, 0), "Swish"),
    ((11, 2), "DFT"),
)
OPERATOR_SINCE: dict[str, Release] = {
    **dict.fromkeys(_OPERATORS_10_0.split(), (10, 0)),
    **{name: since for since, names in _NEWER_OPERATORS for name in names.split()},
}
"""ONNX operators, and the first TensorRT whose parser has them."""

_BLOCK_INT8_INSTEAD = "export the bundle again: INT8 weights are two INT4 planes since then"
_HEADER_10_3_BLOCK = "NvInfer.h v10.3.0:5332-5334, 5496 (v10.7.0:5468-5472, 5506)"
_HEADER_10_13_BLOCK = (
    "NvInfer.h v10.13.3:5564, v10.16:5719, v11.1:5544; INT8 is in no header. The builder's own "
    "message on 10.7 names INT4 only"
)

_GRAPH_RULES = (
    Rule(
        "opset",
        "the parser takes opset {value} at most",
        "export with --target jetpack6 (dialect portable, opset 21)",
        (
            Step((10, 0), 21, "INT4 QuantizeLinear, which is opset 21: Changelog.md of 10.0"),
            Step((10, 9), 22, "release notes of TensorRT 10.9; not confirmed"),
            Step(
                (10, 13),
                24,
                "release notes of TensorRT 10.13; confirmed for 10.15 to 11.1: operators.md "
                "(fa5aa9f, 6bde659, 7c51a63)",
            ),
            Step((11, 5), 25, "release notes of TensorRT 11.5"),
        ),
        Step(_RTX, 24, _COMPILED),
        note="The guide for 11.x says 25, operators.md of 11.1 and the notes of 11.5 say from 11.5 "
        "on: stricter taken. A newer opset is imported with what the parser knows of older ones.",
    ),
    Rule(
        "opset-documented",
        "opset {value} is the newest that the parser's documents name",
        "nothing: blocked INT4 begins with opset 21, and the parser reads it",
        (
            Step((10, 0), 20, "operators.md of TensorRT 10.1 (96e7811), first lines"),
            Step((10, 9), None, "release notes of TensorRT 10.9; not confirmed"),
        ),
        None,
        refuses=False,
        note="operators.md says 20 and Changelog.md of 10.0 has INT4, which needs 21. The stricter "
        "one would forbid INT4 altogether, so this is a warning.",
    ),
    Rule(
        "operators",
        "the parser does not have every operator of ONNX",
        "export with --target jetpack6 (dialect portable), whose operators are older",
        _always(
            OPERATOR_SINCE,
            "operators.md of TensorRT 10.1 (96e7811) and 11.1 (7c51a63); CHANGELOG.md of "
            "NVIDIA/TensorRT for 10.14, 10.15, 11.0; release notes of 11.2",
        ),
        Step(_RTX, OPERATOR_SINCE, f"{_COMPILED}: those of 10.15, so Swish and DFT are not taken"),
    ),
    Rule(
        "domain",
        "an operator of another domain needs a plugin",
        _PLAIN_EXPORT,
        *_everywhere(("",), "onnxOpImporters.cpp, FallbackPluginImporter (6bde659)"),
    ),
    Rule(
        "subgraph",
        "a graph inside a node is not checked here",
        _PLAIN_EXPORT,
        *_everywhere(("If", "Loop", "Scan"), "this table: it covers the graph's own nodes"),
        note="TensorRT takes If, Loop and Scan; what they hold would go unchecked.",
    ),
    Rule(
        "io-types",
        "inputs and outputs are of {value}",
        _AGAIN,
        *_everywhere(
            ("fp32", "fp16", "bf16", "int64", "int32", "int8", "bool", "uint8", "fp8"),
            "operators.md of TensorRT 10.1 (96e7811) and 11.1 (7c51a63), types; "
            "IKVCacheUpdateLayer, IAttention: floats",
        ),
        note="DOUBLE is taken with its values clamped: not taken here. INT4 and FP4 come from "
        "constants or QuantizeLinear only.",
    ),
)

_QUANTIZE_RULES = (
    Rule(
        "quantized-type",
        "QuantizeLinear and DequantizeLinear are for {value}",
        "export with --quant int4, int8, int8-w8a8 or fp16",
        (
            Step((10, 0), ("int8", "int4", "fp8"), "NvInfer.h v10.3.0:5348, 5468"),
            Step((10, 13), ("int8", "int4", "fp8", "fp4"), "NvInfer.h v10.13.3:5417, 5540"),
        ),
        Step(_RTX, ("int8", "int4", "fp8", "fp4"), "guide of TensorRT for RTX, quantized types"),
        note="QuantizeLinear without a zero point is UINT8 in ONNX and INT8 in the parser: other "
        "numbers, so refused.",
    ),
    Rule(
        "block-type",
        "scales of blocks go with {value} only",
        _BLOCK_INT8_INSTEAD,
        (
            Step((10, 0), ("int4",), _HEADER_10_3_BLOCK),
            Step((10, 13), ("int4", "fp8", "fp4"), _HEADER_10_13_BLOCK),
        ),
        None,
        note="onnxOpImporters.cpp checks shapes only and lets INT8 through to the builder: the "
        "header is stricter. FP4 and FP8 came between 10.7 and 10.13; taken from 10.13 on.",
    ),
    Rule(
        "block-int8-unpacked",
        "INT8 blocks are compiled, and unpacked to FP16 in every step",
        _BLOCK_INT8_INSTEAD,
        (),
        Step(_RTX, ("int4", "fp8", "fp4"), f"{_COMPILED}: scratch of all unpacked weights"),
        refuses=False,
        note="No document of TensorRT for RTX names INT8 blocks; it compiles them.",
    ),
    Rule(
        "block-rank",
        "scales of blocks go with matrices of two dimensions",
        _AGAIN,
        *_everywhere(2, "NvInfer.h v10.3.0:5333, 5496"),
        note="From 10.7 on the header wants the rank of the input, and a rank of at most 2 for the "
        "scale (v10.7.0:5463): 2 is taken everywhere.",
    ),
    Rule(
        "block-constant",
        "scales of blocks go with constants (weights)",
        _AGAIN,
        *_everywhere(True, "NvInfer.h v10.3.0:5496-5497, v10.7.0:5506"),
        note="The header of 10.13 and newer no longer says so: the older one is taken everywhere.",
    ),
    Rule(
        "block-shape",
        "a block's scale has the weight's shape, but for one of the last two dimensions, which it "
        "divides",
        _AGAIN,
        *_everywhere(True, f"NvInfer.h v10.3.0:5461-5463, v10.16:5685-5687; {_PARSER}"),
    ),
    Rule(
        "block-size",
        "a block has an even number of weights",
        "export with --group-size 32, 64 or 128",
        *_everywhere(2, f"{_PARSER}: 4-bit tensors have an even number of elements"),
        note="No source names sizes of blocks. Two INT4 weights share a byte, so odd ones are "
        "refused: not confirmed by NVIDIA.",
    ),
    Rule(
        "block-size-tried",
        "blocks of {value} were compiled",
        "export with --group-size 32, 64 or 128",
        *_everywhere((32, 64, 128), f"{_COMPILED}; ModelOpt's ONNX export takes 64 and 128"),
        refuses=False,
        note="No source names sizes of blocks.",
    ),
    Rule(
        "int4-constant",
        "INT4 is for weights only",
        "export with --quant int8-w8a8 for inputs in INT8",
        *_everywhere(("int4",), "guide of TensorRT 10.11 and 11.3, quantized types"),
    ),
    Rule(
        "int4-even",
        "a 4-bit tensor has an even number of elements",
        _AGAIN,
        *_everywhere(("int4", "fp4"), _PARSER),
    ),
    Rule(
        "scale-type",
        "scales are of {value}",
        _AGAIN,
        *_everywhere(("fp32", "fp16", "bf16"), f"{_PARSER}; NvInfer.h v10.3.0:5476"),
        note="E8M0 scales need an operator of TensorRT's own.",
    ),
    Rule(
        "scale-positive",
        "every scale is above zero and finite",
        f"{_AGAIN}: it clamps scales to 2^-14",
        *_everywhere(
            True, f"NvInfer.h v10.3.0:5460 (positive), v10.13.3:5529 (strictly); {_PARSER}"
        ),
        note="NVIDIA names the sign only; infinity passes the parser and is refused here.",
    ),
    Rule(
        "scale-constant",
        "scales are constants",
        _AGAIN,
        (
            Step((10, 0), True, "NvInfer.h v10.3.0:5465, v10.7.0:5475"),
            Step((10, 13), None, "NvInfer.h v10.13.3:5514-5540: no such sentence"),
        ),
        None,
    ),
    Rule(
        "scale-input-type",
        "the input of QuantizeLinear has the type of its scale",
        _AGAIN,
        (
            Step((10, 0), ("fp32", "fp16", "bf16"), "NvInfer.h v10.3.0:5345, v10.7.0:5354"),
            Step((10, 13), ("fp16", "bf16"), "NvInfer.h v10.13.3:5413-5414, v11.1:5367-5368"),
        ),
        Step(_RTX, ("fp16", "bf16"), "as TensorRT 10.13"),
    ),
    Rule(
        "zero-point",
        "zero points are constants of zeros, of the quantized type",
        _AGAIN,
        *_everywhere(True, f"NvInfer.h v10.3.0:5330, 5457, v11.1:5506; {_PARSER}"),
    ),
    Rule(
        "channel-scale",
        "scales per channel go with constants, one for each index of a valid axis",
        "export with --quant int8-w8a8, whose inputs have one scale",
        *_everywhere(True, f"NvInfer.h v10.3.0:5486-5487, v11.1:5534; {_PARSER}"),
    ),
    Rule(
        "operand-scales",
        "both operands of a product in INT8 have scales of one type",
        _AGAIN,
        *_everywhere(
            True, "TensorRT for RTX 1.7.1, Myelin: type mismatch between matmul operand scales"
        ),
        note="Seen with TensorRT for RTX only, with a Cast between each scale and the product.",
    ),
    Rule(
        "int8-half-scale",
        "an input in INT8 with a scale in 16 bits may not build on an Orin",
        "export with --target jetpack7, which gives these scales in FP32",
        (
            Step((10, 16), ("fp16", "bf16"), "github.com/NVIDIA/TensorRT/issues/4832 (open)"),
            Step((11, 0), None, "not reported for 11"),
        ),
        None,
        note="Reported for 10.16.2 on sm_87 with a network of convolutions whose DequantizeLinear "
        "has a float output; the same file builds on sm_110. Not tried with a decoder.",
    ),
    Rule(
        "int8-weight-only",
        "INT8 weights with float inputs are unpacked in every step",
        "export with --quant int4, or --quant int8-w8a8",
        *_everywhere(
            ("int8",), f"guide of TensorRT 10.11: weight-only is for INT4; {_COMPILED}: unpacked"
        ),
        refuses=False,
    ),
    Rule(
        "quantized-use",
        "quantized constants feed DequantizeLinear only",
        _AGAIN,
        *_everywhere(
            ("int8", "int4", "fp8", "fp4"),
            "operators.md (96e7811, 7c51a63), note on quantized types; a Gather of an INT8 table "
            "was refused by TensorRT for RTX 1.7.1",
        ),
    ),
)

_OPERATOR_RULES = (
    Rule(
        "int8-moved",
        "the parser's list has no INT8 for {value}",
        "export without --kv-cache int8 where the build fails",
        _always(
            ("Slice", "Unsqueeze", "Transpose"),
            "operators.md of TensorRT 10.1 (96e7811) and 10.16 (6bde659)",
        ),
        None,
        refuses=False,
        note="The parser's importers let INT8 pass, and TensorRT for RTX 1.7.1 compiles it.",
    ),
    Rule(
        "attention-causal",
        "Attention takes its mask as an input",
        _AGAIN,
        *_everywhere(
            True,
            "onnxOpImporters.cpp, Attention (6bde659): is_causal becomes addAttention(causal), "
            "which is upper-left (NvInfer.h v11.1:7017)",
        ),
        note="Not an error in TensorRT: in decode the query would see the first key only.",
    ),
    Rule(
        "attention-inputs",
        "Attention has query, key, value and mask, and one output",
        _AGAIN,
        *_everywhere(4, "operators.md of TensorRT 10.16 (6bde659) and 11.1 (7c51a63)"),
        note="onnxOpImporters.cpp (6bde659) refuses past_key and past_value and ignores "
        "nonpad_kv_seqlen, which gives wrong answers without an error: all are refused.",
    ),
    Rule(
        "attention-attributes",
        "Attention is taken without {value}",
        _AGAIN,
        *_everywhere(
            ("softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads"),
            "operators.md of TensorRT 10.16 (6bde659) and 11.1 (7c51a63)",
        ),
        note="The parser also reshapes inputs of 3 dimensions by the numbers of heads; "
        "operators.md wants 4: stricter taken.",
    ),
    Rule(
        "attention-rank",
        "query, key, value and mask of Attention have four dimensions",
        _AGAIN,
        *_everywhere(4, "operators.md (6bde659, 7c51a63); NvInfer.h v10.16:7053-7061"),
    ),
    Rule(
        "attention-types",
        "query, key and value are of one float type, the mask is bool or of the same",
        _AGAIN,
        *_everywhere(
            ("fp32", "fp16", "bf16"), "NvInfer.h v10.16:7053-7063 and v11.1, class IAttention"
        ),
    ),
    Rule(
        "kv-update",
        "TensorScatter updates an input of four dimensions along the third, and its result is an "
        "output",
        _AGAIN,
        *_everywhere(
            4,
            "operators.md (6bde659, 7c51a63): 4D, axis -2; NvInfer.h v10.15:9024-9055, "
            "addKVCacheUpdate: in place, linear mode only",
        ),
        note=f"operators.md writes axis -2; 2 is the same axis, and was {_COMPILED}.",
    ),
    Rule(
        "kv-static",
        "heads, rows and head size of the cache are numbers",
        _AGAIN,
        *_everywhere(
            (1, 2, 3),
            f"NvInfer.h v10.15:9036, shape of `cache` (batch may be dynamic: {_COMPILED})",
        ),
        note="The header gives the shape without saying static; a dynamic capacity was not tried.",
    ),
    Rule(
        "kv-types",
        "cache and update are of one float type",
        _AGAIN,
        *_everywhere(("fp32", "fp16", "bf16"), "NvInfer.h v10.15:9040-9041, addKVCacheUpdate"),
    ),
    Rule(
        "rotary-positions",
        "position_ids of RotaryEmbedding are INT64",
        _AGAIN,
        *_everywhere("int64", "operators.md of TensorRT 10.16 (6bde659) and 11.1 (7c51a63)"),
    ),
    Rule(
        "topk",
        "TopK sorts, and a constant K is below {value}",
        "ask for fewer",
        *_everywhere(
            3840, "operators.md (96e7811, 7c51a63): less than 3840; NvInfer.h v10.3.0:6672: up to"
        ),
        note="The header takes 3840 itself, operators.md does not: stricter taken.",
    ),
    Rule(
        "constant-axes",
        "axes are constants",
        _AGAIN,
        *_everywhere(
            ("Squeeze", "Unsqueeze", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"),
            "operators.md of TensorRT 10.1 (96e7811) to 11.1 (7c51a63)",
        ),
        note="Changelog.md of 10.7 has dynamic axes for Squeeze and Unsqueeze, operators.md of "
        "11.1 wants constants: stricter taken.",
    ),
)

RULES: tuple[Rule, ...] = (*_GRAPH_RULES, *_QUANTIZE_RULES, *_OPERATOR_RULES)
"""All rules, in the order in which they are checked and reported."""
