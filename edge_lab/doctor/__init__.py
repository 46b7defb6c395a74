"""Runs the checks of ``edge-llm doctor``: what can keep a bundle from answering, causes first.

`run_checks` asks a `Machine` and judges; it changes nothing. The first failed check is usually the
reason for all that fail after it, so its exit code becomes the verb's:

====  =============================================================================================
0     nothing failed; warnings are allowed.
65    the bundle or an engine's file is damaged.
69    driver, GPU or a library is missing, too old or does not start; may change without an edit.
71    too little memory is free.
77    this user may not open the GPU's device nodes.
78    no engine of the bundle is for this TensorRT and this GPU.
====  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge.bundle.manifest import Manifest
from edge_lab.doctor.machine import CudaProbe, Machine

from .check import Check, MachineFacts
from .cuda_calls import check_cuda_calls, check_onnxruntime_packages
from .device import (
    check_device_nodes,
    check_driver,
    check_gpu,
    check_init,
    check_power,
    check_system,
)
from .schemes import check_schemes
from .software import (
    check_bundle,
    check_confinement,
    check_engines,
    check_memory,
    check_onnxruntime,
    check_tensorrt,
)

__all__ = ["Check", "exit_code", "run_checks", "summary", "wait_for_gpu"]

_POLL_S = 1.0
# Causes first. The checks of TensorRT and ONNX Runtime store facts that the bundle's checks need,
# and the check of its engines stores how much memory is needed.
_MACHINE = (
    check_system,
    check_device_nodes,
    check_driver,
    check_init,
    check_gpu,
    check_tensorrt,
    check_cuda_calls,
    check_onnxruntime,
    check_onnxruntime_packages,
    check_power,
    check_confinement,
)


def run_checks(
    machine: Machine | None = None,
    bundle: Path | None = None,
    wait_gpu_s: float | None = None,
    *,
    schemes: bool = True,
) -> list[Check]:
    """Check the machine, and what a bundle needs from it.

    Args:
        machine: the machine to ask; None is this one.
        bundle: a bundle whose files and engines are checked too.
        wait_gpu_s: seconds to wait for a GPU, whose absence is then a failure; None requires none.
        schemes: also build an engine of one layer per precision, which takes some seconds.
    """
    machine = machine or Machine()
    cuda = wait_for_gpu(machine, wait_gpu_s or 0.0)
    facts = MachineFacts(machine, machine.snapshot(), machine.nodes(), cuda, wait_gpu_s is not None)
    checks = [check(facts) for check in _MACHINE]
    of_bundle: list[Check] = []
    manifest: Manifest | None = None
    if bundle is not None:
        found, manifest = check_bundle(bundle, facts)
        of_bundle.append(found)
    if schemes:
        checks += check_schemes(facts, manifest)
    if bundle is not None and manifest is not None:
        of_bundle.append(check_engines(bundle, manifest, facts))
    return [*checks, *of_bundle, check_memory(facts, manifest)]


def wait_for_gpu(machine: Machine, seconds: float) -> CudaProbe:
    """Ask the driver until a GPU works or ``seconds`` have passed; return its last answer."""
    deadline = machine.clock() + seconds
    while True:
        probe = machine.cuda()
        left = deadline - machine.clock()
        if probe.works or left <= 0:
            return probe
        machine.sleep(min(_POLL_S, left))


def exit_code(checks: Sequence[Check]) -> int:
    """Return the exit code of the first failure; 0 if there is none."""
    return next((check.exit_code for check in checks if check.status == "fail"), 0)


def summary(checks: Sequence[Check]) -> str:
    """Sum up the checks in one sentence."""
    failed = [check for check in checks if check.status == "fail"]
    if failed:
        return f"{failed[0].name} is what to repair first: {failed[0].cause or failed[0].detail}"
    by_name = {check.name: check for check in checks}
    warned = sum(check.status == "warn" for check in checks)
    tail = f"; {warned} warnings" if warned > 1 else "; one warning" if warned else ""
    if by_name["cuInit"].status == "skip":
        return f"no NVIDIA GPU here; the CPU backend works and nothing is wrong{tail}"
    return f"the GPU works{tail}"
