"""Checks which package calls CUDA, and that only one package is ``onnxruntime``."""

from __future__ import annotations

from edge_lab.doctor.machine import Library

from .check import UNAVAILABLE, Check, MachineFacts, version_numbers


def check_cuda_calls(facts: MachineFacts) -> Check:
    """Check whether PyCUDA or cuda-bindings calls CUDA, and whether there are CUDA graphs."""
    name = "CUDA in Python"
    if not facts.cuda.works:
        return Check(name, "skip", "no GPU that works")
    pycuda, bindings = facts.machine.pycuda(), facts.machine.cuda_bindings()
    install = _install_bindings(facts)
    if bindings.error is not None:
        if pycuda.error is None:
            return Check(
                name,
                "warn",
                f"PyCUDA {pycuda.version} is used",
                f"decode runs without CUDA graphs, since {_problem('cuda-bindings', bindings)}",
                install,
            )
        return Check(
            name,
            "fail" if facts.tensorrt.version else "warn",
            "neither PyCUDA nor cuda-bindings works, so no engine can run",
            f"{_problem('PyCUDA', pycuda)}; {_problem('cuda-bindings', bindings)}",
            f"scripts/install-pycuda, which compiles it, or without a compiler: {install}",
            UNAVAILABLE if facts.tensorrt.version else 0,
        )
    built_for = version_numbers(bindings.version or "")[0]
    driver = _driver_major(facts)
    if built_for > driver:
        return Check(
            name,
            "warn",
            f"cuda-bindings {bindings.version}",
            f"they are for CUDA {built_for}, the driver is for CUDA {driver} and may lack calls",
            install,
        )
    if pycuda.error is None:
        used = f"PyCUDA {pycuda.version} is used, cuda-bindings {bindings.version} for CUDA graphs"
        return Check(name, "ok", used)
    used = f"cuda-bindings {bindings.version} are used"
    if pycuda.missing:
        return Check(name, "ok", f"{used}; PyCUDA is not installed, which is no fault")
    return Check(
        name,
        "warn",
        used,
        _problem("PyCUDA", pycuda),
        "pip uninstall pycuda, or compile it again with scripts/install-pycuda",
    )


def check_onnxruntime_packages(facts: MachineFacts) -> Check:
    """Check that one ONNX Runtime is installed: every one of its packages is ``onnxruntime``."""
    name, found = "ONNX Runtime packages", facts.machine.onnxruntime_packages()
    detail = ", ".join(f"{package} {version}" for package, version, _ in found) or "none"
    if len(found) < 2:
        return Check(name, "ok", detail)
    places = {place for _, _, place in found}
    if len(places) == 1:
        cause = f"all of them are in {places.pop()}, where each has overwritten files of the other"
    else:
        first, _, place = found[0]
        cause = f"{first} in {place} hides the other"
    return Check(
        name,
        "warn",
        detail,
        cause,
        "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you want: "
        "onnxruntime-gpu for a GPU, it has the CPU too",
    )


def _driver_major(facts: MachineFacts) -> int:
    return (facts.cuda.driver_version or 0) // 1000


def _install_bindings(facts: MachineFacts) -> str:
    major = max(_driver_major(facts), 12)
    floor = "12.9.1" if major == 12 else str(major)
    return f"pip install 'cuda-bindings>={floor},<{major + 1}'"


def _problem(name: str, library: Library) -> str:
    return f"{name} is not installed" if library.missing else f"{name} fails: {library.error}"
