"""What the explanation of an old line says."""

from __future__ import annotations

import json
import shlex

import pytest
from click.testing import CliRunner

from edge.errors import ConfigError
from engines.trtexec.explain import explain, trtexec_explain
from engines.trtexec.options import TRT_VERSIONS, options
from tests.conftest import Bundles

OLD = "trtexec --onnx=deepseek_1.5b.onnx --fp16 --batch=1 --output=logits"


@pytest.mark.parametrize(
    ("name", "fp16"), [("10.3", "works"), ("10.16", "deprecated"), ("11.4", "removed")]
)
def test_the_line_of_the_tutorials(name: str, fp16: str):
    answer = explain(OLD, TRT_VERSIONS[name])
    assert [option.state for option in answer.options] == ["works", fp16, "removed", "removed"]
    assert "TensorRT 10.0" in answer.options[2].note
    assert "stops" in answer.verdict
    for word in shlex.split(answer.translated)[1:]:
        assert word.partition("=")[0] in options(TRT_VERSIONS[name])
    assert answer.steps[0].startswith("edge-llm export SOURCE")
    assert ("portable" in answer.steps[0]) == (name == "10.3")


def test_renamed_unknown_and_future_options():
    answer = explain("trtexec --workspace=512 --buildOnly --nope --noCudaGraph", (10, 3))
    assert answer.translated == "trtexec --memPoolSize=workspace:512 --skipInference"
    assert [o.state for o in answer.options] == ["removed", "removed", "unknown", "not yet"]


def test_a_bundle_gets_its_own_line(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2")
    onnx = bundle / "decoder.onnx"
    (step,) = explain(f"trtexec --onnx={onnx} --fp16", (10, 16)).steps
    assert f"--onnx={onnx}" in step
    assert "--profile=1" in step


@pytest.mark.parametrize("line", ["", "python build.py", "trtexec 'open"])
def test_other_lines_are_refused(line: str):
    with pytest.raises(ConfigError):
        explain(line, (10, 16))


def test_command():
    text = CliRunner().invoke(trtexec_explain, [OLD], catch_exceptions=False).output
    assert "--batch=1" in text
    assert "edge-llm build" in text
    answer = CliRunner().invoke(trtexec_explain, [OLD, "--json"], catch_exceptions=False).output
    assert json.loads(answer)["version"] == "10.16"


def test_a_line_without_quotes_is_the_same():
    """The shell has cut it, and options of this verb may stand before or after it."""
    words = shlex.split(OLD)
    quoted = CliRunner().invoke(trtexec_explain, [OLD, "--trt", "10.3"]).output
    assert "--batch=1" in quoted
    for arguments in ([*words, "--trt", "10.3"], ["--trt", "10.3", *words]):
        done = CliRunner().invoke(trtexec_explain, arguments, catch_exceptions=False)
        assert (done.exit_code, done.output) == (0, quoted)
    spaced = CliRunner().invoke(trtexec_explain, ["trtexec", "--onnx=my model.onnx", "--json"])
    assert json.loads(spaced.output)["options"][0]["text"] == "--onnx=my model.onnx"


def test_words_after_a_quoted_line_are_kept():
    with pytest.raises(ConfigError, match=r"'--fp8' follows the quoted line"):
        CliRunner().invoke(trtexec_explain, [OLD, "--fp8"], catch_exceptions=False)
