"""Uses the driver, TensorRT and ONNX Runtime for real, each in a child process.

``python -m edge_lab.doctor.probe NAME`` prints one JSON line; NAME is cuda, tensorrt, pycuda,
cuda-bindings, or onnxruntime with a PROVIDER after it. For ``schemes`` it prints a line per scheme.
Each needs its own process: a broken driver may crash or hang, libraries print what they like, and a
``cuInit`` that failed once fails forever in its process.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from typing import Any

import msgspec

from edge.device.gpu import load_driver, read_gpu
from edge.device.tensorrt_version import loaded_version

from .scheme_probe import probe_schemes

_INTEGRATED = 18  # cuda.h: CU_DEVICE_ATTRIBUTE_INTEGRATED


def probe_cuda() -> dict[str, Any]:
    """Load ``libcuda.so.1``, initialize it, and make a context on the first GPU.

    Returns:
        ``library_error``, ``driver_version`` (12060 is CUDA 12.6), ``init_code``, ``num_devices``,
        ``name``, ``compute_capability``, ``integrated`` (it shares the host's memory),
        ``context_code``, ``memory_free_bytes`` and ``memory_total_bytes``, up to the first failure.
        Codes are those of ``CUresult``.
    """
    try:
        cuda = load_driver()
    except OSError as error:
        return {"library_error": str(error)}
    found: dict[str, Any] = {}
    number = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
        found["driver_version"] = number.value
    found["init_code"] = cuda.cuInit(0)
    if found["init_code"] != 0:
        return found
    device = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(number)) == 0:
        found["num_devices"] = number.value
    if not found.get("num_devices") or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return found
    gpu = read_gpu(cuda, device)
    if gpu is None:
        return found
    found["name"], found["compute_capability"] = gpu.name, gpu.compute_capability
    if cuda.cuDeviceGetAttribute(ctypes.byref(number), _INTEGRATED, device) == 0:
        found["integrated"] = bool(number.value)
    context = ctypes.c_void_p()
    found["context_code"] = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if found["context_code"] == 0:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        cuda.cuCtxSetCurrent(context)
        if cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0:
            found["memory_free_bytes"], found["memory_total_bytes"] = free.value, total.value
    return found


def probe_tensorrt() -> dict[str, Any]:
    """Import TensorRT and build a one-layer engine, which initializes it on the GPU.

    Returns:
        ``version``, and ``error`` if the engine could not be built; TensorRT prints the reason.
    """
    trt = importlib.import_module("tensorrt")
    found: dict[str, Any] = {"version": loaded_version(trt)}
    logger = trt.Logger(trt.Logger.WARNING)  # a CUDA that does not start is a warning
    try:
        builder = trt.Builder(logger)
    except TypeError:  # pybind11 raises it where TensorRT makes no object
        return {**found, "error": "TensorRT does not start"}
    network = builder.create_network(0)
    values = network.add_input("values", trt.float32, (8,))
    twice = network.add_elementwise(values, values, trt.ElementWiseOperation.SUM)
    network.mark_output(twice.get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = None if plan is None else trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None or engine.create_execution_context() is None:
        found["error"] = "TensorRT could not build, load and prepare an engine of one layer"
    return found


def probe_pycuda() -> dict[str, Any]:
    """Import PyCUDA and start the driver through it.

    Returns:
        ``version``.
    """
    importlib.import_module("pycuda.driver").init()
    return {"version": importlib.import_module("pycuda").VERSION_TEXT}


def probe_cuda_bindings() -> dict[str, Any]:
    """Import cuda-bindings and start the driver through them.

    Returns:
        ``version``, and ``error`` if the driver does not start.
    """
    driver = importlib.import_module("cuda.bindings.driver")
    found = {"version": importlib.import_module("cuda.bindings").__version__}
    code = driver.cuInit(0)[0]
    if code != driver.CUresult.CUDA_SUCCESS:
        found["error"] = f"cuInit answers {code}"
    return found


def probe_onnxruntime(provider: str) -> dict[str, Any]:
    """Import ONNX Runtime and run a small graph on a provider.

    Returns:
        ``version``, ``providers`` that it was built with, and ``error`` if the graph did not run
        on the one asked for.
    """
    import numpy as np

    from edge.bundle.onnx_file import ELEMENT_NUMBERS, Node, small_model, tensor_info

    ort = importlib.import_module("onnxruntime")
    found: dict[str, Any] = {
        "version": ort.__version__,
        "providers": ort.get_available_providers(),
    }
    if provider not in found["providers"]:
        return found
    if provider.startswith("CUDA") and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    shape, fp32 = (16, 16), ELEMENT_NUMBERS["fp32"]
    model = small_model(
        [Node("MatMul", ["x", "x"], ["y"])],
        [tensor_info("x", fp32, shape)],
        [tensor_info("y", fp32, shape)],
    )
    session = ort.InferenceSession(model, providers=list({provider: 1, "CPUExecutionProvider": 1}))
    if session.get_providers()[0] != provider:
        found["error"] = f"{provider} did not load; a library that it needs is missing or too old"
        return found
    x = np.arange(256, dtype=np.float32).reshape(shape) % 7
    if not np.array_equal(session.run(None, {"x": x})[0], x @ x):
        found["error"] = f"{provider} computed a wrong product of two small matrices"
    return found


def main(arguments: list[str]) -> None:
    """Run one probe; the last line of standard output is its JSON."""
    probes = {
        "cuda": probe_cuda,
        "tensorrt": probe_tensorrt,
        "pycuda": probe_pycuda,
        "cuda-bindings": probe_cuda_bindings,
        "onnxruntime": probe_onnxruntime,
    }
    # Libraries print to standard output; only the last line is ours.
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        if arguments[0] == "schemes":
            # Print line by line, so that a crash shows at which scheme it came.
            widths = int(arguments[1]), int(arguments[2])
            for verdict in probe_schemes(*arguments[3:], widths=widths):
                os.write(output, msgspec.json.encode(verdict) + b"\n")
            return
        line = json.dumps(probes[arguments[0]](*arguments[1:]))  # type: ignore[operator]
        os.write(output, f"{line}\n".encode())
    finally:
        sys.stdout.flush()  # before the traceback, whose last line is the reason


if __name__ == "__main__":
    main(sys.argv[1:])
