"""Runs the programs of ``tools/`` and ``lab/``, each in an environment with what it needs.

``scripts/_venv`` makes the environment from lock files and fills it once; a second run starts at
once. Standard library only, since it runs before there is an environment.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """A virtual environment at the root of the checkout.

    Attributes:
        directory: its name.
        locks: files under ``requirements/``, without their ending.
        groups: dependency groups of ``pyproject.toml`` that are too large for a lock file.
        has_edge_llm: whether the checkout itself is installed.
        needs_uv: whether the program calls uv.
        variables: environment variables; a path in them may begin with ``$PWD``, the checkout.
    """

    directory: str
    locks: tuple[str, ...]
    groups: tuple[str, ...] = ()
    has_edge_llm: bool = True
    needs_uv: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    def script(self, module: str) -> str:
        """Return the bash that makes the environment and becomes ``python -m MODULE "$@"``."""
        make = "make_venv" if self.has_edge_llm else "install_locks"
        lines = [". scripts/_venv", f"{make} {self.directory} {' '.join(self.locks)}"]
        lines += [f"install_group {self.directory} {group}" for group in self.groups]
        lines += [f"make_uv {self.directory}"] if self.needs_uv else []
        lines += [f'export {name}="{value}"' for name, value in self.variables.items()]
        return "\n".join([*lines, f'exec {self.directory}/bin/python -m {module} "$@"'])


LAPTOP = Environment(".venv", ("laptop", "smollm2"))
DEV = Environment(".venv", ("dev", "smollm2"))
TORCH = Environment(".venv-finetune", ("laptop", "smollm2"), ("parity",))


@dataclass(frozen=True)
class Program:
    """A module that is run by a name.

    Attributes:
        module: dotted name.
        about: what it does, in a line.
        environment: where it runs.
    """

    module: str
    about: str
    environment: Environment = LAPTOP


def main(command: str, programs: Mapping[str, Program], arguments: Sequence[str]) -> int:
    """List the programs, or become one of them, which gets the other arguments as they are."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {command} NAME [ARGUMENTS]      NAME --help has its arguments\n")
        width = max(map(len, programs))
        print("\n".join(f"  {name:{width}}  {each.about}" for name, each in programs.items()))
        return 0
    name, *rest = arguments
    if name not in programs:
        print(f"error: there is no {shlex.quote(name)}; {command} lists the names", file=sys.stderr)
        return 64
    program = programs[name]
    os.chdir(ROOT)
    bash = ["bash", "-c", program.environment.script(program.module), name, *rest]
    return os.execvp("bash", bash)
