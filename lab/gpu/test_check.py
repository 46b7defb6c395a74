"""``scripts/gpu-check``: it refuses without a GPU, and passes only if TensorRT ran everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from edge.cli import cli
from edge.device.nodes import find_gpu_node
from edge_lab.planner.calibration import read_runs
from edge_lab.prove.steps import Done

from . import check as gpu_check

ROOT = Path(__file__).parents[2]
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="one"/>
<testcase classname="tests.gpu.test_a" name="two"><failure message="x"/></testcase>
<testcase classname="tests.gpu.test_a" name="three"><error message="x"/></testcase>
<testcase classname="tests.gpu.test_b" name="four"><skipped message="no PyCUDA"/></testcase>
</testsuite></testsuites>"""
PASSED = '<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>'


def with_skip(reason: str) -> str:
    skipped = f'<testcase classname="a" name="c"><skipped message="{reason}"/></testcase>'
    return PASSED.replace("</testsuite>", f"{skipped}</testsuite>", 1)


DOCTOR = {
    "exit_code": 0,
    "summary": "the GPU works",
    "checks": [{"name": "GPU", "status": "ok", "detail": "Orin"}],
}
NO_GPU = {
    "exit_code": 0,
    "summary": "no NVIDIA GPU here; the CPU backend works and nothing is wrong",
    "checks": [{"name": "GPU", "status": "skip", "detail": "no driver that works"}],
}
BENCH = {
    "decode_tps": 61.512,
    "prefill_tps": 5083.0,
    "decode_watts": None,
    "backend": "tensorrt",
    "tpot_s": {"median": 0.01626},
    "cpu_s_per_step": 0.0161,
}
DECODE = {
    "profile": "decode",
    "layers": 40,
    "fused": 30,
    "reformats": 2,
    "unpacking": 0,
    "products": {"int4": 120, "int8": 1},
    "attention": "fused",
}
INSPECT = {"compiled": [DECODE], "compiled_unknown": None, "attention": "fused"}
TUNE = {
    "engine": "/nowhere/engines/auto",
    "refused": [{"kv_read": "full", "attention": "fused", "reason": "no kernel"}],
    "tuned": [
        {"kv_read": "slice", "attention": "fused", "decode_s": 0.0041, "problem": None},
        {"kv_read": "slice", "attention": "decomposed", "decode_s": None, "problem": "cosine"},
    ],
}
TIMES = {"runs": 48, "total_ms": 9.5, "layers": [{"name": "a", "ms": 9.5, "kind": "gemm"}]}


def test_without_a_gpu_it_refuses_in_one_line(tmp_path: Path):
    if find_gpu_node() is not None:
        pytest.skip("there is a GPU here")
    before = sorted(ROOT.iterdir())
    done = subprocess.run(
        [ROOT / "scripts/gpu-check", "--output", tmp_path / "report"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 69
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-check: no NVIDIA GPU here")
    assert sorted(ROOT.iterdir()) == before  # no environment was made
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("ort", ["", "mine.whl"])
def test_without_onnxruntime_gpu_on_pypi_it_goes_on(tmp_path: Path, ort: str):
    """As on JetPack 6: of onnxruntime-gpu PyPI has no wheel for Arm64 and Python 3.10."""
    for name in ("scripts", "edge", "requirements"):
        (tmp_path / name).mkdir()
    for name in ("gpu-check", "_venv", "_jetpack"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    for name in ("pyproject.toml", "edge/_version.py"):
        (tmp_path / name).touch()
    for name in ("laptop", "pycuda"):
        (tmp_path / f"requirements/{name}.txt").touch()
    (tmp_path / "scripts/install-pycuda").write_text("#!/bin/sh\nexit 69\n")
    (tmp_path / "scripts/install-pycuda").chmod(0o755)
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
echo "$*" >>{log}
case "$*" in
    -c*) echo /dev/nvmap ;;
    "-m venv"*) mkdir -p .venv-gpu/bin; cp "$0" .venv-gpu/bin/python ;;
    *onnxruntime-gpu*) exit 1 ;;
