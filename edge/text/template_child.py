"""Runs untrusted chat templates in a child with limits, one for all templates of the process."""

from __future__ import annotations

import msgspec

from edge.limited_child import ChildError, LimitedChild, LimitError, Limits

from .template_engine import Task, TaskResult, TemplateFailure

TEMPLATE_LIMITS = Limits(cpu_s=2.0, memory_bytes=512 << 20)
"""Limits one rendering of an unknown template; a body of 4 MB takes 0.1 s and 80 MB."""
_child = LimitedChild("edge.text.template_engine:work", TEMPLATE_LIMITS)


def ask(task: Task) -> TaskResult:
    """Let the child compile and try a template, or render it.

    Raises:
        TemplateFailure: `TemplateEngine` failed, or a limit of the child was reached (``limit``).
        ResourceError: no process could be started for it, or it got hardly any time.
    """
    try:
        data = msgspec.json.encode(task)
    except UnicodeEncodeError as error:  # JSON escapes can hold half a character
        raise TemplateFailure("failed", "the template or a token has a lone surrogate") from error
    try:
        data = _child.ask(data)
    except LimitError:
        raise TemplateFailure("limit", f"it takes more than {TEMPLATE_LIMITS}") from None
    except ChildError as error:
        raise TemplateFailure("failed", f"its process failed ({error})") from error
    answer = msgspec.json.decode(data, type=TaskResult)
    if answer.kind is not None:
        raise TemplateFailure(answer.kind, answer.why)
    return answer
