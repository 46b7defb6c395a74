"""``edge-llm export`` as a user meets it, and as a power cut meets it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import edge.cli
from edge.bundle.manifest import read_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import EXIT_GATE_MISSED, ConfigError, DependencyError, install_command
from export import forecast, verify
from export.cli import _FIGURES, export
from export.config import ExportConfig
from export.recipes import RECIPES
from tests.conftest import FEW_TOKENS, RUNNABLE
from tests.makers.tiny_models import write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "Tiny-R1", "qwen2")


@pytest.fixture
def bundle(tmp_path: Path, checkpoint: Path) -> Path:
    options = ("--kv-capacity", 64, "--method", "rtn", "--no-verify")
    assert invoke(checkpoint, "-o", tmp_path / "bundle", *options).exit_code == 0
    return tmp_path / "bundle"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(export, [str(argument) for argument in arguments])


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of the whole command ``edge-llm export ...``, installed or not."""
    entry = EntryPoint("export", "export.cli:export", edge.cli.COMMAND_GROUP)
    monkeypatch.setattr(edge.cli, "entry_points", lambda **_: [entry])
    monkeypatch.setattr(sys, "argv", ["edge-llm", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as info:
        edge.cli.main()
    assert isinstance(info.value.code, int)
    return info.value.code


def test_defaults_and_the_next_step(checkpoint: Path, tmp_path: Path):
    # The dialect that can be measured here; the default is the one for new devices.
    assert ExportConfig(source="x", output=tmp_path).dialect_with("float") == "native"
    result = invoke(checkpoint, "-o", tmp_path / "bundle", "--dialect", RUNNABLE)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "bundle")
    assert (manifest.quantization.name, manifest.quantization.method) == ("int4", "awq+gptq")
    assert str(manifest.quantization.linears["layers.0.qkv"].scheme) == "int4-g32"
    assert str(manifest.quantization.linears["lm_head"].scheme) == "int8-g64-planes"
    assert manifest.dtype == "fp16"
    assert manifest.quantization.clip == "mse"
    jetpack6 = "not for JetPack 6: export again with --target jetpack6 and another -o"
    lines = [line for line in result.stdout.splitlines() if line != jetpack6]
    assert lines[0] == f"{tmp_path / 'bundle'}: Tiny-R1, int4, 0 MB"
    assert manifest.quality is not None
    text = manifest.quality["text"]
    assert text["tokens"] == 512
    assert lines[1].startswith("TensorRT: legal for ")
    alone = text["bundle_alone"]
    assert lines[2].startswith(f"measured as the CPU serves it: KL {text['kl_mean']:.4f}, top-1 ")
    assert lines[2].endswith(f"in float, x{text['perplexity_ratio']:.3f})")
    assert f"as a TensorRT engine has them: KL {alone['kl_mean']:.4f}, top-1 " in lines[3]
    assert lines[4].startswith("--quant int8 would lose less")
    assert lines[5] == f"Try it: edge-llm run {tmp_path / 'bundle'} 'Why is the sky blue?'"
    # No terminal, no progress bar, and a line of a step only where the machine is so busy that it
    # takes 10 s. A tiny random model loses more than the gate allows.
    disk, expected, *steps, warning = result.stderr.splitlines()
    assert disk.startswith("the bundle takes about ")
    assert all(" so far" in line or ", took " in line for line in steps), steps
    assert expected == "int4, awq+gptq: expect about 5 s on two cores, measuring included"
    assert warning.startswith("warning: it misses the gate int4, which is meant for models of 1.5B")
    assert "top1_agreement 0." in warning


def test_nothing_is_measured_where_nobody_wants_it(checkpoint: Path, tmp_path: Path):
    fast = ("--method", "rtn", "--no-verify")
    for name, options in (("fast", fast), ("float", ("--quant", "fp16"))):
        result = invoke(checkpoint, "-o", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert read_manifest(tmp_path / name).quality is None
        assert "measured as" not in result.output
        assert "measuring" not in result.output
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.slow
def test_a_faster_recipe_names_the_better_one(checkpoint: Path, tmp_path: Path):
    base = ("-o", tmp_path / "bundle", "--no-verify", "--force")
    for options, better in (
        (("--method", "rtn"), "--method awq+gptq would lose less"),
        (
            ("--method", "awq", "--calibration-tokens", FEW_TOKENS),
            "--method awq+gptq would lose less",
        ),
        (("--method", "rtn", "--group-size", 64), "--group-size 32 would lose less"),
        (("--method", "rtn", "--keep", "lm_head=int4"), "--keep lm_head=int8 would lose less"),
        (("--quant", "int8"), None),  # nothing was measured, so nothing was missed
    ):
        result = invoke(checkpoint, *base, *options)
        assert (better or "would lose less") in result.stdout or better is None, result.output
        assert ("would lose less" in result.stdout) == (better is not None)


def test_a_long_default_names_the_faster_method(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forecast, "LONG_S", 0.1)
    base = (checkpoint, "-o", tmp_path / "bundle", "--no-verify", "--force")
    few = ("--calibration-tokens", FEW_TOKENS)
    for options, named in (
        (few, True),
        (("--method", "gptq", *few), False),
        (("--quant", "int8"), False),
    ):
        result = invoke(*base, *options)
        assert result.exit_code == 0, result.output
        hint = "on two cores; sooner, but loses more: --method awq (about 5 s)"
        assert (hint in result.stderr) == named, result.stderr
        assert "--fast" not in result.stderr  # it does not go with tokens to calibrate with
    offered = invoke(checkpoint, "-o", tmp_path / "bundle", "--no-verify", "--force")
    assert "loses more: --fast (about 5 s), --method awq (about 5 s)\n" in offered.stderr


@pytest.mark.slow
def test_fast_rounds_to_nearest_and_says_how_much_that_loses(checkpoint: Path, tmp_path: Path):
    made = invoke(checkpoint, "-o", tmp_path / "bundle", "--fast")
    assert made.exit_code == 0, made.output
    manifest = read_manifest(tmp_path / "bundle")
    assert (manifest.quantization.name, manifest.quantization.method) == ("int4", "rtn")
    assert manifest.quantization.calibration is None
    assert manifest.quality is None
    assert str(manifest.quantization.linears["layers.0.qkv"].scheme) == "int4-g32"
    assert "loses about what llama.cpp's Q4_0 does: at 1.5B twice what" in made.stdout
    assert "without --fast it is calibrated" in made.stdout
    measured = invoke(
        checkpoint, "-o", tmp_path / "verified", "--fast", "--verify", "--dialect", RUNNABLE
    )
    assert measured.exit_code == EXIT_GATE_MISSED  # a tiny random model loses more than the gate
    assert "measuring included" in measured.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "awq"), "--fast contradicts --method awq"),
        (("--quant", "int8"), "--fast has no effect with --quant int8: no layer is INT4"),
        (("--seed", "1"), "--seed has no effect with --fast, which calibrates nothing"),
    ],
)
def test_fast_does_not_go_with_what_it_would_ignore(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], words: str
):
    refused = invoke(checkpoint, "-o", tmp_path / "bundle", "--fast", *options)
    assert isinstance(refused.exception, ConfigError)
    assert words in str(refused.exception)