esac
"""
    )
    python.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "scripts/gpu-check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "ORT": ort},
    )
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    assert calls[-1] == "-m lab.gpu.check"
    asked = [call.split()[-1] for call in calls if "onnxruntime" in call or "mine" in call]
    assert asked == ([ort] if ort else ["onnxruntime-gpu", "onnxruntime"])
    assert ("ORT=WHEEL" in done.stderr) == (not ort)


class Steps:
    """Answers of the commands, by step; ``*_verify`` and the like stand for every precision."""

    def __init__(self, junit: str = PASSED, **answers: tuple[Any, ...]) -> None:
        self.junit = junit
        self.answers: dict[str, tuple[Any, ...]] = {
            "commit": (0, "abc123\n"),
            "tensorrt": (0, "10.16.2.10\n"),
            "source": (0, "/models/smollm2.gguf\n"),
            "doctor": (0, f"noise\n{json.dumps(DOCTOR)}\n"),
            "build": (0, json.dumps({"engine": "/nowhere/engines/one", "refused": []})),
            "tune": (0, json.dumps(TUNE)),
            "verify": (0, json.dumps({"passed": True})),
            "bench": (0, json.dumps(BENCH)),
            "inspect": (0, json.dumps(INSPECT)),
            "layers": (0, json.dumps({**BENCH, "layers": {"decode": TIMES, "prefill": TIMES}})),
            "bench_ort_cuda": (69, ""),
            **answers,
        }
        self.commands: dict[str, list[str]] = {}

    def __call__(self, step: str, command: Sequence[str]) -> Done:
        self.commands[step] = list(command)
        if step == "tests" and self.junit:
            (target,) = [a for a in command if a.startswith("--junitxml=")]
            Path(target.removeprefix("--junitxml=")).write_text(self.junit)
        key = step.replace("-", "_")
        general = key.rsplit("_", 1)[-1]
        return Done(*self.answers.get(key, self.answers.get(general, (0, ""))))


def check(output: Path, steps: Steps, *arguments: str) -> tuple[int, Any]:
    code = gpu_check.main(["--output", str(output), *arguments], steps)
    return code, json.loads((output / "report.json").read_text())


def verdicts(report: Any) -> dict[str, str]:
    return {
        f"{name} {part}": found["verdict"]
        for name, row in report["matrix"].items()
        for part, found in row.items()
    }


def test_a_good_run(tmp_path: Path):
    blocks = (0, json.dumps({**BENCH, "cpu_s_per_step": 0.0004}))
    steps = Steps(gpu_wait_block_bench=blocks)
    code, report = check(tmp_path, steps)
    assert code == 0
    assert report["passed"]
    assert steps.commands["gpu-wait-block-bench"][-2:] == ["--gpu-wait", "block"]
    assert report["problems"] == []
    assert (report["commit"], report["tensorrt"]) == ("abc123", "10.16.2.10")
    assert report["doctor"] == DOCTOR
    found = verdicts(report)
    assert len(found) == 4 * 5
    assert set(found.values()) == {"passed"}
    layers = report["matrix"]["int4"]["layers"]["result"]
    assert layers == {
        "compiled": [DECODE],
        "attention": "fused",
        "times": {"decode": TIMES, "prefill": TIMES},
    }
    assert report["bench"]["ort-cuda"]["code"] == 69  # it is no part of the verdict
    text = (tmp_path / "report.txt").read_text()
    for words in (
        "the GPU works",
        "TensorRT 10.16.2.10, target jetpack7",
        "61.51 tokens/s in decode, 5083 tokens/s in prefill\n",
        "decode: products 120 int4, 1 int8, attention fused, 2 reformats",
        "full, attention fused: no kernel",
        "slice, attention fused: 4.10 ms per step",
        "slice, attention decomposed: cosine",
        "1 passed, 0 failed",
        "spin: 16.26 ms per step, 16.10 ms of CPU time in it, 61.51 tokens/s",
        "yield: 16.26 ms per step, ",
        "block: 16.26 ms per step, 0.40 ms of CPU time in it",
        "exit code 69",
        "\npassed\n",
    ):
        assert words in text


def test_a_figure_that_is_nan_leaves_the_report_readable(tmp_path: Path):
    bench = {
        "schema": 1,
        "device": {"name": "agx-orin-64", "power_mode": "MAXN", "bytes_per_s": None},
        "work": {},
        "batch": 1,
        "context": 576,
        "prompt_tokens": 512,
        "max_prefill": 512,
        "prefill_s": {"median": 0.1},
    }
    spoilt = (3, '{"passed": false, "min_cache_cosine": NaN}')
    check(tmp_path, Steps(int8_verify=spoilt, bench=(0, json.dumps({**BENCH, **bench}))))
    assert len(read_runs(tmp_path / "report.json")) == len(gpu_check.PRECISIONS)


@pytest.mark.parametrize(
    ("version", "target"),
    [
        ("10.3.0", "jetpack6"),
        ("10.14.1.48", "jetpack6"),
        ("10.15.0", "jetpack7"),
        ("10.16.2.10", "jetpack7"),
        ("11.4.0", "trt11"),
        (None, "jetpack6"),
    ],
)
def test_the_target_is_that_of_the_installed_tensorrt(
    version: str | None, target: str, tmp_path: Path
):
    answer = (1, "", "ModuleNotFoundError") if version is None else (0, f"noise\n{version}\n")
    steps = Steps(tensorrt=answer)
    _, report = check(tmp_path, steps)
    assert report["target"] == target
    for name in gpu_check.PRECISIONS:
        command = steps.commands[f"{name}-export"]
        assert command[command.index("--target") + 1] == target


def test_every_command_is_one_that_edge_llm_takes(tmp_path: Path):
    """Held against the real parsers: a wrong option would fail on the device only."""
    steps = Steps()
    check(tmp_path, steps)
    seen = set()
    for command in steps.commands.values():
        if command[0] != "edge-llm":
            continue
        seen.add(command[1])
        verb = cli.get_command(click.Context(cli), command[1])
        assert verb is not None
        # Directories that only the device has.
        arguments = [
            str(tmp_path) if a.startswith(("/nowhere", str(tmp_path))) else a for a in command[2:]
        ]
        verb.make_context(command[1], arguments)
    assert seen == {"export", "build", "verify", "bench", "inspect", "doctor"}


def test_a_bundle_of_ones_own_is_not_exported(tmp_path: Path):
    steps = Steps()
    code, report = check(tmp_path, steps, "--bundle", "bundles/mine")
    assert code == 0
    assert not [step for step in steps.commands if step.endswith("export")]
    assert steps.commands["mine-build"][2] == "bundles/mine"
    assert steps.commands["bench-ort-cuda"][2] == "bundles/mine"
    assert set(report["matrix"]["mine"]) == {"build", "verify", "bench", "layers"}


def failing(message: str, code: int = 70) -> tuple[int, str, str]:
    return code, "", f"a line of the log\nedge-llm: error: {message}"


OUTCOMES: dict[str, tuple[Steps, str]] = {
    "doctor fails": (Steps(doctor=(69, json.dumps(DOCTOR))), "doctor: the GPU works"),
    "doctor dies": (Steps(doctor=(1, "Traceback")), "doctor: no answer"),
    "no GPU": (Steps(doctor=(0, json.dumps(NO_GPU))), "doctor found no GPU that works"),
    "no TensorRT": (
        Steps(tensorrt=(1, "", "ModuleNotFoundError"), build=failing("needs TensorRT", 69)),
        "TensorRT is not here",
    ),
    "export fails": (Steps(export=failing("no room", 71)), "int4 export: edge-llm: error: no room"),
    "build refused": (
        Steps(int8_w8a8_build=failing("no matching rules found")),
        "int8-w8a8 build: edge-llm: error: no matching rules found",
    ),
    "verify misses": (
        Steps(int4_verify=(3, json.dumps({"passed": False, "misses": ["cosine"]}))),
        "int4 verify: exit code 3",
    ),
    "bench fails": (Steps(fp16_bench=failing("out of memory", 71)), "fp16 bench:"),
    "bench says nothing": (Steps(fp16_bench=(0, "")), "fp16 bench: it printed no JSON"),
    "no table of layers": (
        Steps(inspect=(0, json.dumps({"compiled": [], "compiled_unknown": "verbosity NONE"}))),
        "fp16 layers: verbosity NONE",
    ),
    "no times of layers": (Steps(layers=(0, json.dumps(BENCH))), "the profiler timed no layer"),
    "unpacked weights": (
        Steps(int8_inspect=(0, json.dumps({"compiled": [{**DECODE, "unpacking": 120}]}))),
        "int8 layers: 120 layers unpack weights",
    ),
    "nothing answers right": (
        Steps(tune=failing("no variant was built and answered right")),
        "tune failed: edge-llm: error: no variant",
    ),
    "a wait that cannot be had": (
        Steps(gpu_wait_block_bench=failing("gpu_wait is block, but how threads wait")),
        "gpu_wait block failed: edge-llm: error: gpu_wait is block",
    ),
    "tests fail": (Steps(tests=(1, "")), "tests: 1 passed, 0 failed"),
    "no tests": (Steps(junit=""), "tests: 0 passed"),
    "a test is skipped": (
        Steps(junit=with_skip("no PyCUDA")),
        "1 tests were skipped: no PyCUDA",
    ),
}


@pytest.mark.parametrize("name", list(OUTCOMES))
def test_every_fault_keeps_the_report_from_passing(name: str, tmp_path: Path):
    (tmp_path / "tests.xml").write_text(PASSED)  # of an earlier run
    steps, problem = OUTCOMES[name]
    code, report = check(tmp_path, steps)
    assert code == 1
    assert not report["passed"]
    assert any(problem in found for found in report["problems"]), report["problems"]
    text = (tmp_path / "report.txt").read_text()
    assert "NOT passed" in text
    assert problem in text


def test_cells_after_a_failed_build_are_skipped_and_other_rows_go_on(tmp_path: Path):
    _, report = check(tmp_path, Steps(int4_build=failing("no kernel")))
    found = verdicts(report)
    assert found["int4 export"] == "passed"
    assert found["int4 build"] == "failed"
    assert {found[f"int4 {part}"] for part in ("verify", "bench", "layers")} == {"skipped"}
    assert {found[f"int8 {part}"] for part in gpu_check.CELLS} == {"passed"}
    build = report["matrix"]["int4"]["build"]
    assert build["stderr"] == ["a line of the log", "edge-llm: error: no kernel"]
    assert "int4 verify was skipped: the build failed" in report["problems"]
    assert "gpu_wait spin skipped: the build failed" in report["problems"]


def test_a_miss_of_verify_leaves_speed_and_layers(tmp_path: Path):
    missed = (3, json.dumps({"passed": False, "misses": ["cosine 0.9"]}))
    _, report = check(tmp_path, Steps(int4_verify=missed))
    found = verdicts(report)
    assert found["int4 verify"] == "failed"
    assert found["int4 bench"] == found["int4 layers"] == "passed"
    assert report["matrix"]["int4"]["verify"]["result"]["misses"] == ["cosine 0.9"]


def test_tests_of_the_other_dialect_may_be_skipped_on_an_old_tensorrt(tmp_path: Path):
    reason = "dialect native needs TensorRT 10.15, found 10.3.0"
    old = Steps(junit=with_skip(reason), tensorrt=(0, "10.3.0"))
    assert check(tmp_path / "old", old)[0] == 0
    assert check(tmp_path / "new", Steps(junit=with_skip(reason)))[0] == 1


def test_the_builders_scratch_memory_is_reported(tmp_path: Path):
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "build.log").write_text(
        "info: Max Scratch Memory: 8259584 bytes\ninfo: other\n"
        "info: Max Scratch Memory: 1536 bytes\n"
    )
    steps = Steps(build=(0, json.dumps({"engine": str(engine)})))
    _, report = check(tmp_path / "report", steps)
    assert report["matrix"]["fp16"]["build"]["scratch_bytes"] == [8259584, 1536]


def test_the_tests_are_collected_with_what_the_script_installs(tmp_path: Path):
    """Beside a test of the server pytest would stop before the first test on a GPU."""
    steps = Steps()
    check(tmp_path, steps)
    absent = ("starlette", "prometheus_client", "llguidance", "cryptography", "tensorrt_rtx")
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
    )
    done = subprocess.run(
        [*steps.commands["tests"], "--collect-only", "-q"],
        cwd=ROOT,
        # Without plugins that it does not install either, such as pytest-xdist.
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    marked = "mark" + ".gpu"
    files = [path for path in ROOT.glob("tests/**/test_*.py") if marked in path.read_text()]
    assert found == {path.relative_to(ROOT).as_posix() for path in files}


def test_failures_are_named(tmp_path: Path):
    _, report = check(tmp_path, Steps(junit=JUNIT, tests=(1, "")))
    tests = report["tests"]
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (1, 2, 1)
    assert tests["failures"] == ["tests.gpu.test_a::two", "tests.gpu.test_a::three"]
    assert tests["skips"] == {"no PyCUDA": ["tests.gpu.test_b::four"]}
