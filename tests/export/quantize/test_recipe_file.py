"""Recipes as files: every key reaches the export, every other key is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError
from export.cli import export
from export.quantize.recipe import read_recipe
from tests.conftest import Checkpoints

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")

TOML = """
quant = "int4"
method = "awq+gptq"
group_size = 32
calibration = "text.txt"
calibration_tokens = 512
seed = 4

[keep]
"lm_head" = "int8"
"layers.0.*" = "float"
"""


def test_toml_and_json_say_the_same(tmp_path: Path):
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.json").write_text(
        '{"quant": "int4", "method": "awq+gptq", "group_size": 32, "calibration": "text.txt",'
        ' "calibration_tokens": 512, "seed": 4,'
        ' "keep": {"lm_head": "int8", "layers.0.*": "float"}}'
    )
    options = read_recipe(tmp_path / "a.toml")
    assert options == read_recipe(tmp_path / "a.json")
    assert options["keep"] == (("lm_head", "int8"), ("layers.0.*", "float"))
    assert options["calibration"] == tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "grup_size = 32", "grup_size"),
        ("a.json", '{"qaunt": "int4"}', "qaunt"),
        ("a.toml", 'method = "magic"', "magic"),
        ("a.toml", 'group_size = "32"', "group_size"),
        ("a.toml", "quant = ", "not valid"),
        ("a.json", "{", "not valid"),
    ],
)
def test_files_that_are_no_recipe_are_refused(
    tmp_path: Path, name: str, content: str, message: str
):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"--recipe .*{message}"):
        read_recipe(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "missing.toml")


@pytest.mark.slow
def test_an_option_beside_the_recipe_wins(tmp_path: Path, tiny_checkpoints: Checkpoints):
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "text.txt").write_text("hello what the world is " * 400)
    source = str(tiny_checkpoints("llama"))
    arguments = [source, "-o", str(tmp_path / "b"), "--recipe", str(tmp_path / "a.toml")]
    result = CliRunner().invoke(export, [*arguments, "--seed", "9", "--method", "awq"])
    assert result.exit_code == 0, result.output
    quantization = read_manifest(tmp_path / "b").quantization
    assert quantization.method == "awq"
    assert str(quantization.linears["layers.0.o"].scheme) == "float"
    assert str(quantization.linears["layers.1.o"].scheme) == "int4-g32"
    record = quantization.calibration
    assert record is not None
    assert (record.text, record.num_tokens, record.seed) == ("text.txt", 512, 9)