@pytest.mark.slow
def test_best_calibrates_with_all_of_the_text(checkpoint: Path, tmp_path: Path):
    used = {}
    for name, options in (("default", ()), ("best", ("--best",))):
        made = invoke(checkpoint, "-o", tmp_path / name, "--no-verify", *options)
        assert made.exit_code == 0, made.output
        calibration = read_manifest(tmp_path / name).quantization.calibration
        assert calibration is not None
        used[name] = calibration.num_tokens
    assert used["default"] <= RECIPES["default"].calibration_tokens < used["best"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "awq"), "--best contradicts --method awq"),
        (("--quant", "int8"), "--best has no effect with --quant int8: no layer is rounded to"),
        (("--fast",), "--fast contradicts --best; leave one of the two out"),
    ],
)
def test_best_does_not_go_with_what_it_would_ignore(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], words: str
):
    refused = invoke(checkpoint, "-o", tmp_path / "bundle", "--best", *options)
    assert isinstance(refused.exception, ConfigError)
    assert words in str(refused.exception)


def test_a_dry_run_says_what_it_takes_and_writes_nothing(checkpoint: Path, tmp_path: Path):
    said = invoke(checkpoint, "-o", tmp_path / "bundle", "--dry-run")
    assert said.exit_code == 0, said.output
    disk, time = said.stdout.splitlines()
    assert re.fullmatch(r"the bundle takes about [\d.]+ MB, [\d.]+ MB while it is made", disk)
    assert time == "int4, awq+gptq: expect about 5 s on two cores, measuring included"
    found = json.loads(invoke(checkpoint, "-o", tmp_path / "b", "--dry-run", "--json").stdout)
    assert found["recipe"] == "int4, awq+gptq"
    assert found["download_bytes"] == 0
    assert 0 < found["bundle_bytes"] < found["peak_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_cannot_be_measured_is_written_and_reported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Hours of calibration are not thrown away for figures that nobody asked for."""
    monkeypatch.setattr(verify, "read_available_memory_bytes", lambda: 1 << 20)
    result = invoke(checkpoint, "-o", tmp_path / "bundle", "--quant", "int8")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "bundle")
    verify_files(tmp_path / "bundle", manifest)
    assert manifest.quality is None
    assert "was not measured: the bundle and its float model need 0." in result.stderr
    assert f"edge-llm eval {tmp_path / 'bundle'} --against {checkpoint}" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if "edge-llm" in path.name] == []


