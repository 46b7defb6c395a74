"""A server with the page and scripted answers: what the prompt says decides what comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from edge_serve.http.page import page_files

ATTACK = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    "<a href=\"javascript:document.title='owned'\">click</a>\n"
    '```html\n</pre><script>document.title="owned"</script>\n```\nend'
)
HOT_CELSIUS = 61.5


class StubServer(ThreadingHTTPServer):
    """What it saw of the clients, and what it answers.

    Attributes:
        requests: bodies of chats so far.
        paths: every path asked for.
        hangups: set once a client left a stream.
        api_key: wanted if set.
        models: that are served.
        aliases: further names in the list of models, of which `/stats` has nothing.
        prefix: of all paths, as behind a proxy; ends with a slash.
        warning: of the engine.
        reason: for which answers end.
        answers: text by prompt, sent in small pieces.
        context: tokens of the models' context.
        reasons: whether a model reasons, by name; those that are not named do.
        waiting: requests in the queue, as it says.
        usage: tokens of each answer, as it says.
        holds: cleared, answers do not begin; `progress` is told meanwhile.
        progress: of the prompt, as it is told; None tells nothing.
        failing: model whose answers break off.
        states: of models, by name, as the server says them; it loads those that have one.
        loading: cleared, models that are to be loaded go on loading.
        load_refusal: status and text with which loading and unloading are refused.
        sees: models that take pictures.
        refusals: how many chats are yet to be refused with 429.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.hangups = threading.Event()
        self.api_key: str | None = None
        self.models = ["tiny", "<b>other</b>"]
        self.aliases: list[str] = []
        self.prefix = "/"
        self.refusals = 0
        self.warning: str | None = None
        self.tokens = 0
        self.context = 4096
        self.reasons: dict[str, bool] = {}
        self.waiting = 2
        self.usage: dict[str, Any] = {"completion_tokens": 7, "prompt_tokens": 3}
        self.progress: dict[str, int] | None = None
        self.failing: str | None = None
        self.holds = threading.Event()
        self.holds.set()
        self.answers: dict[str, str] = {}
        self.states: dict[str, dict[str, str]] = {}
        self.loading = threading.Event()
        self.loading.set()
        self.load_refusal: tuple[int, str] | None = None
        self.reason = "stop"
        self.sees: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves is no error."""


@contextmanager
def page_stub() -> Iterator[StubServer]:
    server = StubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _text_of(content: Any) -> Any:
    """The text of a message, without its pictures."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        path = self._path()
        if file := page_files().get(path):
            self._answer(200, file.body, file.headers)
        elif not self._admitted():
            self._error(401, "wrong key")
        elif path == "/v1/models":
            cards = [self._card(name) for name in (*self.server.models, *self.server.aliases)]
            self._json(200, {"data": [*cards, {**self._card("vectors"), "task": "embed"}]})
        elif path == "/stats":
            self._json(200, self._stats())
        else:
            self._error(404, "nothing here")

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(body)
        if not self._admitted():
            self._error(401, "wrong key")
        elif self._path() in ("/models/load", "/models/unload"):
            self._set_state(body["model"], self._path().rpartition("/")[2])
        elif self._path() != "/v1/chat/completions":
            self._error(404, "nothing here")
        elif self.server.refusals > 0:
            self.server.refusals -= 1
            self._error(429, "the queue is full", {"retry-after": "1"})
        else:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            try:
                self._hold()
                if self.server.failing == body["model"]:
                    self._data({"error": {"message": "the engine failed at this request"}})
                elif body.get("continue_final_message"):
                    for piece in ("whole ", "answer", "."):
                        self._delta(content=piece)
                    self._end()
                else:
                    self._stream(_text_of(body["messages"][-1]["content"]))
            except OSError:
                self.server.hangups.set()

    def _set_state(self, model: str, act: str) -> None:
        if self.server.load_refusal is not None:
            self._error(*self.server.load_refusal)
            return
        if act == "load":
            self.server.states[model] = {"value": "loading"}
            self.server.loading.wait(20)
        self.server.states[model] = {"value": f"{act}ed"}
        self._json(200, {"success": True})

    def _hold(self) -> None:
        told = None
        while not self.server.holds.wait(0.02):
            if self.server.progress != told:
                told = self.server.progress
                self._data({"choices": [{"delta": {}}], "prompt_progress": told})

    def _stream(self, prompt: str) -> None:
        self._data({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if text := self.server.answers.get(prompt):
            for at in range(0, len(text), 7):
                self._delta(content=text[at : at + 7])
        elif prompt == "attack":
            self._delta(reasoning_content=ATTACK, reasoning=ATTACK)
            self._delta(content=ATTACK)
        elif prompt == "endless":
            for number in range(2000):
                self._delta(content=f"{number} ")
                time.sleep(0.02)
        elif prompt == "broken":
            self._delta(content="half an ")
            self._data({"error": {"message": "the engine failed at this request"}})
            return
        elif prompt == "cut":
            self._delta(content="half an ")
            return
        else:
            self.wfile.write(b": ping\n\n")
            self._delta(reasoning_content="First ", reasoning="First ")
            self._delta(reasoning_content="I think.", reasoning="I think.")
            for piece in ("Grüße, ", "Welt 🌍.\n", "```py\nprint('<b>')\n```\n", "`Done`."):
                self._delta(content=piece)
        self._end()

    def _end(self) -> None:
        self._data({"choices": [{"delta": {}, "finish_reason": self.server.reason}]})
        self._data({"choices": [], "usage": self.server.usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _delta(self, **delta: str) -> None:
        self.server.tokens += 1
        self._data({"choices": [{"delta": delta}]})

    def _data(self, chunk: dict[str, Any]) -> None:
        text = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
        # In two writes, cut inside a character where there is one: a reader must join them.
        middle = next((at for at, byte in enumerate(text) if byte >= 0xC0), len(text) // 2) + 1
        for part in (text[:middle], text[middle:]):
            self.wfile.write(part)
            self.wfile.flush()

    def _path(self) -> str:
        """The path as the server has it, without what is the proxy's."""
        prefix = self.server.prefix
        return f"/{self.path.removeprefix(prefix)}" if self.path.startswith(prefix) else ""

    def _admitted(self) -> bool:
        key = self.server.api_key
        return key is None or self.headers["authorization"] == f"Bearer {key}"

    def _card(self, name: str) -> dict[str, Any]:
        own = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0.0}
        return {
            "id": name,
            "max_model_len": self.server.context,
            "sampling": own,
            "reasons": self.server.reasons.get(name, True),
            "size_bytes": 1_500_000_000,
            "architecture": {"input_modalities": ["text", *["image"] * (name in self.server.sees)]},
            **({"status": state} if (state := self.server.states.get(name)) else {}),
        }

    def _stats(self) -> dict[str, Any]:
        times = {"count": 3, "p50": 0.125, "p95": 1.25, "p99": 2.5}
        return {
            "models": {
                "tiny": {
                    "loaded": True,
                    "failed": False,
                    "backend": "ort-cpu",
                    "engine": "",
                    "bundle": "tiny-int4",
                    "quantization": "int4",
                    "warning": self.server.warning,
                    "running": 1,
                    "waiting": self.server.waiting,
                    "queue_capacity": 64,
                    "kv_used_tokens": 25,
                    "kv_capacity_tokens": 100,
                    "num_slots": 4,
                    "slots": [
                        {"in_use": True, "rows": 20, "cached_rows": 5},
                        {"in_use": True, "rows": 5, "cached_rows": 0},
                        {"in_use": False, "rows": 9, "cached_rows": 9},
                        {"in_use": False, "rows": 0, "cached_rows": 0},
                    ],
                    "completion_tokens": self.server.tokens,
                    "latency": {"ttft_s": times, "itl_s": times, "total_s": times},
                },
                **{name: {} for name in self.server.models if name != "tiny"},
                **{
                    name: {"loaded": False}
                    for name, state in self.server.states.items()
                    if state["value"] != "loaded"
                },
            },
            "rejections": {
                "queue_full": 3,
                "unknown_field": 1,
                "bodies_full": 0,
                "invalid_value": 6,
            }
            | {"of_a_newer_server": 2},
            "drift": {"params": {"temperature": {"psi": 0.31, "alarm": True}}},
            "device": {
                "process_rss_bytes": 3 * 2**29,
                "memory_total_bytes": 8 * 2**30,
                "memory_available_bytes": 6 * 2**30,
                "temperatures_celsius": {"cpu": 50.0, "gpu": HOT_CELSIUS},
                "throttled": False,
            },
        }

    def _json(self, status: int, value: Any) -> None:
        self._answer(status, json.dumps(value).encode(), {"content-type": "application/json"})

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": {"message": message}}).encode()
        self._answer(status, body, {"content-type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
