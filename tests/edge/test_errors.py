from __future__ import annotations

import copy
import os
import pickle
import re

import pytest

from edge import errors
from edge.errors import ContextLengthError, EdgeError


def all_errors(base: type[EdgeError] = EdgeError) -> list[type[EdgeError]]:
    return [base, *(found for child in base.__subclasses__() for found in all_errors(child))]


def documented() -> dict[str, tuple[str | None, int]]:
    """Parent and exit code of every class in the docstring's tree; a child inherits the code."""
    tree: dict[str, tuple[str | None, int]] = {}
    ancestors: list[tuple[int, str]] = []
    line = re.compile(r"^( +)(\w+Error) .*?(?: (\d\d))?$", re.MULTILINE)
    for indent, name, code in line.findall(errors.__doc__ or ""):
        while ancestors and ancestors[-1][0] >= len(indent):
            ancestors.pop()
        parent = ancestors[-1][1] if ancestors else None
        tree[name] = parent, int(code) if code else tree[parent or ""][1]
        ancestors.append((len(indent), name))
    return tree


def test_the_docstring_tells_the_whole_tree_and_its_exit_codes() -> None:
    real = {
        kind.__name__: (None if kind is EdgeError else kind.__mro__[1].__name__, kind.exit_code)
        for kind in all_errors()
        if kind.__module__ == errors.__name__
    }
    assert documented() == real


@pytest.mark.parametrize("kind", all_errors())
def test_exit_codes_are_those_of_sysexits(kind: type[EdgeError]) -> None:
    known = {
        os.EX_USAGE,
        os.EX_DATAERR,
        os.EX_UNAVAILABLE,
        os.EX_SOFTWARE,
        os.EX_OSERR,
        os.EX_TEMPFAIL,
    }
    assert kind.exit_code in known


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.RequestError, ValueError),
        (errors.DependencyError, ImportError),
    ],
)
def test_callers_can_catch_the_builtin(kind: type[EdgeError], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


def test_context_length_error_names_both_numbers_and_survives_a_process_border() -> None:
    error = ContextLengthError(5000, 4096)
    for twin in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (twin.num_tokens, twin.capacity) == (5000, 4096)
        assert "5000 tokens" in str(twin)
        assert "4096" in str(twin)