def test_every_option_arrives(checkpoint: Path, tmp_path: Path):
    result = invoke(
        checkpoint,
        *("--output", tmp_path / "bundle", "--quant", "int8", "--group-size", 32),
        *("--keep", "layers.0.*=float", "--keep", "lm_head=int4", "--clip", "absmax"),
        *("--method", "rtn", "--no-verify"),
        *("--dialect", "portable", "--dtype", "bf16", "--kv-capacity", 99),
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "bundle")
    schemes = {name: str(info.scheme) for name, info in manifest.quantization.linears.items()}
    assert schemes["layers.0.down"] == "float"
    assert schemes["layers.1.down"] == "int8-g32-planes"
    assert schemes["lm_head"] == "int4-g32"
    assert (manifest.quantization.name, manifest.quantization.clip) == ("int8", "absmax")
    assert (manifest.dialect, manifest.dtype, manifest.kv_capacity) == ("portable", "bf16", 99)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_clock")
def test_long_steps_print_lines_without_a_terminal(checkpoint: Path, tmp_path: Path):
    options = ("--method", "gptq", "--calibration-tokens", 2048)
    result = invoke(checkpoint, "-o", tmp_path / "bundle", *options, "--json")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    for step in ("quantize", "calibrate", "embeddings", "hash and move into place"):
        assert any(line.startswith(f"{step}: 100 %") for line in lines), lines
    assert any("sequences through a layer), " in line for line in lines)
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("slow_clock")
def test_verifying_leaves_its_lines_to_the_process_that_measures(checkpoint: Path, tmp_path: Path):
    gate = tmp_path / "gate.json"
    gate.write_text('{"kl_mean": 100.0}')
    options = ("--verify", "--gate", gate, "--dialect", RUNNABLE, "--method", "rtn")
    result = invoke(checkpoint, "-o", tmp_path / "bundle", *options)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert any(line.startswith("reference: quantize: 100 %") for line in lines), lines
    assert any(line.startswith("hash: 100 %") for line in lines)
    assert not any(line.startswith("verify") for line in lines)


