"""Which engine runs a bundle, and that no GPU idles in silence."""

from __future__ import annotations

import logging
import shutil
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge import LLM, cli
from edge.backends import choose
from edge.bundle.manifest import read_manifest
from edge.device.nodes import find_gpu_node
from edge.engine_config import EngineConfig
from edge.errors import BundleError, ConfigError, DependencyError, EdgeError
from tests.conftest import Bundles, require_even_rows
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import emptied, install, write_engine

NODE = "/dev/nvmap"


@pytest.fixture
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2", "portable")


@pytest.fixture
def engine_bundle(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "b")
    write_engine(
        tmp_path / "b", max_batch=4, max_prefill=24, kv_capacity=128, kv_buckets=(16, 64, 128)
    )
    return tmp_path / "b"


@pytest.fixture(params=[None, NODE], ids=["no GPU", "a GPU"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    found: str | None = request.param
    set_node(monkeypatch, found)
    return found


def set_node(monkeypatch: pytest.MonkeyPatch, node: str | None) -> None:
    monkeypatch.setattr("edge.device.nodes.find_gpu_node", lambda: node)
    monkeypatch.setattr("edge.backends.missing_requirements.find_gpu_node", lambda: node)
    monkeypatch.setattr(choose, "_has_cuda_provider", lambda: False)


@pytest.mark.parametrize(
    "error",
    [
        DependencyError("running on the GPU needs PyCUDA or cuda-bindings; pip install pycuda"),
        BundleError("the engine was built for another GPU; edge-llm build b"),
    ],
)
def test_an_engine_that_a_gpu_cannot_use_is_an_error(
    error: EdgeError,
    engine_bundle: Path,
    node: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """With the reason and its cure, and how to ask for the CPU; without a GPU the CPU runs it."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setitem(choose._ON_GPU, "tensorrt", refuse)
    if node is None:
        with caplog.at_level(logging.WARNING), closing(LLM(engine_bundle)) as llm:
            assert (llm.backend.name, llm.warning) == ("ort-cpu", None)
        assert str(error) in caplog.text
        return
    with pytest.raises(type(error)) as caught:
        LLM(engine_bundle)
    message = str(caught.value)
    assert str(error) in message
    assert NODE in message
    assert "--backend ort-cpu" in message
    with closing(LLM(engine_bundle, backend="ort-cpu")) as llm:
        assert (llm.backend.name, llm.warning) == ("ort-cpu", None)


def test_the_thing_that_is_missing_is_named(engine_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is replaced but the question whether there is a GPU."""
    set_node(monkeypatch, NODE)
    for name in ("pycuda", "pycuda.driver", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match=r"needs PyCUDA or cuda-b.*pip install.*ort-cpu"):
        LLM(engine_bundle)


def test_without_an_engine_a_gpu_that_idles_is_said(
    bundle: Path, node: str | None, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING), closing(LLM(bundle)) as llm:
        assert llm.backend.name == "ort-cpu"
        warning = llm.warning
    assert (warning is None) == (node is None)
    if warning is None:
        assert "GPU" not in caplog.text
    else:
        assert f"has a GPU ({NODE})" in warning
        assert "edge-llm build BUNDLE" in warning
        assert caplog.messages.count(warning) == 1


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"num_slots": 4}, 4), ({"num_slots": 1}, None), ({"num_slots": 4, "max_batch": 1}, None)],
)
def test_slots_that_take_turns_in_an_engine_are_said(
    options: dict[str, Any],
    wanted: int | None,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    shutil.copytree(bundle, tmp_path / "b")
    write_engine(tmp_path / "b", max_batch=1, max_prefill=24, kv_capacity=128, kv_buckets=(128,))
    device = FakeGpu()
    install(monkeypatch, device)
    with (
        emptied(device),
        caplog.at_level(logging.WARNING),
        closing(LLM(tmp_path / "b", EngineConfig(backend="tensorrt", **options))) as llm,
    ):
        warning = llm.warning
    if wanted is None:
        assert warning is None
    else:
        assert warning is not None
        assert f"edge-llm build BUNDLE --max-batch {wanted}" in warning
        assert caplog.messages.count(warning) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_threads", 1),
        ("int8_activations", True),
        ("prefill", "int8"),
        ("deterministic", True),
    ],
)
def test_an_option_of_the_cpu_asks_for_it_even_where_an_engine_is(
    option: str,
    value: Any,
    tiny_bundles: Bundles,
    node: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    if option == "deterministic":
        require_even_rows()
    bundle = tiny_bundles("qwen2", quant="int4")
    monkeypatch.setattr(choose, "find_engines", lambda path: [path / "engines" / "sm87"])
    monkeypatch.setattr(choose, "_has_cuda_provider", lambda: True)
    config = EngineConfig(num_slots=1, **{option: value})
    with (
        caplog.at_level(logging.WARNING),
        closing(choose.open_backend(bundle, read_manifest(bundle), config)) as backend,
    ):
        assert backend.name == "ort-cpu"
    assert (f"{option} asks for it" in caplog.text) == (node is not None)
    assert choose.unused_gpu("ort-cuda", config) is None


def test_a_wait_for_the_gpu_asks_for_tensorrt(
    bundle: Path,
    engine_bundle: Path,
    node: str | None,
    monkeypatch: pytest.MonkeyPatch,
):
    """A machine without CUDA, or a bundle without an engine, is an error and no silence."""
    config = EngineConfig(gpu_wait="block")
    with pytest.raises(ConfigError, match=r"gpu_wait is for TensorRT.*no engine: edge-llm build"):
        choose.open_backend(bundle, read_manifest(bundle), config)
    without_bindings(monkeypatch)
    monkeypatch.setattr("edge.backends.missing_requirements.load_driver", lambda: None)
    monkeypatch.setattr("edge.backends.missing_requirements.find_gpu", lambda: None)
    said = "gpu_wait needs an NVIDIA GPU" if node is None else "PyCUDA or cuda-bindings"
    with pytest.raises(DependencyError, match=said):
        choose.open_backend(engine_bundle, read_manifest(engine_bundle), config)

    def opened(*_: object, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(name="tensorrt", options=options)

    monkeypatch.setattr("edge.backends.tensorrt.runner.TensorRTBackend", opened)
    backend: Any = choose.open_backend(engine_bundle, read_manifest(engine_bundle), config)
    assert backend.options["gpu_wait"] == "block"


def without_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycuda", "pycuda.driver", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("has", "said", "never"),
    [
        ("", "--backend tensorrt needs an NVIDIA GPU, and this machine shows none", "install"),
        ("gpu", "libcuda.so.1 does not load or is too old; install the driver", "PyCUDA"),
        ("gpu driver", "has no TensorRT engine; build one on this machine with", "PyCUDA"),
        ("gpu driver engine", "needs PyCUDA or cuda-bindings", "build"),
    ],
)
def test_the_first_missing_thing_is_named(
    has: str,
    said: str,
    never: str,
    bundle: Path,
    engine_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The bindings are missing each time, and whoever installs them must not meet the next wall."""

    def load_driver() -> None:
        if "driver" not in has:
            raise OSError("libcuda.so.1: cannot open shared object file")

    set_node(monkeypatch, NODE if "gpu" in has else None)
    gpu = SimpleNamespace() if "driver" in has else None
    monkeypatch.setattr("edge.backends.missing_requirements.find_gpu", lambda: gpu)
    monkeypatch.setattr("edge.backends.missing_requirements.load_driver", load_driver)
    without_bindings(monkeypatch)
    chosen = engine_bundle if "engine" in has else bundle
    with pytest.raises((DependencyError, BundleError), match=said) as caught:
        LLM(chosen, backend="tensorrt")
    assert never not in str(caught.value)
    assert caught.value.__cause__ is not caught.value
    assert "needs PyCUDA or cuda-bindings" in f"{caught.value} {caught.value.__cause__}"


def test_onnx_runtime_without_a_gpu_is_told_so(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    set_node(monkeypatch, None)
    monkeypatch.setattr("edge.backends.missing_requirements.find_gpu", lambda: None)
    with pytest.raises(DependencyError, match="--backend ort-cuda needs an NVIDIA GPU"):
        LLM(bundle, backend="ort-cuda")


def test_the_node_that_decides(tmp_path: Path):
    (tmp_path / "dev" / "dri").mkdir(parents=True)
    for name in ("dri/renderD128", "host1x-fence", "null"):
        (tmp_path / "dev" / name).touch()
    assert find_gpu_node(tmp_path) is None
    for name in ("nvidia0", "nvidiactl", "nvhost-gpu", "nvmap"):
        (tmp_path / "dev" / name).touch()
        assert find_gpu_node(tmp_path) is not None
    assert find_gpu_node(tmp_path) == NODE


def test_wsl_shows_a_gpu_by_the_library_of_windows(tmp_path: Path):
    library = tmp_path / "usr/lib/wsl/lib/libcuda.so.1"
    for path in (tmp_path / "dev/dxg", library.with_name("libdxcore.so")):
        path.parent.mkdir(parents=True)
        path.touch()
    assert find_gpu_node(tmp_path) is None
    library.touch()
    assert find_gpu_node(tmp_path) == "/dev/dxg"


@pytest.mark.live
@pytest.mark.parametrize(
    "verb",
    [
        ["run", "hello"],
        ["chat"],
        ["bench", "--prompt-tokens", "8", "--output-tokens", "8"],
        ["verify"],
        ["serve", "--port", "0"],
    ],
    ids=lambda verb: str(verb[0]),
)
def test_every_verb_ends_with_the_reason_and_the_cure(
    verb: list[str],
    engine_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    set_node(monkeypatch, NODE)
    for name in ("pycuda", "pycuda.driver", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    name, *options = verb
    monkeypatch.setattr(sys, "argv", ["edge-llm", name, str(engine_bundle), *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == DependencyError.exit_code
    said = capsys.readouterr().err
    assert "error: running on the GPU needs PyCUDA or cuda-bindings" in said
    assert "pip install" in said
    assert "--backend ort-cpu" in said
