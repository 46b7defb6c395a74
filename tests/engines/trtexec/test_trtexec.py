"""The trtexec line of each version, and running a stand-in for the binary."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge.bundle.onnx_file import OnnxFile
from edge.errors import BackendError, ConfigError, DependencyError, ResourceError
from engines.build_plan import plan_build
from engines.config import BuildConfig
from engines.rules.table import Release
from engines.trtexec.command import (
    command_for_bundle,
    find_trtexec,
    format_command,
    run_trtexec,
    trtexec_command,
    trtexec_version,
)
from engines.trtexec.options import TRT_VERSIONS, lifetime, options
from tests.conftest import TINY_KV_CAPACITY, Bundles
from tests.makers.manifests import make_manifest

CONFIG = BuildConfig(Path("b"), max_batch=4, max_prefill=64, timing_cache=Path("t.cache"))
_NATIVE = """\
trtexec
--onnx=b/decoder.onnx
--saveEngine=engine.plan
--profile=0
--minShapes=inputs_embeds:1x1x64,position_ids:1x1,write_indices:1,kv_positions:256,\
logits_indices:1x1,past_key_values.*:1x2x256x16
--optShapes=inputs_embeds:1x64x64,position_ids:1x64,write_indices:1,kv_positions:256,\
logits_indices:1x1,past_key_values.*:1x2x256x16
--maxShapes=inputs_embeds:1x64x64,position_ids:1x64,write_indices:1,kv_positions:256,\
logits_indices:1x64,past_key_values.*:1x2x256x16
--profile=1
--minShapes=inputs_embeds:1x1x64,position_ids:1x1,write_indices:1,kv_positions:256,\
logits_indices:1x1,past_key_values.*:1x2x256x16
--optShapes=inputs_embeds:4x1x64,position_ids:4x1,write_indices:4,kv_positions:256,\
logits_indices:4x1,past_key_values.*:4x2x256x16
--maxShapes=inputs_embeds:4x1x64,position_ids:4x1,write_indices:4,kv_positions:256,\
logits_indices:4x1,past_key_values.*:4x2x256x16
--profile=2
--minShapes=inputs_embeds:1x1x64,position_ids:1x1,write_indices:1,kv_positions:256,\
logits_indices:1x1,past_key_values.*:1x2x256x16
--optShapes=inputs_embeds:4x16x64,position_ids:4x16,write_indices:4,kv_positions:256,\
logits_indices:4x1,past_key_values.*:4x2x256x16
--maxShapes=inputs_embeds:4x16x64,position_ids:4x16,write_indices:4,kv_positions:256,\
logits_indices:4x16,past_key_values.*:4x2x256x16
--memPoolSize=workspace:1024M
--builderOptimizationLevel=3
--avgTiming=8
--profilingVerbosity=detailed
--timingCacheFile=t.cache
--decomposableAttentions=*
--skipInference"""


def golden(version: str) -> list[str]:
    lines = _NATIVE.split("\n")
    if version != "11.4":
        lines.insert(3, "--stronglyTyped")
    if version == "10.3":
        lines.remove("--decomposableAttentions=*")
        lines = [line.replace("write_indices", "past_lengths") for line in lines]
    return lines


@pytest.mark.parametrize("name", TRT_VERSIONS)
def test_golden_line(name: str):
    manifest = make_manifest(dialect="portable" if name == "10.3" else "native")
    assert trtexec_command(plan_build(CONFIG, manifest), TRT_VERSIONS[name]) == golden(name)


@pytest.mark.parametrize("version", [(10, 0), (10, 3), (10, 14), (10, 16), (11, 0), (11, 4)])
@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_only_options_of_the_version(version: Release, dialect: str):
    manifest = make_manifest(dialect=dialect)
    if dialect == "native" and version < (10, 15):
        with pytest.raises(ConfigError, match="--dialect portable"):
            trtexec_command(plan_build(CONFIG, manifest), version)
        return
    line = trtexec_command(plan_build(CONFIG, manifest), version)
    assert {option.partition("=")[0] for option in line[1:]} <= options(version)


def test_option_sets():
    assert "--batch" in options((8, 6))
    assert not {"--batch", "--output", "--workspace"} & options((10, 3))
    assert "--decomposableAttentions" not in options((10, 3))
    assert {"--fp16", "--decomposableAttentions"} <= options((10, 16))
    assert not {"--fp16", "--int8", "--best", "--calib"} & options((11, 4))
    assert "--stronglyTyped" in options((11, 4))
    assert [len(options(v)) for v in ((8, 6), (10, 3), (10, 16), (11, 1))] == [103, 107, 125, 129]
    gone = lifetime("--batch")
    assert gone is not None
    assert gone.removed == (10, 0)
    assert lifetime("--nonsense") is None


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"kv_read": "lengths"}, "Python API"),
        ({"kv_read": "full"}, "full"),
        ({"kv_capacity": 64}, "KV capacity 64"),
    ],
)
def test_what_trtexec_cannot_do_is_refused(option: dict[str, Any], words: str):
    build = plan_build(BuildConfig(Path("b"), max_prefill=8, **option), make_manifest())
    with pytest.raises(ConfigError, match=words):
        trtexec_command(build, (11, 4))


def test_a_version_without_strong_types_is_refused():
    build = plan_build(CONFIG, make_manifest(dialect="portable"))
    with pytest.raises(ConfigError, match=r"10\.0"):
        trtexec_command(build, (8, 6))


def test_another_capacity_gets_its_own_graph(tiny_bundles: Bundles, tmp_path: Path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in tiny_bundles("qwen2").iterdir():
        if file.is_file():
            shutil.copy(file, bundle / file.name)
    line = command_for_bundle(BuildConfig(bundle, max_prefill=32, kv_capacity=64), (10, 16))
    onnx = Path(line[1].removeprefix("--onnx="))
    shapes = {value.name: value.shape for value in OnnxFile(onnx.read_bytes()).inputs}
    assert shapes["past_key_values.0.key"][2] == 64 != TINY_KV_CAPACITY
    data = "decoder.onnx.data"
    assert (onnx.parent / data).read_bytes() == (bundle / data).read_bytes()
    assert ":1x2x64x" in line[5]


def test_the_printed_line_survives_a_shell():
    line = trtexec_command(plan_build(CONFIG, make_manifest()), (10, 16))
    script = f"for word in {format_command(line)}; do echo $word; done"
    words = subprocess.run(["sh", "-fc", script], capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == line


LOG = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v101601] [b11] # trtexec --onnx=m.onnx
[11/24/2026-10:00:00] [I] TensorRT version: 10.16.1
[11/24/2026-10:00:01] [W] [TRT] a warning
[11/24/2026-10:00:31] [I] [TRT] Engine generation completed in 30.1 seconds.
[11/24/2026-10:00:31] [I] [TRT] [MemUsageStats] Peak memory usage of TRT CPU/GPU memory \
allocators: CPU 18 MiB, GPU 227 MiB
[11/24/2026-10:00:31] [I] [TRT] [MemUsageStats] Peak memory usage during Engine building and \
serialization: CPU: 3036 MiB
[11/24/2026-10:00:32] [I] Created engine with size: 830.5 MiB
[11/24/2026-10:00:32] [I] Engine built in 31.25 sec.
&&&& PASSED TensorRT.trtexec [TensorRT v101601] [b11] # trtexec --onnx=m.onnx
"""