@pytest.mark.slow
def test_json_is_one_line_on_stdout(checkpoint: Path, tmp_path: Path):
    options = ("--quant", "int8", "--dialect", RUNNABLE, "--json")
    result = invoke(checkpoint, "-o", tmp_path / "bundle", *options)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    manifest = read_manifest(tmp_path / "bundle")
    files, text = manifest.files.values(), (manifest.quality or {})["text"]
    assert json.loads(line) == {
        "bundle": str(tmp_path / "bundle"),
        "name": "Tiny-R1",
        "quantization": "int8",
        "num_bytes": sum(file.num_bytes for file in files),
        "source": "Tiny-R1",
        "revision": None,
        "source_quantization": None,
        "sampling_assumed": None,
        "dialect": RUNNABLE,
        "tensorrt": list(manifest.tensorrt or ()),
        "kv_cache": "float",
        "quality": {
            **{name: text[name] for name in _FIGURES},
            "bundle_alone": {name: text["bundle_alone"][name] for name in _FIGURES[1:]},
        },
        "missed": [],
    }


@pytest.mark.slow
def test_an_existing_bundle_needs_force(
    bundle: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    before = read_manifest(bundle)
    assert run_main(monkeypatch, checkpoint, "-o", bundle, "--quant", "int8") == 64
    captured = capsys.readouterr()
    assert captured.err.startswith("edge-llm: error: ")
    assert "already holds a bundle; replace it with --force" in captured.err
    assert not captured.out
    assert read_manifest(bundle) == before

    assert run_main(monkeypatch, checkpoint, "-o", bundle, "--quant", "int8", "--force") == 0
    after = read_manifest(bundle)
    assert after.quantization.name == "int8"
    verify_files(bundle, after)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--keep", "lm_head"], 64, "--keep 'lm_head' is not of the form PATTERN=SCHEME"),
        (["--keep", "head=int8"], 64, "--keep head=int8 matches no linear layer"),
        (["--keep", "lm_head=int2"], 64, "unknown scheme 'int2'; use float, int8, int4 or w8a8"),
        (["--group-size", "48"], 64, "--group-size 48 does not fit"),
        (["--quant", "fp16", "--dtype", "bf16"], 64, "say --quant bf16"),
        (["--quant", "fp16", "--clip", "absmax"], 64, "--clip absmax has no effect"),
        (["--kv-capacity", "257"], 64, "2 to 256 tokens"),
        (["--quant", "int5"], 64, "'int5' is not one of"),
        (["--revision", "main"], 64, "--revision is for hub ids"),
    ],
    ids=str,
)
def test_wrong_options_end_with_advice(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
):
    assert run_main(monkeypatch, checkpoint, "-o", tmp_path / "bundle", *arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_none_is_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run_main(monkeypatch, tmp_path / "nowhere", "-o", tmp_path / "bundle") == 65
    assert "nothing to export at" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["onnx", "ml_dtypes"])
def test_a_missing_extra_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
):
    monkeypatch.setitem(sys.modules, package, None)  # import finds nothing
    for module in ("export.pipeline", "export.decoder_files", "export.graph.graph_builder"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    result = invoke(checkpoint, "-o", tmp_path / "bundle")
    assert isinstance(result.exception, DependencyError)
    assert str(result.exception) == (
        f"exporting needs the package {package}; install it with: {install_command('export')}"
    )


def test_help_and_the_form_of_keep_need_no_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "export.pipeline", raising=False)
    result = invoke("--help")
    assert result.exit_code == 0
    assert "Hugging Face directory, a hub id" in result.stdout
    assert isinstance(invoke("x", "-o", "y", "--keep", "z").exception, ConfigError)


def test_every_option_has_help():
    for parameter in export.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


