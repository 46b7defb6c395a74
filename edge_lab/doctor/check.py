"""Defines the result of a check, its exit codes, and the facts that checks hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edge.bundle.engine_file import EngineInfo
from edge.device.nodes import GPU_NODES, JETSON_SIGNS
from edge_lab.doctor.machine import CudaProbe, Library, Machine, Node
from edge_lab.telemetry import Snapshot

Status = Literal["ok", "warn", "fail", "skip"]
DAMAGED, UNAVAILABLE, NO_MEMORY, NO_PERMISSION, WRONG_ENGINE = 65, 69, 71, 77, 78


@dataclass(frozen=True)
class Check:
    """One step of the diagnosis.

    Attributes:
        name: the thing that was checked.
        status: how it went; ``skip`` means that the check does not apply here.
        detail: the finding.
        cause, cure: why it warns or fails, and how to mend it; else empty.
        exit_code: exit code of the verb if this check fails first; 0 without a failure.
    """

    name: str
    status: Status
    detail: str
    cause: str = ""
    cure: str = ""
    exit_code: int = 0


@dataclass
class MachineFacts:
    """Facts that the machine told so far, and the bundle's engine that would run here."""

    machine: Machine
    snapshot: Snapshot
    nodes: dict[str, Node]
    cuda: CudaProbe
    gpu_required: bool
    tensorrt: Library = field(default_factory=Library)
    onnxruntime: Library = field(default_factory=Library)
    engine: EngineInfo | None = None

    @property
    def jetson(self) -> bool:
        """Whether this is a Jetson; its device tree alone does not tell, as makers name it freely.

        A container may have the device nodes but none of the files that say so.
        """
        nodes = any(name in JETSON_SIGNS for name in self.nodes)
        return nodes or self.snapshot.l4t is not None or "Jetson" in (self.snapshot.module or "")

    @property
    def gpu_expected(self) -> bool:
        """Whether anything here points to an NVIDIA GPU, or the caller says that there is one."""
        nodes = any(name in GPU_NODES for name in self.nodes)
        return self.gpu_required or self.jetson or nodes or self.cuda.library_error is None


def version_numbers(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    parts = [part for part in version.split(".") if part.isdigit()]
    major, minor = (*map(int, parts[:2]), 0, 0)[:2]
    return major, minor
