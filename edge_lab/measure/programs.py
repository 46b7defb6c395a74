"""Programs as a task: a model completes a Python function, and tests judge it.

A model's program runs in a child of its own with limits on time and memory, which the kernel keeps
from files, network and other processes (`edge.confine`). Python that a model wrote must never
run any other way.
"""

from __future__ import annotations

import json
import re
import textwrap

import msgspec

from edge.limited_child import ChildError, LimitedChild, LimitError, Limits

_LIMITS = Limits(
    cpu_s=5, memory_bytes=512 << 20, answer_bytes=1 << 16, nice=5, tasks=2, confined=True
)
# Text may precede it, and anything may follow on its line; "```x```" within a line is none.
_FENCE = re.compile(
    r"^(?:(?:[^`\n]|`[^`\n]+`)*(`{3,})|[ \t]*(~{3,})(?!~))[^`\n]*\n"
    r"(?P<code>.*?)\n?(?:^[ \t]*(?:\1|\2)|\Z)",
    re.DOTALL | re.MULTILINE,
)
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_NAME = re.compile(r"^def (\w+)\(", re.MULTILINE)
# A line that begins at the margin and is not part of the function.
_AFTER = re.compile(r"\n(?=[^\s)\]}])")
_REQUEST = (
    "Complete this Python function. Answer with the whole function in one code block, without "
    "examples of its use.\n\n```python\n{head}\n```"
)


class ProgramItem(msgspec.Struct, frozen=True):
    """The head of a function, whose last ``def`` is to be completed, and its tests.

    Attributes:
        question: imports, signature and docstring.
        tests: statements that raise an exception if the function is wrong.
    """

    question: str
    tests: str

    @property
    def expected(self) -> str:
        """Describe a right program, as reports show it."""
        return "passes"


def function_name(item: ProgramItem) -> str | None:
    """Return the name of the function to write; None if no ``def`` stands at the margin."""
    names = _NAME.findall(item.question)
    return names[-1] if names else None


def chat_request(item: ProgramItem) -> str:
    """Return the request to a chat model."""
    return _REQUEST.format(head=item.question.rstrip())


def program_of_answer(item: ProgramItem, answer: str) -> str | None:
    """Find the program in a chat model's answer: the last code block that defines the function.

    A block with the function's body alone is put under its head. None means that there is no code.
    """
    name = function_name(item)
    answer = answer.replace("\r\n", "\n")
    blocks = [fenced["code"] for fenced in _FENCE.finditer(answer)] or [answer]
    dedented = map(textwrap.dedent, blocks)  # code in a list is indented
    whole = [block for block in dedented if re.search(rf"^def {name}\(", block, re.MULTILINE)]
    if whole:
        # Add imports and helpers of the head, since the answer may leave them out.
        program = f"{_before(item)}\n{whole[-1]}"
        return "".join(_FUTURE.findall(program)) + _FUTURE.sub("", program)
    bodies = [block for block in blocks if block.startswith((" ", "\t")) and block.strip()]
    return f"{item.question.rstrip()}\n{bodies[-1]}" if bodies else None


def program_of_continuation(item: ProgramItem, text: str) -> str:
    """Join the head and the text with which a plain model went on, up to the function's end."""
    return f"{item.question.rstrip()}\n{_AFTER.split(text.lstrip(chr(10)), maxsplit=1)[0]}"


def _before(item: ProgramItem) -> str:
    """Return the text above the function to write."""
    return item.question[: item.question.rfind(f"def {function_name(item)}(")]


def check_program(item: ProgramItem, program: str) -> str | None:
    """Run a program and its tests.

    Returns:
        The failure in a line; None if all tests passed.

    Raises:
        ResourceError: this machine cannot confine or start the child, or is too busy for it.
    """
    task = json.dumps({"program": program, "tests": item.tests}).encode("utf-8", "replace")
    try:
        with LimitedChild("edge_lab.measure.program_child:work", _LIMITS) as child:
            answer = json.loads(child.ask(task))
    except LimitError:
        return f"it takes more than {_LIMITS}, or was ended"
    except ChildError as error:
        return f"its process failed: {error}"
    return None if answer["passed"] else str(answer["error"])
