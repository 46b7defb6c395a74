"""The rules on exported bundles: ``check --trt``, and a build that is refused before the parser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import ELEMENT_NUMBERS, Message, OnnxFile
from edge.errors import EXIT_GATE_MISSED, BuildError, ConfigError, IntegrityError
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from engines.builder import by_trtexec, variant
from engines.builder.build import build_engine
from engines.builder.target import Target
from engines.cli import check
from engines.compiler.compat import TensorRT
from engines.config import BuildConfig
from engines.rules.bundle import check_bundle_rules, parse_versions
from engines.rules.table import VERSIONS
from tests.conftest import Bundles

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(check, list(arguments), catch_exceptions=False)


def plant(bundle: Path, dtype: str) -> None:
    """Say that the first blocked INT4 weight is of another type; the manifest vouches for it."""
    manifest = read_manifest(bundle)
    path = bundle / manifest.graphs.decoder
    graph = OnnxFile(path.read_bytes())
    name = next(n.inputs[0] for n in graph.nodes if n.op_type == "DequantizeLinear")
    tensors = []
    for data in graph.initializers:
        tensor = Message.parse(data)
        if tensor.text(8) == name:
            tensor.fields = [entry for entry in tensor.fields if entry[0] not in (2, 13)]
            shape = [value for number, _, value in tensor.fields if number == 1]
            assert len(shape) == 2
            tensor.add(2, ELEMENT_NUMBERS[dtype])
            for key, value in (("location", f"{path.name}.data"), ("offset", "0")):
                tensor.add(13, Message().add(1, key).add(2, value))
        tensors.append(tensor.serialize())
    graph.proto.replace(5, tensors)
    path.write_bytes(graph.serialize())
    files = {**manifest.files, path.name: sha256_file(path)}
    (bundle / "manifest.json").write_bytes(encode_manifest(replace(manifest, files=files)))


@pytest.fixture
def legal(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2", "portable", "fp16"), tmp_path / "legal"))


@pytest.fixture
def illegal(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    bundle = Path(shutil.copytree(tiny_bundles("qwen2", "portable", "int4"), tmp_path / "illegal"))
    plant(bundle, "int8")
    return bundle


def test_versions_of_the_option() -> None:
    assert [v.name for v in parse_versions("10.3, 10.16.2.10,rtx,10.3")] == ["10.3", "10.16", "rtx"]
    assert parse_versions("all") == list(VERSIONS)
    assert parse_versions("10.9")[0].release == (10, 9)


@pytest.mark.parametrize("text", ["", "10", "ten", "8.6", "10.2", "10.3,", "10.3;11.1", "-10.3"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--trt"):
        parse_versions(text)


def test_a_legal_bundle_passes(legal: Path) -> None:
    result = run(str(legal), "--trt", "10.3,11.4")
    assert result.exit_code == 0
    assert "TensorRT 10.3 (JetPack 6.1 and 6.2): legal" in result.stdout
    assert "TensorRT 11.4 (JetPack 7.2.2, as a package): legal (not confirmed" in result.stdout


def test_an_illegal_bundle_is_reported_with_node_rule_source_and_advice(illegal: Path) -> None:
    result = run(str(illegal), "--trt", "10.3")
    assert result.exit_code == EXIT_GATE_MISSED
    assert "ILLEGAL" in result.stdout
    (line,) = [each for each in result.stdout.splitlines() if "rule block-type" in each]
    assert "layers.0.qkv.dequantized" in line
    assert "int8 with a scale per block" in line
    assert "source: NvInfer.h v10.3.0" in result.stdout
    assert "instead: export the bundle again" in result.stdout


def test_the_same_as_json(illegal: Path) -> None:
    result = run(str(illegal), "--trt", "10.3,10.16", "--json")
    assert result.exit_code == EXIT_GATE_MISSED
    report = json.loads(result.stdout)
    assert report["legal"] is False
    assert [each["tensorrt"] for each in report["versions"]] == ["10.3", "10.16"]
    rules = {each["rule"]: each for each in report["versions"][0]["findings"]}
    assert rules["block-type"]["refused"] is True
    assert rules["block-type"]["nodes"][0].startswith("layers.0.qkv.dequantized")


@pytest.mark.parametrize("option", [["--sm", "86"], ["--max-batch", "1"], ["--force"]])
def test_options_of_a_compilation_do_not_go_with_it(legal: Path, option: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{option[0]} has no effect with --trt"):
        run(str(legal), "--trt", "10.3", *option)


def test_a_changed_graph_is_refused_by_its_hash(legal: Path) -> None:
    with (legal / "decoder.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError, match=r"decoder\.onnx"):
        check_bundle_rules(legal, parse_versions("10.3"))


def test_scales_are_read_from_the_weights(tiny_bundles: Bundles, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundles("qwen2", "portable", "int4"), tmp_path / "bundle"))
    data = bundle / "decoder.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    (verdict,) = check_bundle_rules(bundle, parse_versions("10.3"))
    (finding,) = [each for each in verdict.refusals if each.rule == "scale-positive"]
    assert "are zero" in finding.found


def target(version: str) -> Target:
    return Target(TensorRT(None, "tensorrt", version), None, "8.7")


@pytest.mark.parametrize("via", ["api", "trtexec"])
def test_a_build_is_refused_before_the_parser(
    illegal: Path, via: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_arguments: Any) -> None:
        raise AssertionError("the parser was called")

    monkeypatch.setattr(variant, "Compiler", never)
    monkeypatch.setattr(by_trtexec, "run_trtexec", never)
    kept = illegal / "engines" / "other"
    kept.mkdir(parents=True)
    (kept / "engine.json").write_text("kept")
    with pytest.raises(BuildError, match=r"rule block-type.*check .* --trt 10\.3") as error:
        build_engine(BuildConfig(illegal, max_prefill=32), target=target("10.3.0.26"), via=via)
    assert "layers.0.qkv.dequantized" in str(error.value)
    assert (kept / "engine.json").read_text() == "kept"
    assert not list(illegal.glob("engines/*/*.plan"))


def test_it_needs_neither_tensorrt_nor_onnx(illegal: Path) -> None:
    """In a process of its own, in which neither can be imported."""
    code = (
        "import sys\n"
        "for name in ('tensorrt', 'tensorrt_rtx', 'onnx', 'onnxruntime', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "from edge.cli import main\n"
        f"sys.argv = ['edge-llm', 'check', {str(illegal)!r}, '--trt', 'all']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_GATE_MISSED, done.stderr
    assert done.stdout.count("rule block-type") == len(VERSIONS) - 1


def test_a_printed_trtexec_line_warns(illegal: Path) -> None:
    from engines.cli import build

    arguments = [str(illegal), "--max-prefill", "32", "--print-trtexec", "--trt", "10.3"]
    result = CliRunner().invoke(build, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.startswith("trtexec ")
    assert "warning: TensorRT 10.3 does not take the graph" in result.stderr