def fake(folder: Path, output: str, end: str = "exit 0") -> Path:
    binary = folder / "trtexec"
    (folder / "log").write_text(output)
    binary.write_text(f"#!/bin/sh\ncat '{folder / 'log'}'\n{end}\n")
    binary.chmod(0o755)
    return binary


def test_run_streams_and_reads_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(tmp_path, LOG)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    seen: list[str] = []
    result = run_trtexec(["trtexec", "--onnx=m.onnx"], seen.append)
    assert seen == LOG.splitlines()
    assert (result.version, result.build_s) == ("10.16.1", 31.25)
    assert result.peak_host_bytes == 3036 << 20
    assert trtexec_version(find_trtexec()) == (10, 16)


def test_versions_before_ten_are_decoded(tmp_path: Path):
    assert trtexec_version(fake(tmp_path, "&&&& RUNNING TensorRT.trtexec [TensorRT v8601]")) == (
        8,
        6,
    )
    with pytest.raises(BackendError, match="--trt"):
        trtexec_version(fake(tmp_path, "hello"))


@pytest.mark.parametrize(
    ("output", "end", "error", "message"),
    [
        ("[E] Unknown option: --batch 1", "exit 1", BackendError, "--trt.*\n.*--batch 1"),
        ("[E] [TRT] Cuda failure: out of memory", "exit 1", ResourceError, "--workspace"),
        ("working", "kill -9 $$", ResourceError, "killed"),
        ("[E] Error: Failed to open file: d.data", "exit 1", BackendError, "beside the .onnx"),
        ("strange", "exit 3", BackendError, "exit code 3(.|\n)*strange"),
        ("half", "exit 0", BackendError, "without saying PASSED"),
    ],
)
def test_failures(tmp_path: Path, output: str, end: str, error: type[Exception], message: str):
    binary = fake(tmp_path, output + "\n", end)
    with pytest.raises(error, match=message):
        run_trtexec([str(binary)], lambda _: None)


def test_an_interrupt_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*args: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(popen(*args, **options))
        return started[-1]

    def interrupt(_line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    binary = fake(tmp_path, "building\n", "exec sleep 15")
    with pytest.raises(KeyboardInterrupt):
        run_trtexec([str(binary)], interrupt)
    assert started[0].returncode == -signal.SIGKILL


def test_missing_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyError, match=r"apt install.*--print-trtexec --trt"):
        find_trtexec([str(tmp_path)])
