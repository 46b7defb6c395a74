"""Runs a program that a model wrote, with its tests, in the child process of `programs`.

The child is confined before it reads the program, so programs may import `_MODULES` and no others.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_MODULES = (
    "_strptime",  # datetime.strptime and time.strptime import it
    "abc",
    "array",
    "bisect",
    "calendar",
    "cmath",
    "collections.abc",
    "contextlib",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "json",
    "locale",
    "math",
    "numbers",
    "operator",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "textwrap",
    "time",
    "traceback",
    "types",
    "typing",
    "unicodedata",
)
_MAX_ERROR_CHARS = 300


def prepare() -> None:
    """Import the modules that programs may use."""
    for name in _MODULES:
        import_module(name)


def work(task: bytes) -> bytes:
    """Run ``{"program", "tests"}`` and return ``{"passed", "error"}``, both JSON.

    A second program in the same process would see what the first one left, so callers start a new
    child. Program and tests share a process, so a program that wants to pass can: this judges
    models, not adversaries. The kernel keeps an adversary from everything else.
    """
    asked: dict[str, str] = json.loads(task)
    sys.stdin = None  # the parent's messages are not the program's input
    return json.dumps(_run(asked["program"], asked["tests"])).encode()


def _run(program: str, tests: str) -> dict[str, Any]:
    module = sys.modules["program"] = ModuleType("program")  # dataclasses look there
    try:
        for source, name in ((program, "program"), (tests, "tests")):
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - also those that end an interpreter
        return {"passed": False, "error": _explain(error)}
    return {"passed": True, "error": ""}


def _explain(error: BaseException) -> str:
    line = getattr(error.__traceback__, "tb_next", None)
    at = "" if line is None else f" at line {line.tb_lineno} of {line.tb_frame.f_code.co_filename}"
    return f"{type(error).__name__}{at}: {error}"[:_MAX_ERROR_CHARS]
