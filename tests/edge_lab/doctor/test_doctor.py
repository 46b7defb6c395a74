"""Every fault that doctor knows, planted in a fake machine, and what it then says and returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from edge.device.nodes import SLOT_NODES
from edge.errors import install_command
from edge_lab.cli.doctor import doctor
from edge_lab.doctor import exit_code, run_checks, summary, wait_for_gpu
from edge_lab.doctor.machine import CudaProbe, Library, Machine
from edge_lab.doctor.scheme_probe import SCHEMES, Verdict
from tests.conftest import Bundles
from tests.edge.device import jetson_trees as trees
from tests.edge_lab.doctor.fake_machine import (
    CPU,
    GPU,
    JETPACK6_NODES,
    MISSING,
    NO_DRIVER,
    ORIN,
    FakeMachine,
    Plant,
    closed,
    cuda,
    find,
    init,
    make_orin,
    no_cuda_calls,
    node,
    set_to,
    statuses,
    without,
    write,
)

JETPACK7_NODES = ("/dev/nvmap", "/dev/host1x-fence", "/dev/nvgpu/igpu0/ctrl", "/dev/dri/renderD128")


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
        "confinement": "ok",
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


def test_both_kinds_of_own_kernels_have_a_verdict(orin: FakeMachine):
    orin.plugin_answers = [
        Verdict("compiled", False, "PTX was not taken", 1.0),
        Verdict("python", True, "built as w4_linear", 0.5),
    ]
    checks = run_checks(orin)
    refused, built = (find(checks, f"own kernels {kind}") for kind in ("compiled", "python"))
    assert (refused.status, refused.cause) == ("warn", "PTX was not taken")
    assert "--kernels tensorrt" in refused.cure
    assert (built.status, "built as w4_linear in 0.5 s" in built.detail) == ("ok", True)
    assert exit_code(checks) == 0
    orin.plugin_answers, orin.plugin_failure = [], "it crashed with SIGSEGV"
    assert "SIGSEGV" in find(run_checks(orin), "own kernels").cause


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
    orin.scheme_answers = orin.scheme_answers[:6]
    orin.scheme_failure = "it crashed with SIGSEGV"
    checks = run_checks(orin)
    found = find(checks, "scheme int4-planes-g32")
    assert found.status == "warn"
    assert "crashed with SIGSEGV" in found.cause
    assert "nor were w8a8, w8a8-fp32, w8a8-token, attention, kv-update" in found.detail
    assert find(checks, "scheme int4-g32").status == "ok"


@pytest.mark.parametrize(
    "answer", [Library(missing=True, error="ModuleNotFoundError"), Library(error="ImportError: x")]
)
def test_without_tensorrt_no_scheme_is_tried(answer: Library, orin: FakeMachine):
    orin.tensorrt_answer = answer
    found = find(run_checks(orin), "schemes")
    assert found.status == "skip"
    assert "no TensorRT that works" in found.detail
    assert "schemes" not in orin.asked


def test_a_machine_that_confines_nobody_is_warned_of(laptop: FakeMachine):
    assert Machine().unconfined() is None
    laptop.why_unconfined = "this kernel does not confine a process"
    found = find(run_checks(laptop), "confinement")
    assert (found.status, found.cause) == ("warn", laptop.why_unconfined)
    assert "default seccomp profile" in found.cure


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


def test_a_closed_render_node_is_a_fault_on_a_jetson_only(orin: FakeMachine, laptop: FakeMachine):
    """CUDA answers 801 there: whoever is in video alone has this one node closed."""
    closed("/dev/dri/renderD128")(orin)
    checks = run_checks(orin)
    assert exit_code(checks) == 77
    found = find(checks, "device nodes")
    assert found.status == "fail"
    assert "is not in render" in found.cause
    laptop.node_answers = {name: node(name) for name in SLOT_NODES}
    closed("/dev/dri/renderD128")(laptop)
    assert find(run_checks(laptop), "device nodes").status == "warn"


def test_a_tensorrt_that_lacks_the_dla_compiler_says_what_to_install(orin: FakeMachine):
    orin.tensorrt_answer = Library(
        error="ImportError: libnvdla_compiler.so: cannot open shared object file"
    )
    assert "nvidia-l4t-dla-compiler" in find(run_checks(orin), "TensorRT").cure


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


def hide(machine: FakeMachine, *names: str) -> None:
    for name in names:
        (machine.root / name).unlink()


def test_a_container_hides_the_name_of_the_board(orin: FakeMachine):
    """Docker masks /sys/firmware, where the device tree is."""
    hide(orin, "proc/device-tree/model")
    found = find(run_checks(orin), "system")
    assert found.detail.startswith("a Jetson whose name is hidden here, Jetson Linux 36.4.3")
    assert found.status == "ok"


def test_device_nodes_tell_a_jetson_where_its_files_are_hidden(orin: FakeMachine):
    """As in a container that was started with --device for each node."""
    hide(orin, "proc/device-tree/model", "etc/nv_tegra_release", "var/lib/dpkg/status")
    orin.container = True
    assert find(run_checks(orin), "system").cure.endswith("mount /etc/nv_tegra_release read-only")
    closed(*JETPACK6_NODES, code=801)(orin)
    checks = run_checks(orin)
    found = find(checks, "device nodes")
    assert found.detail.startswith("/dev/nvmap, ")
    assert "--group-add 44 --group-add 105" in found.cure
    assert exit_code(checks) == 77


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
def test_doctor_tells_which_package_calls_cuda(
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
