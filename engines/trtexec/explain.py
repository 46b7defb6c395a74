"""``edge-llm trtexec-explain``: finds what is wrong with an old ``trtexec`` line, and what to use.

Most lines in tutorials are for TensorRT 8 or older; ``trtexec`` of TensorRT 10 stops at the options
that are gone.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from edge.bundle.io_spec import DIALECTS
from edge.bundle.manifest import MANIFEST_NAME, read_manifest
from edge.cli.options import json_option
from edge.errors import ConfigError
from engines.config import BuildConfig
from engines.rules.table import Release

from .options import TRT_VERSIONS, lifetime, options, show

State = Literal["works", "deprecated", "no effect", "not yet", "removed", "unknown"]

# What each option did, and what replaces it now.
_MEANING: dict[str, tuple[str, str]] = {
    "onnx": ("the graph to build from", ""),
    "saveEngine": ("where the engine goes", ""),
    "batch": (
        "batch size of engines with an implicit batch (Caffe, UFF); it never went with ONNX",
        "the batch is a dimension of the inputs: --minShapes, --optShapes, --maxShapes, --shapes",
    ),
    "maxBatch": (
        "largest batch of engines with an implicit batch (Caffe, UFF)",
        "--maxShapes, as for --batch",
    ),
    "output": (
        "names of the outputs of a Caffe or UFF model",
        "leave it out: an ONNX file names its own outputs",
    ),
    "explicitBatch": ("made the batch a dimension of the inputs", "leave it out: it always is"),
    "explicitPrecision": ("took precision from the graph (experiment)", "--stronglyTyped"),
    "workspace": ("scratch memory in MiB", "--memPoolSize=workspace:N"),
    "buildOnly": ("built without running", "--skipInference"),
    "model": ("a Caffe model", "convert it to ONNX, then --onnx"),
    "deploy": ("the prototxt of a Caffe model", "convert it to ONNX, then --onnx"),
    "uff": ("a TensorFlow UFF model", "convert it to ONNX, then --onnx"),
    "uffInput": ("an input of a UFF model", "leave it out: ONNX names its inputs"),
    "uffNHWC": ("layout of a UFF model", "leave it out"),
    "minTiming": ("least number of timings of a kernel", "--avgTiming"),
    "nvtxMode": ("how much the profiler sees", "--profilingVerbosity"),
    "heuristic": ("chose kernels by a heuristic", "--builderOptimizationLevel"),
    "nativeInstanceNorm": ("native InstanceNorm", "leave it out: it is the default"),
    "ni": ("native InstanceNorm", "leave it out: it is the default"),
    "fp16": (
        "let TensorRT choose FP16 kernels for an FP32 graph",
        "types in the graph: edge-llm export --quant fp16, then --stronglyTyped",
    ),
    "bf16": (
        "let TensorRT choose BF16 kernels for an FP32 graph",
        "types in the graph: edge-llm export --quant bf16, then --stronglyTyped",
    ),
    "int8": (
        "let TensorRT choose INT8 kernels after a calibration",
        "quantized weights in the graph: edge-llm export --quant int8, then --stronglyTyped",
    ),
    "int4": (
        "let TensorRT choose INT4 kernels",
        "quantized weights in the graph: edge-llm export --quant int4, then --stronglyTyped",
    ),
    "fp8": ("let TensorRT choose FP8 kernels", "types in the graph (an Orin has no FP8)"),
    "best": ("let TensorRT choose any precision", "types in the graph, then --stronglyTyped"),
    "calib": ("calibration file of --int8", "scales in the graph: edge-llm export --quant int8"),
    "precisionConstraints": ("made layers obey --layerPrecisions", "types in the graph"),
    "layerPrecisions": ("types of single layers", "types in the graph"),
    "layerOutputTypes": ("output types of single layers", "types in the graph"),
    "weightless": ("an engine without its weights", "--stripWeights"),
    "useCudaGraph": ("run from a CUDA graph", "leave it out: it is the default from 11.0 on"),
    "useSpinWait": ("wait for the GPU by spinning", "leave it out: it is the default from 11.0 on"),
    "noDataTransfers": ("time without copies", "leave it out: it is the default from 11.0 on"),
    "separateProfileRun": (
        "profile in a run of its own",
        "leave it out: it always does from 11.0 on",
    ),
    "stronglyTyped": (
        "takes the types from the graph, as we do",
        "leave it out from 11.0 on: it always does",
    ),
}
_WEAK_TYPING = {"fp16", "bf16", "int8", "int4", "fp8", "best"}
_NO_EFFECT_SINCE_11 = {
    "stronglyTyped", "useCudaGraph", "useSpinWait", "noDataTransfers", "separateProfileRun",
}  # fmt: skip
_RENAMED = {"workspace": "--memPoolSize=workspace:", "minTiming": "--avgTiming="}
_RENAMED_FLAGS = {"buildOnly": "--skipInference", "weightless": "--stripWeights"}
# TensorRT's API deprecated weak typing in this version; the option parser has warned since.
_WEAK_TYPING_DEPRECATED: Release = (10, 12)


@dataclass(frozen=True)
class ExplainedOption:
    """One option of the line.

    Attributes:
        text: the option as written in the line.
        state: what ``trtexec`` of the asked version does with it.
        note: one sentence for people.
        replacement: what to write instead; empty if the option stays.
    """

    text: str
    state: State
    note: str
    replacement: str


@dataclass(frozen=True)
class Explanation:
    """The meaning of a whole line, and what to use instead.

    Attributes:
        version: TensorRT's version that the answer is for.
        options: each option in order.
        verdict: whether the line runs, and why not.
        translated: the same line for the same file, in options of that version.
        steps: commands to run for a language model: the export if needed, then the build.
    """

    version: str
    options: tuple[ExplainedOption, ...]
    verdict: str
    translated: str
    steps: tuple[str, ...]


def explain(line: str, version: Release) -> Explanation:
    """Explain a ``trtexec`` line for a version of TensorRT.

    Raises:
        ConfigError: the line is not one of ``trtexec``.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"cannot read the line ({error}); close its quotes") from error
    if not words or Path(words[0]).name != "trtexec":
        raise ConfigError(
            "the line does not start with trtexec; give it as it is, "
            "e.g. edge-llm trtexec-explain trtexec --onnx=model.onnx --fp16"
        )
    explained = tuple(_explain_option(word, version) for word in words[1:])
    stopping = [option.text for option in explained if option.state in _STOPPING]
    if stopping:
        verdict = (
            f"trtexec of TensorRT {show(version)} does not know {', '.join(stopping)} and stops "
            "before it reads the model."
        )
    else:
        verdict = f"trtexec of TensorRT {show(version)} takes every option of this line."
    return Explanation(
        version=show(version),
        options=explained,
        verdict=verdict,
        translated=shlex.join([words[0], *_translate(words[1:], version)]),
        steps=_steps(words[1:], version),
    )