# ------------------------------------------------------------------------------------- kill -9

KILLS = 6
FAST = ("--method", "rtn", "--no-verify")


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_whole_bundle(tmp_path: Path):
    """SIGKILL of real processes, spread over the time that an export takes."""
    new = write_checkpoint(
        tmp_path / "New-R1", "qwen2", hidden_size=256, intermediate_size=1024, num_hidden_layers=4
    )
    old = write_checkpoint(tmp_path / "Old-R1", "qwen2")
    place = tmp_path / "place"
    place.mkdir()
    target = place / "bundle"
    assert invoke(old, "-o", target, *FAST).exit_code == 0
    saved = tmp_path / "saved"
    shutil.copytree(target, saved)

    duration_s = export_process(new, target, kill_after_s=None)
    assert read_manifest(target).name == "New-R1"
    names = []
    for i in range(KILLS):
        shutil.rmtree(target)
        shutil.copytree(saved, target)
        export_process(new, target, kill_after_s=duration_s * i / KILLS)
        manifest = read_manifest(target)
        verify_files(target, manifest)
        names.append(manifest.name)
    assert set(names) <= {"Old-R1", "New-R1"}
    assert names[0] == "Old-R1"

    assert invoke(new, "-o", target, "--force", *FAST).exit_code == 0
    assert read_manifest(target).name == "New-R1"
    assert [path.name for path in place.iterdir()] == ["bundle"]  # leftovers are swept


def export_process(source: Path, target: Path, *, kill_after_s: float | None) -> float:
    """Export in a process of its own; returns the seconds from its first file to its end.

    Args:
        source: what to export.
        target: the bundle that is replaced.
        kill_after_s: when to kill it, counted from its first file; None lets it finish.
    """
    command = "from export.cli import export; export()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, str(source), "-o", str(target), "--force", "--json", *FAST],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        staging = target.with_name(f".{target.name}.edge-llm-staging")
        # What an earlier kill left lies there, untouched until this process sweeps it.
        before = modified_ns(staging)
        while process.poll() is None and modified_ns(staging) == before:
            time.sleep(0.001)
        start = time.monotonic()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            process.kill()
        process.wait(60)
        assert process.stderr is not None
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read().decode()
        return time.monotonic() - start


def modified_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ((), ["6"]),  # native
        (("--dialect", "portable"), []),
        (("--target", "jetpack7"), ["6"]),
        (("--target", "jetpack6"), []),
        (("--target", "trt11"), []),
        (("--target", "cpu"), []),
    ],
)
def test_the_end_says_for_which_jetpack_it_is_not(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], others: list[str]
):
    given = ("--kv-capacity", 64, "--quant", "INT4", "--method", "rtn", "--no-verify", *options)
    done = invoke(checkpoint, "-o", tmp_path / "one", *given)
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "one").quantization.name == "int4"
    lines = [line for line in done.stdout.splitlines() if line.startswith("not for JetPack")]
    assert lines == [
        f"not for JetPack {n}: export again with --target jetpack{n} and another -o" for n in others
    ]
    for line in lines:
        again = line.split("with ")[1].removesuffix(" and another -o").split()
        assert invoke(checkpoint, "-o", tmp_path / "two", *given[:7], *again).exit_code == 0
        assert "10.3" in (read_manifest(tmp_path / "two").tensorrt or ())


@pytest.mark.parametrize(
    ("release", "target"),
    [("36.4.3", "jetpack6"), ("39.0", "jetpack7"), ("35.1", None), (None, None)],
)
def test_a_target_may_be_this_machines_own(
    monkeypatch: pytest.MonkeyPatch, release: str | None, target: str | None
):
    monkeypatch.setattr("edge_lab.telemetry.read_l4t", lambda: release)
    context = export.make_context("export", ["source", "-o", "bundle", "--target", "here"])
    assert context.params["target"] == target
