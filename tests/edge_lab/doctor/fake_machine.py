"""A machine for doctor whose answers are attributes, and faults to plant in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_lab.doctor import Check
from edge_lab.doctor.machine import CudaProbe, Library, Machine, Node
from edge_lab.doctor.scheme_probe import SCHEMES, WIDE, Verdict
from edge_lab.telemetry import Snapshot
from tests.edge.device import jetson_trees as trees

JETPACK6_NODES = (
    "/dev/nvmap",
    "/dev/nvhost-ctrl-gpu",
    "/dev/nvhost-gpu",
    "/dev/nvhost-as-gpu",
    "/dev/dri/renderD128",
)
ORIN = CudaProbe(
    driver_version=12060,
    init_code=0,
    num_devices=1,
    name="Orin",
    compute_capability="8.7",
    integrated=True,
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
        self.plugin_answers = [Verdict("python", True, "built as w4_linear", 0.5)]
        self.plugin_failure: str | None = None
        self.onnxruntime_answers = {CPU: Library(version="1.32.0", providers=(CPU,))}
        self.group_answer = frozenset({"orin", "video", "render"})
        self.container = False
        self.memory: int | None = None
        self.why_unconfined: str | None = None
        self.now = 1000.0
        self.asked: list[str] = []

    def snapshot(self) -> Snapshot:
        found = super().snapshot()
        if self.memory is not None:
            found = msgspec.structs.replace(found, memory_room_bytes=self.memory)
        return found

    def architecture(self) -> str:
        return "aarch64"

    def unconfined(self) -> str | None:
        return self.why_unconfined

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

    def schemes(self, widths: tuple[int, int] = WIDE) -> tuple[list[Verdict], str | None]:
        self.asked += ["schemes"] if widths == WIDE else [f"schemes of {widths[0]} x {widths[1]}"]
        return self.scheme_answers, self.scheme_failure

    def own_plugins(self, widths: tuple[int, int] = WIDE) -> tuple[list[Verdict], str | None]:
        return self.plugin_answers, self.plugin_failure

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


def find(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


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


MISSING = Library(missing=True, error="ModuleNotFoundError: No module named 'pycuda'")
