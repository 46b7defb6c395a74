"""No regular expression stops a server: each that meets what clients write is run on hostile text.

`re` holds the interpreter while it looks, so that one search of seconds stops every client.
"""

from __future__ import annotations

import ast
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import pytest

from edge.errors import RequestError
from edge.runtime import schema_rewrite
from edge.text.messages import normalize_messages
from edge.text.tokenizer import Tokenizer
from edge_make.read_tokenizer import read_tokenizer
from edge_serve.api import protocol
from edge_serve.http import access, errors, guard, priority
from edge_serve.pictures import parts
from edge_serve.settings import ServerSettings, parse_keep_alive
from tests.edge.text.test_tokenizer import TOKENS
from tests.makers.tiny_models import write_tokenizer

ROOT = Path(__file__).parents[2]
SIZE = 20_000_000
MOST_S = 0.05


def _picture(text: str) -> None:
    parts._bytes_of(parts.Picture(text, "image"))


def _error(text: str) -> None:
    assert errors.as_api_error(RequestError(text)).shown


def _field(text: str) -> None:
    body = msgspec.json.encode({"model": "m", "messages": [], text: 1})
    protocol.decode(body, protocol.ChatRequest, 64)


def _nested(text: str) -> None:
    protocol.nesting(text.encode())


def _header(text: str) -> None:
    assert not access.is_local(text.encode())
    proxies = ServerSettings(trusted_proxies=["10.0.0.1"]).proxy_networks
    access.Origins(proxies, lambda: None).find("10.0.0.1", text.encode())
    priority.priority_of([text, f"u={text}"])


def _head(text: str) -> None:
    headers = guard._Headers([(b"x-request-id", text.encode()), (b"content-length", text.encode())])
    guard._take_absolute({"raw_path": f"http://{text}".encode(), "path": ""}, headers)
    guard._request_id(headers)
    guard._length(headers)


def _path(text: str) -> None:
    guard._NEEDLESS.search(text.encode())


def _name(text: str) -> None:
    normalize_messages([{"role": "user", "content": "a", "name": text}])


def _schema(text: str) -> None:
    schema_rewrite.rewrite_schema({"pattern": text, "const": text})


def _cut(text: str) -> None:
    tokenizer = cast("Any", Tokenizer.__new__(Tokenizer))
    tokenizer._cuts = True
    for _ in tokenizer._pieces(text):
        pass


# The one list: each pattern that meets what a client writes, and what brings the text to it.
CLIENTS: dict[str, Callable[[str], object]] = {
    "edge_serve/pictures/parts.py:_DATA": _picture,
    "edge_serve/pictures/parts.py:_ADDRESS": _picture,
    "edge_serve/http/errors.py:_SECRETS": _error,
    "edge_serve/http/errors.py:_FIELD": _error,
    "edge_serve/http/access.py:_HOST": _header,
    "edge_serve/http/access.py:_SAID": _header,
    "edge_serve/http/priority.py:_URGENCY": _header,
    "edge_serve/http/guard.py:_ID": _head,
    "edge_serve/http/guard.py:_LENGTH": _head,
    "edge_serve/http/guard.py:_NEEDLESS": _path,
    "edge_serve/http/guard.py:_ABSOLUTE": _head,
    "edge_serve/api/protocol.py:_STRING": _nested,
    "edge_serve/api/protocol.py:_ESCAPE": _nested,
    "edge_serve/api/protocol.py:_PLACE": _field,
    "edge_serve/api/protocol.py:_STEP": _field,
    "edge_serve/api/protocol.py:_UNKNOWN": _field,
    "edge_serve/api/protocol.py:_RANGE": _field,
    "edge_serve/api/protocol.py:_MISSING": _field,
    "edge_serve/settings.py:_NUMBER": parse_keep_alive,
    "edge_serve/settings.py:_DURATION": parse_keep_alive,
    "edge_serve/settings.py:_DURATION_PART": parse_keep_alive,
    "edge/text/messages.py:_PARTICIPANT": _name,
    "edge/text/tokenizer.py:_CUT": _cut,
    "edge/runtime/schema_rewrite.py:_OUTSIDE": _schema,
    "edge/runtime/schema_rewrite.py:_INSIDE": _schema,
    "edge/runtime/schema_rewrite.py:_FORBIDDEN": _schema,
}