_STOPPING = ("removed", "unknown", "not yet")


def _split(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name.removeprefix("--"), value


def _explain_option(word: str, version: Release) -> ExplainedOption:
    name, _ = _split(word)
    known = lifetime(name) if word.startswith("--") else None
    if word == "-h":
        return ExplainedOption(word, "works", "prints the help", "")
    if known is None:
        return ExplainedOption(
            word, "unknown", "no trtexec from TensorRT 8.6 to 11.1 has such an option", ""
        )
    meaning, replacement = _MEANING.get(name, ("", ""))
    if f"--{name}" not in options(version):
        if known.added is not None and version < known.added:
            note = _join(meaning, f"comes with TensorRT {show(known.added)}")
            return ExplainedOption(word, "not yet", note, "")
        assert known.removed is not None
        gone = f"gone since TensorRT {show(known.removed)}"
        return ExplainedOption(word, "removed", _join(meaning, gone), replacement)
    if name in _WEAK_TYPING and version >= _WEAK_TYPING_DEPRECATED:
        note = _join(meaning, "deprecated, gone in TensorRT 11.0")
        return ExplainedOption(word, "deprecated", note, replacement)
    if name in _NO_EFFECT_SINCE_11 and version >= (11, 0):
        return ExplainedOption(word, "no effect", meaning, "leave it out")
    if name in _WEAK_TYPING:
        return ExplainedOption(word, "works", _join(meaning, "gone in TensorRT 11.0"), replacement)
    return ExplainedOption(word, "works", meaning, "")


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _translate(words: list[str], version: Release) -> list[str]:
    known = options(version)
    result = []
    for word in words:
        name, value = _split(word)
        if f"--{name}" in known or word == "-h":
            if not (name in _NO_EFFECT_SINCE_11 and version >= (11, 0)):
                result.append(word)
        elif name in _RENAMED and value:
            result.append(_RENAMED[name] + value)
        elif name in _RENAMED_FLAGS:
            result.append(_RENAMED_FLAGS[name])
    return result


def _steps(words: list[str], version: Release) -> tuple[str, ...]:
    from .command import command_for_bundle, format_command

    given = dict(_split(word) for word in words)
    path = Path(given.get("onnx", ""))
    if path.suffix == ".onnx" and (path.parent / MANIFEST_NAME).is_file():
        manifest = read_manifest(path.parent)
        if path.name == manifest.graphs.decoder:
            prefill = min(BuildConfig.max_prefill, manifest.kv_capacity)
            line = command_for_bundle(BuildConfig(path.parent, max_prefill=prefill), version)
            return (format_command(line),)
    quant = next((name for name in ("int4", "int8", "bf16") if name in given), "fp16")
    dialect = "native" if version >= DIALECTS["native"].min_tensorrt else "portable"
    bundle = f"bundles/{path.stem or 'model'}-{quant}"
    trt = next(name for name, known in TRT_VERSIONS.items() if known == version)
    return (
        f"edge-llm export SOURCE -o {bundle} --quant {quant} --dialect {dialect}",
        f"edge-llm build {bundle} --print-trtexec --trt {trt}",
    )


@click.command("trtexec-explain", context_settings={"ignore_unknown_options": True})
@click.argument("line", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--trt",
    type=click.Choice(list(TRT_VERSIONS)),
    default="10.16",
    show_default=True,
    help="TensorRT to explain it for: 10.3 (JetPack 6), 10.16 (JetPack 7.2), 11.4 (7.2.2).",
)
@json_option
def trtexec_explain(line: tuple[str, ...], trt: str, as_json: bool) -> None:
    """Explain an old trtexec LINE, and print the one to use.

    LINE begins with trtexec and may be quoted, as one argument, or not.
    """
    from edge.cli import echo_json

    first, *rest = line
    if rest and len(first.split()) > 1:
        raise ConfigError(f"{rest[0]!r} follows the quoted line; put it into the quotes")
    # A quoted line arrives whole; otherwise the shell has removed the quotes within it.
    explanation = explain(shlex.join(line) if rest else first, TRT_VERSIONS[trt])
    if as_json:
        echo_json(asdict(explanation))
        return
    width = max((len(option.text) for option in explanation.options), default=0)
    for option in explanation.options:
        note = _join(f"{option.state}: {option.note}" if option.note else option.state)
        click.echo(f"{option.text:<{width}}  {note}")
        if option.replacement:
            click.echo(f"{'':<{width}}  now: {option.replacement}")
    click.echo(f"\n{explanation.verdict}")
    click.echo(f"\nThe same file, in options of TensorRT {trt}:\n  {explanation.translated}")
    click.echo("\nFor a language model with a KV cache, use:")
    for step in explanation.steps:
        click.echo(f"  {step}")
