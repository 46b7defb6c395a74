"""Searches samples for a caller's regular expression, in a process with limits.

Python's expressions can take exponential time, and block the interpreter while they run.
"""

from __future__ import annotations

import json
import re

from edge.errors import RequestError, ResourceError
from edge.limited_child import ChildError, LimitedChild, LimitError, Limits

from .answers import AnswerFinder

PATTERN_LIMITS = Limits(cpu_s=1.0, memory_bytes=256 << 20)
_child = LimitedChild("edge.votes.pattern_child:work", PATTERN_LIMITS)


def pattern_finder(pattern: str) -> AnswerFinder:
    """Return a function that finds a pattern's last match, or its first group.

    Raises:
        RequestError: the pattern is wrong, or takes longer than it may.
        ResourceError: no process could be started.
    """
    _ask(pattern, "")
    return lambda text: _ask(pattern, text)


def work(task: bytes) -> bytes:
    """Find a match; runs in the child."""
    pattern, text = json.loads(task)
    try:
        *_, last = [None, *re.finditer(pattern, text)]
    except (re.error, OverflowError, RecursionError) as error:
        return json.dumps({"error": str(error)}).encode()
    found = None if last is None else last.group(1 if last.re.groups else 0)
    return json.dumps({"found": found}).encode()


def _ask(pattern: str, text: str) -> str | None:
    try:
        answer = json.loads(_child.ask(json.dumps([pattern, text]).encode()))
    except LimitError:
        raise RequestError(
            f"vote: the pattern {pattern!r:.80} takes more than {PATTERN_LIMITS}; avoid repeats "
            "inside of repeats"
        ) from None
    except ChildError as error:
        raise ResourceError(f"vote: the search for a pattern failed: {error}") from error
    if "error" in answer:
        raise RequestError(f"vote: the pattern {pattern!r:.80} is wrong: {answer['error']}")
    found: str | None = answer["found"]
    return found.strip() or None if found else None
