"""A build by ``trtexec`` knows its layers: a stand-in writes the file that the real one writes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge.bundle.manifest import read_manifest
from edge.device.gpu import Gpu
from edge.errors import BuildError
from edge_lab.cli.inspect import inspect
from edge_make.engine_layers import parse_inspector, read_layers
from engines.builder import record
from engines.builder import target as target_module
from engines.builder.build import BuildResult, build_engine
from engines.builder.target import Target
from engines.compiler.compat import TensorRT
from engines.config import BuildConfig
from engines.trtexec.options import options
from tests.standins.inspector import inspector_json

PROFILES = ("prefill", "decode")
# The inspector's text as ``trtexec`` writes it: objects one per line, ``},{`` between layers, names
# of tensors with their places. The layout is that of a file in NVIDIA/TensorRT issue 4020 (24.06).
TEXT = """\
{"Layers": [{
  "Name": "Reformatting CopyNode for Input Tensor 0 to lm_head",
  "LayerType": "Reformat",
  "Inputs": [
  {
    "Name": "last_hidden",
    "Location": "Device",
    "Dimensions": [1,1,64],
    "Format/Datatype": "Row major linear FP32"
  }],
  "Outputs": [
  {
    "Name": "Reformatted Input Tensor 0 to lm_head",
    "Location": "Device",
    "Dimensions": [1,1,64],
    "Format/Datatype": "Row major Int8 format"
  }],
  "ParameterType": "Reformat",
  "Origin": "REFORMAT",
  "TacticValue": "0x00000000000003e8",
  "StreamId": 0,
  "Metadata": ""
},{
  "Name": "lm_head_myl0_7 [profile 1]",
  "LayerType": "gemm",
  "Inputs": [
  {
    "Name": "__mye1",
    "Dimensions": [1,1,64],
    "Format/Datatype": "N/A due to dynamic shapes"
  },
  {
    "Name": "lm_head.weight",
    "Dimensions": [64,320],
    "Format/Datatype": "Int4"
  }],
  "Outputs": [
  {
    "Name": "logits",
    "Dimensions": [1,1,320],
    "Format/Datatype": "Half"
  }],
  "TacticName": "sm80_gemv_w4a16",
  "StreamId": 0,
  "Metadata": "[ONNX Layer: lm_head.dequantized/DequantizeLinear][ONNX Layer: logits/MatMul]"
}],
"Bindings": ["inputs_embeds"
,"logits"
,"inputs_embeds [profile 1]"
,"logits [profile 1]"
]}
"""
# Takes the options of its release only, like the real one, writes names without details unless it
# is asked for them, and its timing cache in place.
STAND_IN = """\
#!{python}
import json, os, pathlib, signal, sys

banner = "TensorRT.trtexec [TensorRT v101601] # trtexec"
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
unknown = set(given) - set({known!r})
print("&&&& RUNNING", banner)
if unknown:
    print("[E] Unknown option:", *unknown)
    sys.exit("&&&& FAILED " + banner)
text = pathlib.Path({layers!r}).read_text()
if given.get("--profilingVerbosity") != "detailed":
    names = [layer["Name"] for layer in json.loads(text)["Layers"]]
    text = json.dumps({{"Layers": names}})
cache = pathlib.Path(given["--timingCacheFile"])
found = cache.read_bytes() if cache.is_file() else b""
cache.write_bytes(b"")
if {dies_of!r} in found:
    os.kill(os.getpid(), signal.SIGSEGV)
cache.write_bytes(found + b"timings")
if "--exportLayerInfo" in given and text:
    pathlib.Path(given["--exportLayerInfo"]).write_text(text)
if "--saveEngine" in given:
    pathlib.Path(given["--saveEngine"]).write_bytes(bytes({plan_bytes}))
print("&&&& PASSED", banner)
"""


def build(bundle: Path, monkeypatch: pytest.MonkeyPatch, text: str, **changes: Any) -> BuildResult:
    folder = bundle.parent / "bin"
    folder.mkdir(exist_ok=True)
    layers = folder / "layers.json"
    layers.write_text(text)
    values = {
        "python": sys.executable,
        "known": sorted(options((10, 16))),
        "layers": str(layers),
        "dies_of": b"damaged",
        "plan_bytes": (bundle / "decoder.onnx.data").stat().st_size,
        **changes,
    }
    binary = folder / "trtexec"
    binary.write_text(STAND_IN.format(**values))
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return build_engine(
        BuildConfig(bundle, max_prefill=32),
        target=Target(TensorRT(None, "tensorrt", "10.16"), None, "8.7"),
        via="trtexec",
    )


def test_the_table_is_that_of_the_inspector(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = inspector_json(read_manifest(bundle), unpacked=("layers.0.down",))
    result = build(bundle, monkeypatch, text)
    table = parse_inspector([text], PROFILES)
    assert read_layers(result.directory / result.info.plan) == table
    assert result.info.compiled == table.summary()
    assert [each.unpacking for each in result.info.compiled] == [1, 1]
    assert result.info.compiled_unknown is None
    assert not list(bundle.glob("engines/.trtexec-*"))
    shown = CliRunner().invoke(
        inspect, [str(result.directory), "--layers"], catch_exceptions=False, env={"COLUMNS": "180"}
    )
    assert "gemv_w4a16_sm80" in shown.stdout
    assert "UNPACK" in shown.stdout


def test_a_patch_of_tensorrt_builds_anew(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine runs on the very version that built it (`check_engine`)."""
    build(bundle, monkeypatch, TEXT)
    monkeypatch.setattr(target_module, "find_gpu", lambda: Gpu("Orin", "8.7"))
    config = BuildConfig(bundle, max_prefill=32)
    assert build_engine(config, via="trtexec").info.tensorrt_version == "10.16.1"
    assert not build_engine(config, via="trtexec").built
    binary = bundle.parent / "bin/trtexec"
    binary.write_text(binary.read_text().replace("v101601", "v101602"))
    assert build_engine(config, via="trtexec").info.tensorrt_version == "10.16.2"


