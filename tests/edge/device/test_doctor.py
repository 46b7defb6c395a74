"""Every fault that doctor knows, planted in a fake machine, and what it then says and returns."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from edge.bundle.engine_file import EngineInfo
from edge.bundle.manifest import read_manifest
from edge.cli.doctor import doctor
from edge.device import probe as device_probe
from edge.device.doctor import Check, exit_code, run_checks, summary, wait_for_gpu
from edge.device.machine import CudaProbe, Library, Machine, Node
from edge.device.nodes import find_gpu_node
from edge.device.scheme_probe import SCHEMES, Verdict
from edge.device.telemetry import Snapshot
from edge.errors import install_command
from tests.conftest import Bundles
from tests.edge.device import jetson_trees as trees
from tests.fake_cuda import FakeGpu

JETPACK6_NODES = (
    "/dev/nvmap",
    "/dev/nvhost-ctrl-gpu",
    "/dev/nvhost-gpu",
    "/dev/nvhost-as-gpu",
    "/dev/dri/renderD128",
)
JETPACK7_NODES = ("/dev/nvmap", "/dev/host1x-fence", "/dev/nvgpu/igpu0/ctrl", "/dev/dri/renderD128")
ORIN = CudaProbe(
    driver_version=12060,
    init_code=0,
    num_devices=1,
    name="Orin",
    compute_capability="8.7",
    context_code=0,
    memory_free_bytes=50 << 30,
    memory_total_bytes=61 << 30,
)
NO_DRIVER = CudaProbe(library_error="libcuda.so.1: cannot open shared object file")
CPU, GPU = "CPUExecutionProvider", "CUDAExecutionProvider"


class FakeMachine(Machine):
    """A machine whose answers are attributes; sysfs is a real tree of files."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.cuda_answers: list[CudaProbe] = [NO_DRIVER]  # the last one stays
        self.node_answers: dict[str, Node] = {}
        self.tensorrt_answer = Library(missing=True, error="ModuleNotFoundError: tensorrt")
        self.pycuda_answer = Library(version="2026.1")
        self.cuda_bindings_answer = Library(version="12.9.10")
        self.packages = [("onnxruntime", "1.32.0", "/venv")]
        self.scheme_answers = [Verdict(name, True, "built", 0.25) for name in SCHEMES]
        self.scheme_failure: str | None = None
        self.onnxruntime_answers = {CPU: Library(version="1.32.0", providers=(CPU,))}
        self.group_answer = frozenset({"orin", "video", "render"})
        self.container = False
        self.memory: int | None = None
        self.now = 1000.0
        self.asked: list[str] = []

    def snapshot(self) -> Snapshot:
        found = super().snapshot()
        if self.memory is not None:
            found = msgspec.structs.replace(found, memory_room_bytes=self.memory)
        return found

    def architecture(self) -> str:
        return "aarch64"

    def in_container(self) -> bool:
        return self.container

    def nodes(self) -> dict[str, Node]:
        return self.node_answers

    def user(self) -> str:
        return "orin"

    def groups(self) -> frozenset[str]:
        return self.group_answer

    def cuda(self) -> CudaProbe:
        self.asked.append(f"cuda at {self.now:g}")
        return self.cuda_answers.pop(0) if len(self.cuda_answers) > 1 else self.cuda_answers[0]

    def tensorrt(self) -> Library:
        self.asked.append("tensorrt")
        return self.tensorrt_answer

    def pycuda(self) -> Library:
        self.asked.append("pycuda")
        return self.pycuda_answer

    def cuda_bindings(self) -> Library:
        self.asked.append("cuda-bindings")
        return self.cuda_bindings_answer

    def onnxruntime_packages(self) -> list[tuple[str, str, str]]:
        return self.packages

    def schemes(self) -> tuple[list[Verdict], str | None]:
        self.asked.append("schemes")
        return self.scheme_answers, self.scheme_failure

    def onnxruntime(self, provider: str) -> Library:
        self.asked.append(provider)
        return self.onnxruntime_answers.get(provider, self.onnxruntime_answers[CPU])

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def node(path: str, usable: bool = True) -> Node:
    return Node(usable, "render" if "dri" in path else "video", 105 if "dri" in path else 44)


@pytest.fixture
def laptop(tmp_path: Path) -> FakeMachine:
    trees.write_tree(tmp_path, {"proc/meminfo": trees.MEMINFO})
    return FakeMachine(tmp_path)


