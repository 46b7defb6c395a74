"""Matches regular expressions from a checkpoint, in a child process that can be killed.

Python's ``re`` holds the interpreter while it searches, and ``(a+)+`` makes it search for ever.
"""

from __future__ import annotations

import re

import msgspec

from edge.errors import CheckpointError
from edge.limited_child import ChildError, LimitedChild, LimitError, Limits

_LIMITS = Limits(cpu_s=1.0, memory_bytes=256 << 20)
_child = LimitedChild("export.sources.untrusted_pattern:work", _LIMITS)


class _Task(msgspec.Struct):
    pattern: str
    text: str


class _Match(msgspec.Struct):
    """The groups of a match, the whole one first; None if there is none."""

    groups: list[str | None] | None = None
    error: str = ""


def match(pattern: str, text: str) -> list[str | None] | None:
    """Match a pattern at the beginning of a text, as `re.match` does.

    Returns:
        The whole match and its groups; None if it does not match.

    Raises:
        CheckpointError: the pattern is invalid, or takes more than a second.
        ResourceError: no process could be started, or it got hardly any time.
    """
    try:
        data = _child.ask(msgspec.json.encode(_Task(pattern, text)))
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the pattern {pattern!r:.200} is no Unicode") from error
    except LimitError:
        raise CheckpointError(
            f"the pattern {pattern!r:.200} takes more than {_LIMITS} to match {text!r:.80}; "
            "write it without a repetition inside a repetition, or name the modules"
        ) from None
    except ChildError as error:
        raise CheckpointError(f"the pattern {pattern!r:.200} cannot be matched: {error}") from error
    answer = msgspec.json.decode(data, type=_Match)
    if answer.error:
        raise CheckpointError(f"{pattern!r:.200} is no pattern: {answer.error}")
    return answer.groups


def work(data: bytes) -> bytes:
    """Match in the child; from and to JSON."""
    task = msgspec.json.decode(data, type=_Task)
    try:
        found = re.match(task.pattern, task.text)
    except (re.error, OverflowError, RecursionError) as error:
        return msgspec.json.encode(_Match(error=str(error) or type(error).__name__))
    groups = None if found is None else [found[0], *found.groups()]
    return msgspec.json.encode(_Match(groups))