def test_a_run_that_dies_leaves_the_timings_of_the_one_before(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = build(bundle, monkeypatch, TEXT).directory / "timing.cache"
    assert cache.read_bytes() == b"timings"
    monkeypatch.setattr(record, "__version__", "next")  # of the key
    with pytest.raises(BuildError, match="died from SIGSEGV"):
        build(bundle, monkeypatch, TEXT, dies_of=b"")
    assert cache.read_bytes() == b"timings"
    build(bundle, monkeypatch, TEXT)
    assert cache.read_bytes() == b"timingstimings"


def test_timings_that_crash_trtexec_are_ignored(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = build(bundle, monkeypatch, TEXT).directory / "timing.cache"
    cache.write_bytes(b"damaged")
    monkeypatch.setattr(record, "__version__", "next")
    result = build(bundle, monkeypatch, TEXT)
    assert result.built
    assert cache.read_bytes() == b"timings"
    assert "once more, without the timing cache" in (result.directory / "build.log").read_text()


def test_timings_of_another_gpu_power_mode_or_tensorrt_are_ignored(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``trtexec`` itself takes timings of any GPU."""
    build(bundle, monkeypatch, TEXT)
    binary = bundle.parent / "bin/trtexec"

    def timings(gpu: Gpu, patch: int = 1, **options: Any) -> bytes:
        binary.write_text(re.sub(r"v10160\d", f"v10160{patch}", binary.read_text()))
        here = Target(TensorRT(None, "tensorrt", f"10.16.{patch}"), gpu, "8.7")
        config = BuildConfig(bundle, max_prefill=32, again=True, **options)
        built = build_engine(config, target=here, via="trtexec")
        return (config.timing_cache or built.directory / "timing.cache").read_bytes()

    whole, low = Gpu("Orin", "8.7", 16), Gpu("Orin", "8.7", 8)
    assert timings(whole) == b"timings"  # those there were taken without a GPU
    assert timings(whole) == b"timings" * 2
    assert timings(low) == b"timings"
    assert timings(low) == b"timings" * 2
    assert timings(Gpu("Thor", "8.7", 8)) == b"timings"
    assert timings(Gpu("Thor", "8.7", 8), patch=2) == b"timings"
    assert not caplog.records
    mine = bundle.parent / "mine.cache"
    assert timings(low, timing_cache=mine) == b"timings"
    assert not caplog.records
    assert timings(whole, timing_cache=mine) == b"timings" * 2
    assert f"trtexec takes the timings in {mine} for this GPU's" in caplog.text


def test_the_layout_of_the_file_is_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = build(bundle, monkeypatch, TEXT)
    table = read_layers(result.directory / result.info.plan)
    assert table is not None
    (copy,), (head,) = table.of("prefill"), table.of("decode")
    assert copy.reformats
    assert (copy.reads, copy.writes) == (("fp32",), ("int8",))
    assert (head.name, head.kind, head.dtype) == ("lm_head_myl0_7", "gemm", "int4")
    assert head.nodes == ("lm_head.dequantized/DequantizeLinear", "logits/MatMul")
    assert [each.profile for each in result.info.compiled] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "trtexec wrote no table of layers"),
        ('{"Layers": ["lm_head"], "Bindings": []}', "without details"),
        ('{"Layers": [{"Na', "no table of layers"),
    ],
)
def test_an_engine_without_a_table_is_built_and_says_why(
    text: str, reason: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = build(bundle, monkeypatch, text)
    assert result.built
    assert result.info.compiled == ()
    assert reason in str(result.info.compiled_unknown)
    assert read_layers(result.directory / result.info.plan) is None
    shown = CliRunner().invoke(inspect, [str(result.directory), "--json"], catch_exceptions=False)
    assert reason in json.loads(shown.stdout)["compiled_unknown"]