def make_orin(root: Path) -> FakeMachine:
    """A healthy AGX Orin with JetPack 6, as fast as it goes."""
    tree = trees.agx_orin_jetpack6(root)
    gpu = tree / "sys/devices/platform/bus@0/17000000.gpu/devfreq/17000000.gpu"
    (gpu / "min_freq").write_text((gpu / "max_freq").read_text())
    for number in (2, 3):
        (tree / f"sys/class/hwmon/hwmon2/oc{number}_event_cnt").write_text("0\n")
    machine = FakeMachine(tree)
    machine.cuda_answers = [ORIN]
    machine.node_answers = {path: node(path) for path in JETPACK6_NODES}
    machine.tensorrt_answer = Library(version="10.3.0")
    return machine


@pytest.fixture
def orin(tmp_path: Path) -> FakeMachine:
    return make_orin(tmp_path / "orin")


def find(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_a_laptop_without_a_gpu_is_fine(laptop: FakeMachine):
    checks = run_checks(laptop)
    assert statuses(checks) == {
        "system": "ok",
        "device nodes": "skip",
        "driver": "skip",
        "cuInit": "skip",
        "GPU": "skip",
        "TensorRT": "skip",
        "CUDA in Python": "skip",
        "ONNX Runtime": "ok",
        "ONNX Runtime packages": "ok",
        "power and clocks": "skip",
        "schemes": "skip",
        "memory": "ok",
    }
    assert exit_code(checks) == 0
    assert summary(checks) == "no NVIDIA GPU here; the CPU backend works and nothing is wrong"
    assert laptop.asked == ["cuda at 1000", CPU]  # TensorRT is not even looked for


def test_a_healthy_orin(orin: FakeMachine):
    checks = run_checks(orin)
    assert set(statuses(checks).values()) == {"ok"}
    assert "Jetson Linux 36.4.3, JetPack 6.2" in find(checks, "system").detail
    assert find(checks, "GPU").detail == "Orin, compute capability 8.7"
    assert "mode MAXN, GPU 1300 of 1300 MHz, 23.0 W" in find(checks, "power and clocks").detail
    assert exit_code(checks) == 0
    assert summary(checks) == "the GPU works"


def test_a_jetson_on_another_makers_board(orin: FakeMachine):
    board = "NVIDIA Orin Nano Developer Kit - DSBOARD-ORNXS"
    (orin.root / "proc/device-tree/model").write_text(f"{board}\0")
    checks = run_checks(orin)
    assert find(checks, "system").detail.startswith(f"{board}, Jetson Linux 36.4.3")
    assert find(checks, "power and clocks").status == "ok"


def test_a_jetson_without_onnxruntime_runs_engines_only(orin: FakeMachine):
    orin.onnxruntime_answers = {CPU: Library(missing=True, error="ModuleNotFoundError")}
    checks = run_checks(orin)
    assert find(checks, "ONNX Runtime").status == "warn"
    assert exit_code(checks) == 0
    orin.tensorrt_answer = Library(missing=True, error="ModuleNotFoundError")
    checks = run_checks(orin)
    assert find(checks, "ONNX Runtime").status == "fail"
    assert exit_code(checks) == 69


def refuse(machine: FakeMachine, *names: str, reason: str = "no matching rules found") -> None:
    machine.scheme_answers = [
        msgspec.structs.replace(each, built=False, detail=reason) if each.scheme in names else each
        for each in machine.scheme_answers
    ]


def test_every_scheme_has_a_verdict(orin: FakeMachine):
    checks = run_checks(orin)
    for name, scheme in SCHEMES.items():
        found = find(checks, f"scheme {name}")
        assert found.status == "ok"
        assert found.detail == f"{scheme.title}: built in 0.2 s"
    assert not any(check.name.startswith("scheme") for check in run_checks(orin, schemes=False))


def test_a_refused_scheme_is_a_warning_with_the_builders_reason(orin: FakeMachine):
    orin.tensorrt_answer = Library(version="10.16.2.10")
    refuse(orin, "w8a8", "attention")
    checks = run_checks(orin)
    found = find(checks, "scheme w8a8")
    assert found.status == "warn"
    assert "--quant int8-w8a8 cannot be built here" in found.detail
    assert found.cause == "no matching rules found"
    assert found.cure.startswith("export with --target jetpack7")
    assert find(checks, "scheme attention").cure == "export with --dialect portable"
    assert exit_code(checks) == 0


def test_a_tensorrt_without_even_fp16_fails(orin: FakeMachine):
    refuse(orin, "fp16")
    checks = run_checks(orin)
    assert find(checks, "scheme fp16").status == "fail"
    assert exit_code(checks) == 69


def test_operators_that_came_later_are_no_fault_of_jetpack_6(orin: FakeMachine):
    refuse(orin, "attention", "kv-update")
    checks = run_checks(orin)  # TensorRT 10.3
    assert find(checks, "scheme attention").status == "skip"
    assert "TensorRT 10.15 has it, this is 10.3.0" in find(checks, "scheme kv-update").detail
    assert summary(checks) == "the GPU works"


def test_a_scheme_that_crashes_the_builder_is_named(orin: FakeMachine):
    orin.scheme_answers = orin.scheme_answers[:2]
    orin.scheme_failure = "it crashed with SIGSEGV"
    checks = run_checks(orin)
    found = find(checks, "scheme int4-planes")
    assert found.status == "warn"
    assert "crashed with SIGSEGV" in found.cause
    assert "nor were w8a8, w8a8-fp32, attention, kv-update" in found.detail
    assert find(checks, "scheme int4").status == "ok"


@pytest.mark.parametrize(
    "answer", [Library(missing=True, error="ModuleNotFoundError"), Library(error="ImportError: x")]
)
def test_without_tensorrt_no_scheme_is_tried(answer: Library, orin: FakeMachine):
    orin.tensorrt_answer = answer
    found = find(run_checks(orin), "schemes")
    assert found.status == "skip"
    assert "no TensorRT that works" in found.detail
    assert "schemes" not in orin.asked


Plant = Callable[[FakeMachine], None]


def cuda(**changes: Any) -> Plant:
    def plant(machine: FakeMachine) -> None:
        machine.cuda_answers = [msgspec.structs.replace(ORIN, **changes)]

    return plant


def init(code: int) -> Plant:
    def plant(machine: FakeMachine) -> None:
        machine.cuda_answers = [CudaProbe(driver_version=12060, init_code=code)]

    return plant


def closed(*paths: str, code: int = 100) -> Plant:
    def plant(machine: FakeMachine) -> None:
        machine.node_answers.update({path: node(path, usable=False) for path in paths})
        machine.group_answer = frozenset({"orin"})
        init(code)(machine)

    return plant


def without(*paths: str, container: bool = False) -> Plant:
    def plant(machine: FakeMachine) -> None:
        for path in paths:
            del machine.node_answers[path]
        machine.container = container
        init(999)(machine)

    return plant


def write(name: str, text: str) -> Plant:
    def plant(machine: FakeMachine) -> None:
        (machine.root / name).write_text(text)

    return plant


def set_to(**answers: Any) -> Plant:
    def plant(machine: FakeMachine) -> None:
        for name, value in answers.items():
            setattr(machine, name, value)

    return plant


def no_cuda_calls(machine: FakeMachine) -> None:
    machine.pycuda_answer = Library(missing=True, error="ModuleNotFoundError")
    machine.cuda_bindings_answer = Library(error="RuntimeError: Failed to dlopen libcuda.so.1")


FAULTS: list[tuple[str, Plant, str, int, tuple[str, ...]]] = [
    # Name, fault, the check that fails first, exit code, words of cause and cure.
    (
        "JetPack 5",
        write("etc/nv_tegra_release", "# R35 (release), REVISION: 4.1, GCID: 1"),
        "system",
        69,
        ("TensorRT 8", "JetPack 6.2 or 7.2"),
    ),
    ("no nvmap", without("/dev/nvmap"), "device nodes", 69, ("/dev/nvmap missing", "dmesg")),
    (
        "a container without the runtime",
        without(*JETPACK6_NODES, container=True),
        "device nodes",
        69,
        ("/dev/nvmap and /dev/nvhost-gpu or", "--runtime nvidia"),
    ),
    (
        "not in group video",
        closed("/dev/nvmap", "/dev/nvhost-gpu"),
        "device nodes",
        77,
        ("is not in video", "usermod -aG video orin", "--group-add 44"),
    ),
    (
        "not in group video, and the driver says 999",
        closed("/dev/nvmap", code=999),
        "device nodes",
        77,
        ("/dev/nvmap closed",),
    ),
    (
        "no driver library",
        set_to(cuda_answers=[NO_DRIVER]),
        "driver",
        69,
        ("cannot open shared object", "nvidia-l4t-cuda"),
    ),
    (
        "the driver crashes",
        set_to(cuda_answers=[CudaProbe(failure="it crashed with SIGSEGV")]),
        "driver",
        69,
        ("crashed with SIGSEGV",),
    ),
    ("an old driver", cuda(driver_version=11040), "driver", 69, ("CUDA 11.4", "CUDA 12 or newer")),
    ("cuInit 999", init(999), "cuInit", 69, ("error 999", "groups video and render")),
    ("cuInit 803", init(803), "cuInit", 69, ("different versions", "reboot")),
    ("cuInit 804", init(804), "cuInit", 69, ("cuda-compat",)),
    ("cuInit 801", init(801), "cuInit", 69, ("/sys",)),
    ("cuInit 802", init(802), "cuInit", 69, ("--wait-gpu",)),
    ("cuInit 100", init(100), "cuInit", 69, ("sees no GPU",)),
    ("cuInit 35", init(35), "cuInit", 69, ("older than the CUDA libraries", "update")),
    ("cuInit 34", init(34), "cuInit", 69, ("stub", "LD_LIBRARY_PATH")),
    ("an unknown code", init(12345), "cuInit", 69, ("error 12345", "cuda.h")),
    (
        "a hidden GPU",
        set_to(cuda_answers=[CudaProbe(driver_version=12060, init_code=0, num_devices=0)]),
        "GPU",
        69,
        ("CUDA_VISIBLE_DEVICES",),
    ),
    ("a full GPU", cuda(context_code=2), "GPU", 71, ("error 2",)),
    ("no context", cuda(context_code=700), "GPU", 69, ("error 700",)),
    (
        "a TensorRT that does not load",
        set_to(tensorrt_answer=Library(error="ImportError: libnvinfer.so.10")),
        "TensorRT",
        69,
        ("libnvinfer.so.10",),
    ),
    (
        "a TensorRT that cannot build",
        set_to(tensorrt_answer=Library(version="10.3.0", error="could not build")),
        "TensorRT",
        69,
        ("10.3.0, but it does not work",),
    ),
    ("TensorRT 8", set_to(tensorrt_answer=Library(version="8.6.2")), "TensorRT", 69, ("10.3",)),
    (
        "ONNX Runtime whose CUDA does not load",
        set_to(
            onnxruntime_answers={
                CPU: Library(version="1.32.0", providers=(GPU, CPU)),
                GPU: Library(version="1.32.0", providers=(GPU, CPU), error="libcudnn.so.9"),
            }
        ),
        "ONNX Runtime",
        69,
        ("libcudnn.so.9", "--backend ort-cpu"),
    ),
    (
        "an old ONNX Runtime",
        set_to(onnxruntime_answers={CPU: Library(version="1.18.1", providers=(CPU,))}),
        "ONNX Runtime",
        69,
        ("1.23 is the oldest",),
    ),
    (
        "nothing calls CUDA",
        no_cuda_calls,
        "CUDA in Python",
        69,
        (
            "PyCUDA is not installed",
            "cuda-bindings fails: RuntimeError: Failed to dlopen",
            "scripts/install-pycuda",
            "pip install 'cuda-bindings>=12.9.1,<13'",
        ),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_planted_fault_is_named_with_its_cure(fault: Any, orin: FakeMachine):
    _, plant, name, code, words = fault
    plant(orin)
    checks = run_checks(orin)
    first = next(check for check in checks if check.status == "fail")
    assert first.name == name
    assert first.exit_code == code == exit_code(checks)
    text = f"{first.detail} | {first.cause} | {first.cure}"
    for word in words:
        assert word in text, text
    assert first.cause
    assert first.cure
    assert summary(checks).startswith(f"{name} is what to repair first")


def test_no_fault_is_blamed_on_something_healthy(orin: FakeMachine, tmp_path: Path):
    for number, (_, plant, _, _, _) in enumerate(FAULTS):
        machine = make_orin(tmp_path / str(number))
        plant(machine)
        for check in run_checks(machine):
            assert (check.status == "fail") == (check.exit_code != 0)
            assert bool(check.cause) == (check.status in ("warn", "fail"))


def test_a_closed_render_node_alone_is_a_warning(orin: FakeMachine):
    closed("/dev/dri/renderD128")(orin)
    found = find(run_checks(orin), "device nodes")
    assert found.status == "warn"
    assert "is not in render" in found.cause


def test_nodes_do_not_matter_when_cuda_works(orin: FakeMachine):
    """As in WSL, which has none of them."""
    orin.node_answers = {}
    assert find(run_checks(orin), "device nodes").status == "ok"


def test_the_nodes_of_jetpack_7(tmp_path: Path):
    machine = FakeMachine(trees.agx_orin_jetpack7(tmp_path))
    machine.node_answers = {path: node(path) for path in JETPACK7_NODES}
    init(999)(machine)
    checks = run_checks(machine)
    assert find(checks, "device nodes").status == "ok"
    assert find(checks, "device nodes").detail.startswith("4 of them")
    assert "Jetson Linux 39.2.0" in find(checks, "system").detail


def test_the_nodes_of_a_gpu_in_a_slot(laptop: FakeMachine):
    laptop.node_answers = {"/dev/nvidiactl": node("/dev/nvidiactl")}
    init(999)(laptop)
    checks = run_checks(laptop)
    assert find(checks, "device nodes").detail == "/dev/nvidia0 missing"
    assert exit_code(checks) == 69


def test_a_missing_tensorrt_is_a_warning_with_the_way_to_install_it(
    orin: FakeMachine, laptop: FakeMachine
):
    orin.tensorrt_answer = Library(missing=True, error="ModuleNotFoundError")
    found = find(run_checks(orin), "TensorRT")
    assert found.status == "warn"
    assert "--system-site-packages" in found.cure
    laptop.cuda_answers = [ORIN]
    found = find(run_checks(laptop), "TensorRT")
    assert found.cure == install_command("tensorrt")


def test_a_gpu_that_nothing_installed_can_use_is_a_warning(laptop: FakeMachine):
    laptop.cuda_answers = [ORIN]
    checks = run_checks(laptop)
    found = find(checks, "ONNX Runtime")
    assert found.status == "warn"
    assert found.cure.endswith(install_command("cuda"))
    assert "on the CPU" in found.detail
    assert exit_code(checks) == 0
    assert summary(checks) == "the GPU works; 2 warnings"


MISSING = Library(missing=True, error="ModuleNotFoundError: No module named 'pycuda'")


@pytest.mark.parametrize(
    ("pycuda", "bindings", "status", "words"),
    [
        (None, None, "ok", ("PyCUDA 2026.1 is used, cuda-bindings 12.9.10 for CUDA graphs",)),
        (MISSING, None, "ok", ("cuda-bindings 12.9.10 are used", "no fault")),
        (
            Library(error="ImportError: libcurand.so.10"),
            None,
            "warn",
            ("cuda-bindings 12.9.10 are used", "libcurand.so.10", "scripts/install-pycuda"),
        ),
        (None, MISSING, "warn", ("without CUDA graphs", "cuda-bindings>=12.9.1,<13")),
        (
            None,
            Library(version="13.5.0"),
            "warn",
            ("for CUDA 13, the driver is for CUDA 12", "cuda-bindings>=12.9.1,<13"),
        ),
    ],
)
def test_what_calls_cuda(
    pycuda: Library | None,
    bindings: Library | None,
    status: str,
    words: tuple[str, ...],
    orin: FakeMachine,
):
    orin.pycuda_answer = pycuda or orin.pycuda_answer
    orin.cuda_bindings_answer = bindings or orin.cuda_bindings_answer
    checks = run_checks(orin)
    found = find(checks, "CUDA in Python")
    assert found.status == status
    for word in words:
        assert word in f"{found.detail} | {found.cause} | {found.cure}"
    assert exit_code(checks) == 0


def test_a_newer_driver_gets_its_own_bindings(orin: FakeMachine):
    orin.cuda_answers = [msgspec.structs.replace(ORIN, driver_version=13020)]
    orin.cuda_bindings_answer = MISSING
    assert "'cuda-bindings>=13,<14'" in find(run_checks(orin), "CUDA in Python").cure


@pytest.mark.parametrize(
    ("places", "cause"),
    [(("/venv", "/venv"), "overwritten files"), (("/venv", "/usr/lib"), "in /venv hides")],
)
def test_two_onnx_runtimes_are_a_warning(places: tuple[str, str], cause: str, orin: FakeMachine):
    orin.packages = [("onnxruntime", "1.23.2", places[0]), ("onnxruntime-gpu", "1.23.0", places[1])]
    found = find(run_checks(orin), "ONNX Runtime packages")
    assert (found.status, found.exit_code) == ("warn", 0)
    assert cause in found.cause
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in found.cure


def test_the_onnx_runtimes_of_this_machine():
    [(name, version, place)] = Machine().onnxruntime_packages()
    assert name == "onnxruntime"
    assert version == metadata.version("onnxruntime")
    assert (Path(place) / "onnxruntime").is_dir()


def test_the_probes_of_what_calls_cuda(monkeypatch: pytest.MonkeyPatch):
    gpu = FakeGpu()
    for name, module in gpu.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["pycuda"], "VERSION_TEXT", "2026.1", raising=False)
    # The package itself loads the real driver: 12.9 takes a stand-in for it and fails.
    package = types.ModuleType("cuda.bindings")
    monkeypatch.setattr(package, "__version__", "13.0.1", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    assert device_probe.probe_pycuda() == {"version": "2026.1"}
    assert device_probe.probe_cuda_bindings() == {"version": "13.0.1"}
    gpu.lost = 100
    assert "100" in device_probe.probe_cuda_bindings()["error"]


def test_power_and_clocks(tmp_path: Path):
    machine = FakeMachine(trees.agx_orin_jetpack7(tmp_path))
    found = find(run_checks(machine), "power and clocks")
    assert found.status == "warn"
    for words in ("gpu-throttle-alert", "mode 50W caps clocks below MAXN", "follow the load"):
        assert words in found.cause
    for words in ("cooling", "sudo nvpmodel -m 0", "sudo jetson_clocks"):
        assert words in found.cure
    machine = FakeMachine(trees.agx_orin_jetpack6(tmp_path / "6"))
    assert "5 over-current events" in find(run_checks(machine), "power and clocks").cause


def test_waiting_for_the_gpu(orin: FakeMachine):
    orin.cuda_answers = [CudaProbe(init_code=802), CudaProbe(init_code=100), ORIN]
    assert wait_for_gpu(orin, 30).works
    assert orin.now == 1002
    orin.cuda_answers = [CudaProbe(init_code=802)]
    assert not wait_for_gpu(orin, 2.5).works
    assert orin.now == 1004.5
    assert orin.asked[-1] == "cuda at 1004.5"  # asked once more at the end
    before = len(orin.asked)
    wait_for_gpu(orin, 0)
    assert len(orin.asked) == before + 1


def test_waiting_means_that_a_gpu_is_required(laptop: FakeMachine):
    assert exit_code(run_checks(laptop, wait_gpu_s=0)) == 69
    assert exit_code(run_checks(laptop)) == 0


def test_memory(orin: FakeMachine, tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable")
    orin.memory = 100 << 20
    checks = run_checks(orin, bundle)
    assert find(checks, "memory").status == "fail"
    assert "--kv-capacity" in find(checks, "memory").cure
    assert exit_code(checks) == 71
    assert find(run_checks(orin), "memory").status == "ok"  # nothing to hold it against
    (orin.root / "proc/meminfo").unlink()
    orin.memory = None
    assert find(run_checks(orin), "memory").status == "warn"


def test_a_gpu_with_its_own_memory_is_asked_for_that(laptop: FakeMachine, tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable")
    cuda(memory_free_bytes=1 << 20)(laptop)
    assert find(run_checks(laptop, bundle), "memory").status == "fail"


def test_a_damaged_bundle(laptop: FakeMachine, tiny_bundles: Bundles, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2", "portable"), bundle)
    assert find(run_checks(laptop, bundle), "bundle").status == "ok"
    data = bytearray((bundle / "tokenizer.json").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "tokenizer.json").write_bytes(data)
    checks = run_checks(laptop, bundle)
    assert find(checks, "bundle").status == "fail"
    assert "tokenizer.json" in find(checks, "bundle").cause
    assert exit_code(checks) == 65
    assert "engines" not in statuses(checks)  # nothing of it was parsed
    (bundle / "manifest.json").unlink()
    assert exit_code(run_checks(laptop, bundle)) == 65


def test_a_bundle_that_this_onnxruntime_cannot_run(laptop: FakeMachine, tiny_bundles: Bundles):
    laptop.onnxruntime_answers = {CPU: Library(version="1.23.2", providers=(CPU,))}
    found = find(run_checks(laptop, tiny_bundles("qwen2", "native")), "bundle")
    assert found.status == "warn"
    assert "needs ONNX Runtime 1.26, found 1.23.2" in found.cause
    found = find(run_checks(laptop, tiny_bundles("qwen2", "portable")), "bundle")
    assert found.status == "ok"


def add_engine(bundle: Path, name: str, **changes: Any) -> Path:
    """An engine directory with a plan of eight bytes."""
    manifest = read_manifest(bundle)
    plan = b"not real"
    info = EngineInfo(
        schema_version=1,
        producer="test",
        created="2026-01-01T00:00:00Z",
        key="0" * 64,
        plan="engine.plan",
        plan_bytes=len(plan),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        flavour="tensorrt",
        tensorrt_version="10.3.0.26",
        compute_capability="8.7",
        device="Orin",
        jetpack="6.2",
        l4t="36.4.3",
        sources={"decoder.onnx": manifest.files["decoder.onnx"].sha256},
        max_batch=1,
        max_prefill=64,
        kv_capacity=128,
        kv_buckets=(128,),
        kv_read="slice",
        options={"max_batch": 1},
        profiles=(),
        builder="api",
        build_s=1.0,
        peak_memory_bytes=None,
        weights=(),
        layers=(),
    )
    info = msgspec.structs.replace(info, **changes)
    directory = bundle / "engines" / name
    trees.write_tree(directory, {"engine.plan": plan, "engine.json": msgspec.json.encode(info)})
    return directory


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundles: Bundles) -> Path:
    target = tmp_path / "with engines"
    shutil.copytree(tiny_bundles("qwen2", "portable"), target)
    return target


def test_engines_against_this_machine(orin: FakeMachine, laptop: FakeMachine, bundle: Path):
    assert find(run_checks(orin, bundle), "engines").status == "warn"  # none there
    add_engine(bundle, "other-trt", tensorrt_version="10.16.2.10")
    checks = run_checks(orin, bundle)
    found = find(checks, "engines")
    assert found.status == "fail"
    assert "another TensorRT (tensorrt 10.16.2.10, here tensorrt 10.3.0)" in found.cause
    assert "edge-llm build" in found.cause
    assert exit_code(checks) == 78
    add_engine(bundle, "other-gpu", compute_capability="8.6")
    assert exit_code(run_checks(orin, bundle)) == 78
    add_engine(bundle, "right")
    found = find(run_checks(orin, bundle), "engines")
    assert (found.status, found.detail) == ("ok", "right fits (2 others do not)")
    # Without a GPU engines of another machine are no fault.
    found = find(run_checks(laptop, bundle), "engines")
    assert (found.status, found.exit_code) == ("skip", 0)


def test_own_kernels_that_python_launches_need_cuda_bindings(orin: FakeMachine, bundle: Path):
    add_engine(bundle, "own", plugins="python")
    assert find(run_checks(orin, bundle), "engines").status == "ok"
    orin.cuda_bindings_answer = MISSING
    found = find(run_checks(orin, bundle), "engines")
    assert found.status == "fail"
    assert "own has own kernels, which cuda-bindings launch for TensorRT < 10.13" in found.cause


def test_a_damaged_plan(orin: FakeMachine, laptop: FakeMachine, bundle: Path):
    (add_engine(bundle, "right") / "engine.plan").write_bytes(b"tampered")
    for machine in (orin, laptop):
        checks = run_checks(machine, bundle)
        assert "is damaged" in find(checks, "engines").cause
        assert exit_code(checks) == 65


# From here on the real `Machine`, and the probes in real child processes.


def test_this_very_machine():
    checks = run_checks()
    assert find(checks, "ONNX Runtime").status == "ok"
    if find_gpu_node() is None:
        assert exit_code(checks) == 0


def test_the_nodes_of_a_directory(tmp_path: Path):
    trees.write_tree(tmp_path, {"dev/nvmap": "", "dev/nvgpu/igpu0/ctrl": "", "dev/null": ""})
    (tmp_path / "dev/nvmap").chmod(0)
    found = Machine(tmp_path).nodes()
    assert set(found) == {"/dev/nvmap", "/dev/nvgpu/igpu0/ctrl"}
    assert found["/dev/nvgpu/igpu0/ctrl"].usable
    assert found["/dev/nvmap"].usable == (os.geteuid() == 0)
    assert found["/dev/nvmap"].gid == (tmp_path / "dev/nvmap").stat().st_gid


def test_marks_of_a_container(tmp_path: Path):
    assert not Machine(tmp_path).in_container()
    trees.write_tree(tmp_path, {"run/.containerenv": ""})
    assert Machine(tmp_path).in_container()


DRIVER = """
#include <stdlib.h>
#include <string.h>
static int env(const char *name, int other) {
    const char *text = getenv(name);
    return text ? atoi(text) : other;
}
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuInit(unsigned flags) {
    int code = env("FAKE_INIT", 0);
    if (code < 0) abort();
    return code;
}
int cuDeviceGetCount(int *count) { *count = env("FAKE_COUNT", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : -1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = context;
    return env("FAKE_CONTEXT", 0);
}
int cuCtxSetCurrent(void *context) { return context ? 0 : 201; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *free = (size_t)40 << 30; *total = (size_t)61 << 30;
    return 0;
}
"""


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a ``libcuda.so.1`` that answers what the environment says."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def test_the_driver_is_asked_through_ctypes(fake_driver: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_driver))
    assert Machine().cuda() == CudaProbe(
        driver_version=12060,
        init_code=0,
        num_devices=1,
        name="Orin",
        compute_capability="8.7",
        context_code=0,
        memory_free_bytes=40 << 30,
        memory_total_bytes=61 << 30,
    )
    monkeypatch.setenv("FAKE_CONTEXT", "2")
    probe = Machine().cuda()
    assert (probe.context_code, probe.memory_free_bytes, probe.works) == (2, None, False)
    monkeypatch.setenv("FAKE_COUNT", "0")
    assert Machine().cuda() == CudaProbe(driver_version=12060, init_code=0, num_devices=0)
    for code in (999, 803, 35):
        monkeypatch.setenv("FAKE_INIT", str(code))
        assert Machine().cuda() == CudaProbe(driver_version=12060, init_code=code)
    monkeypatch.setenv("FAKE_INIT", "-1")
    assert Machine().cuda() == CudaProbe(failure="it crashed with SIGABRT")


def test_the_verb_finds_what_a_driver_says(fake_driver: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_driver))
    monkeypatch.setenv("FAKE_INIT", "803")
    command = [sys.executable, "-m", "edge.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    report = json.loads(done.stdout)
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["cuInit"]["detail"] == "error 803"
    assert done.returncode == report["exit_code"] == 69


def test_a_library_that_prints_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert Machine().tensorrt().missing or Machine().tensorrt().version
    trees.write_tree(tmp_path, {"tensorrt.py": "print('{junk')\nraise ImportError('libnvinfer')"})
    found = Machine().tensorrt()
    assert (found.missing, found.error) == (False, "ImportError: libnvinfer")
    trees.write_tree(tmp_path, {"onnxruntime.py": "import os\nos.kill(os.getpid(), 11)"})
    assert Machine().onnxruntime(CPU).error == "it crashed with SIGSEGV"


def test_a_tensorrt_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its reason is a warning, and the error is pybind11's (NVIDIA/TensorRT#2913)."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reason = "[TRT] [W] CUDA initialization failure with error: 35. Please check your CUDA"
    lines = [
        "import sys",
        "__version__ = '10.3.0'",
        "class Logger:",
        "    WARNING, ERROR = 2, 1",
        "    def __init__(self, most): self.most = most",
        "def Builder(logger):",
        f"    if logger.most >= Logger.WARNING: sys.stderr.write('{reason}\\n')",
        "    raise TypeError('pybind11::init(): factory function returned nullptr')",
    ]
    trees.write_tree(tmp_path, {"tensorrt.py": "\n".join(lines)})
    found = Machine().tensorrt()
    assert (found.version, found.missing) == ("10.3.0", False)
    assert found.error == f"TensorRT does not start; {reason}"


def test_what_a_library_prints_is_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As onnxruntime-gpu 1.31 prints it, in colours, before it goes on with the CPU."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = [
        "import sys",
        "__version__ = '1.31.1'",
        "def get_available_providers(): return ['CUDAExecutionProvider', 'CPUExecutionProvider']",
        "class InferenceSession:",
        "    def __init__(self, model, providers):",
        "        sys.stderr.write('\\x1b[1;31m[E:onnxruntime] FAIL : Failed to load library "
        "libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open\\n\\x1b[m')",
        "        sys.stderr.write('\\x1b[0;93m[W:onnxruntime] Require cuDNN 9.*\\x1b[m\\n')",
        "    def get_providers(self): return ['CPUExecutionProvider']",
    ]
    trees.write_tree(tmp_path, {"onnxruntime.py": "\n".join(lines)})
    found = Machine().onnxruntime(GPU)
    assert found.error is not None
    assert found.error.endswith("; libcublasLt.so.13: cannot open")
    assert "\x1b" not in found.error


def test_the_tensorrt_probe_uses_names_that_exist(monkeypatch: pytest.MonkeyPatch):
    """TensorRT for RTX has the same API; without a GPU it builds, but cannot load."""
    rtx = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    found = device_probe.probe_tensorrt()
    assert found["version"] == rtx.__version__
    assert found.keys() <= {"version", "error"}


def test_the_onnxruntime_probe_runs_a_graph():
    found = Machine().onnxruntime(CPU)
    assert (found.missing, found.error) == (False, None)
    assert CPU in found.providers
    assert found.version is not None


def test_the_table(tiny_bundles: Bundles):
    done = CliRunner().invoke(doctor, [str(tiny_bundles("qwen2", "portable"))])
    assert done.exception is None, done.output
    lines = done.output.splitlines()
    assert any(line.startswith("ok   bundle") and "files whole" in line for line in lines)
    assert lines[-1]
    required = CliRunner().invoke(doctor, ["--wait-gpu", "0"])
    assert "device nodes" in required.output


def test_exit_codes_are_documented():
    assert doctor.help is not None
    for code in ("0", "65", "69", "71", "77", "78"):
        assert f" {code} " in doctor.help
