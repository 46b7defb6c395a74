"""The machine that doctor asks: its files, and the probes of its libraries in child processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from edge.device.nodes import find_gpu_node
from edge_lab.doctor import exit_code, run_checks
from edge_lab.doctor import probe as device_probe
from edge_lab.doctor.machine import CudaProbe, Machine
from tests.edge.device import jetson_trees as trees
from tests.edge_lab.doctor.fake_machine import CPU, GPU, find
from tests.standins.cuda import FakeGpu


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
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18 ? 1 : -1;
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
        integrated=True,
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


def test_the_cause_is_the_librarys_own_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
