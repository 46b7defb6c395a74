"""What ``import edge`` costs, and what it says when a library is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import edge

ROOT = Path(edge.__file__).parent.parent
HEAVY = ("onnxruntime", "onnx", "tensorrt", "numpy", "tokenizers", "minijinja", "msgspec", "rich")
# Measured 10 ms at most; a slow runner takes many times that, numpy alone takes 110.
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
        "from edge import *; import edge.backends.ort.cpu, edge.backends.tensorrt.runner; "
        "import edge.cli; "
        "late = 'onnxruntime', 'onnx', 'tensorrt', 'pycuda', 'tokenizers', 'minijinja', 'rich', "
        "'torch'; "
        "print([m for m in late if m in sys.modules], 'numpy' in sys.modules)"
    )
    assert bare(code, tmp_path) == "[] True"


def test_importing_the_package_is_quick(tmp_path: Path):
    """Against a bare interpreter, in processor time: load moves it less than the wall clock."""

    def seconds(code: str) -> float:
        before = os.times()
        bare(code, tmp_path)
        after = os.times()
        children = (after.children_user, after.children_system)
        return sum(children) - before.children_user - before.children_system

    pairs = [(seconds("pass"), seconds("import edge")) for _ in range(7)]
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
            "from edge.backends.ort.session import import_onnxruntime as load; "
            "load(None, 'the CPU backend needs onnxruntime', 'cpu')",
            "[cpu]'",
        ),
        (
            "tokenizers",
            "from edge.text.tokenizer import Tokenizer; "
            """Tokenizer(b'{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', None)""",
            "pip install 'tokenizers",
        ),
        (
            "minijinja",
            "from edge.text.chat_template import ChatTemplate; ChatTemplate('', None)",
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
