"""What ``import edge`` costs, and what it says when a library is missing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

import edge

ROOT = Path(edge.__file__).parent.parent
HEAVY = ("onnxruntime", "onnx", "tensorrt", "numpy", "tokenizers", "minijinja", "msgspec", "rich")
# Measured 10 ms; a busy runner may take many times that, numpy alone takes 60.
MAX_IMPORT_S = 0.15


def bare(code: str, cwd: Path) -> str:
    """Output of an isolated interpreter that finds `edge` and what is installed, no more."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    done = subprocess.run(
        [sys.executable, "-I", "-c", prelude + code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path):
    code = f"import edge; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert bare(code, tmp_path) == "[]"


def test_importing_the_runtime_loads_no_engine(tmp_path: Path):
    """Numpy is there from here on; the engine, tokenizer and template come with a bundle."""
    code = (
        "from edge import *; import edge.backends.ort, edge.cli; "
        "late = 'onnxruntime', 'onnx', 'tensorrt', 'tokenizers', 'minijinja', 'rich', 'torch'; "
        "print([m for m in late if m in sys.modules], 'numpy' in sys.modules)"
    )
    assert bare(code, tmp_path) == "[] True"


def test_importing_the_package_is_quick(tmp_path: Path):
    code = "import time; t = time.perf_counter(); import edge; print(time.perf_counter() - t)"
    assert median(float(bare(code, tmp_path)) for _ in range(5)) < MAX_IMPORT_S


def test_the_whole_start_is_quick(tmp_path: Path):
    """From outside, against an interpreter that imports nothing."""

    def wall(code: str) -> float:
        started = time.perf_counter()
        bare(code, tmp_path)
        return time.perf_counter() - started

    pairs = [(wall("pass"), wall("import edge")) for _ in range(5)]
    assert median(more - less for less, more in pairs) < MAX_IMPORT_S


def test_every_public_name_resolves():
    for name in edge.__all__:
        assert getattr(edge, name) is not None, name
    assert sorted(dir(edge)) == sorted(edge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Tensor'"):
        _ = edge.Tensor


@pytest.mark.parametrize(
    ("package", "code", "remedy"),
    [
        (
            "onnxruntime",
            "from edge.backends.ort import _open_session; _open_session(None, None, None, None)",
            "pip install 'jetson-edge-llm[cpu]'",
        ),
        (
            "tokenizers",
            "from edge.tokenizer import Tokenizer; "
            """Tokenizer(b'{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', None)""",
            "pip install 'tokenizers",
        ),
        (
            "minijinja",
            "from edge.chat import ChatTemplate; ChatTemplate('', None)",
            "pip install 'minijinja",
        ),
    ],
)
def test_a_missing_library_is_named_with_its_remedy(
    package: str, code: str, remedy: str, tmp_path: Path
):
    lines = [
        f"sys.modules[{package!r}] = None",
        "from edge.errors import DependencyError",
        "try:",
        f"    {code}",
        "except DependencyError as error:",
        "    print(error)",
    ]
    message = bare(f"exec({chr(10).join(lines)!r})", tmp_path)
    assert package in message
    assert remedy in message