# Patterns that meet nothing of a client's, by file or by name in it, and what they meet.
OTHERS = {
    "edge/adapters/": "files that an admin loads",
    "edge/backends/": "errors of libraries and drivers",
    "edge/bundle/": "bundles and names of models, by the operator",
    "edge/cli/": "the command line",
    "edge/device/": "files of the kernel",
    "edge/errors.py": "own messages",
    "edge/runtime/prefix_store.py": "names of prefixes, by the operator",
    "edge/text/reasoning.py": "a bundle's template",
    "edge/text/template_engine.py": "a bundle's template",
    "edge/text/tokenizer_file.py": "a bundle's tokenizer",
    "edge/text/tokenizer.py:_BYTE_FALLBACK": "tokens of a vocabulary",
    "edge/text/tokenizer.py:__init__": "`test_control_tokens_are_found_in_steps` has it",
    "edge/vision/decode.py": "the version of Pillow",
    "edge/votes/": "answers, bounded by tokens; a client's own pattern runs in a child",
    "edge_serve/api/bare_calls.py": "answers, which a request's tokens bound",
    "edge_serve/api/tools.py": "answers, which a request's tokens bound",
    "edge_serve/batch/clients.py": "addresses of the operator",
    "edge_serve/cli/": "own texts",
    "edge_serve/http/errors.py:_rename": "names of fields, at most 200 characters",
    "edge_serve/models/route.py": "rules of the operator",
    "edge_serve/settings.py:_NAME": "settings",
    "edge_serve/stored/store.py": "records of the store",
}

ENDLESS = {
    "letters": "a" * SIZE,
    "bytes": "\\" * SIZE,
    "quotes": '"\\' * (SIZE // 2),
    "blanks": " \n" * (SIZE // 2),
    "fields": "a.a[0]" * (SIZE // 6),
    "paths": " /a/a" * (SIZE // 5),
    "digits": "1s" * (SIZE // 2),
    "places": " - at `$" * (SIZE // 8) + "\n",
    "data": "data:image/png" + ";a" * (SIZE // 2),
    "address": "http:" * (SIZE // 5),
    "classes": "[--x{" * (SIZE // 5),
    "Chinese": "\u4e00" * (SIZE // 3),
}


class Timed:
    """A pattern that notes how long its longest call took."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern
        self.longest_s = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._pattern, name)
        if not callable(method):
            return method

        def call(*args: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args)
            finally:
                self.longest_s = max(self.longest_s, time.thread_time() - start)

        return call


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("use", list(dict.fromkeys(CLIENTS.values())))
def test_no_pattern_looks_long_at_what_a_client_writes(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[str], object], kind: str
):
    timed = {}
    for place in (place for place, by in CLIENTS.items() if by is use):
        path, name = place.split(":")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        timed[place] = Timed(getattr(module, name))
        monkeypatch.setattr(module, name, timed[place])
    with suppress(errors.APIError, RequestError, ValueError):
        use(ENDLESS[kind])
    assert {place: each.longest_s for place, each in timed.items() if each.longest_s > MOST_S} == {}


@pytest.mark.slow
@pytest.mark.timing
def test_no_pattern_of_a_field_looks_long():
    found = [call for _, call in _calls() if isinstance(call.func, ast.Name)]
    patterns = {
        each.value.value
        for call in found
        for each in call.keywords
        if isinstance(each.value, ast.Constant)
    }
    assert len(patterns) >= 3
    for pattern in patterns:
        kind = Annotated[str, msgspec.Meta(pattern=pattern)]
        for text in ENDLESS.values():
            start = time.thread_time()
            with suppress(msgspec.ValidationError):
                msgspec.convert(text, kind)
            assert time.thread_time() - start < MOST_S, pattern


@pytest.mark.slow
@pytest.mark.timing
def test_control_tokens_are_found_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tokenizer(tmp_path)
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json", TOKENS)
    token = next(iter(tokenizer.control_tokens))
    timed = Timed(tokenizer._control_pattern)
    monkeypatch.setattr(tokenizer, "_control_pattern", timed)
    for text in ("<|" * (SIZE // 2), token[:-1] * (SIZE // len(token))):
        assert tokenizer.split_control(text) == [(text, False)]
        assert timed.longest_s < MOST_S


def test_each_pattern_is_in_a_list():
    """A new one belongs into `CLIENTS` if any client writes what it looks at."""
    found = {place for place, call in _calls() if isinstance(call.func, ast.Attribute)}
    others = {place for place in found if any(place.startswith(each) for each in OTHERS)}
    assert found - others == CLIENTS.keys(), "see the two lists of this file"
    assert [
        each for each in OTHERS if not any(map(str.startswith, found, [each] * len(found)))
    ] == []


def _calls() -> Iterator[tuple[str, ast.Call]]:
    """Find calls of `re`, and of `Meta` with a pattern in the server, each with its place."""
    for package in ("edge", "edge_serve"):
        for path in sorted((ROOT / package).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            yield from _within(ast.parse(path.read_text("utf-8")), f"{where}:", package)


def _within(node: ast.AST, place: str, package: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inner = place
        match child:
            case ast.Assign(targets=[ast.Name(id=name), *_]) if place.endswith(":"):
                inner = place + name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                inner = place.partition(":")[0] + ":" + name
            case ast.Call(func=ast.Attribute(value=ast.Name(id="re"), attr=name)):
                if name not in ("escape", "error"):
                    yield inner, child
            case ast.Call(func=ast.Name(id="Meta")) if package == "edge_serve":
                if any(each.arg == "pattern" for each in child.keywords):
                    yield inner, child
            case _:
                pass
        yield from _within(child, inner, package)
