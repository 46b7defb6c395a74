"""A whole service in a thread, whose engine says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.backends.ort import cpu as ort
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError, EdgeError
from edge.runtime.llm import LLM, Prompt
from edge_lab.telemetry import Snapshot
from edge_serve.run import Service
from edge_serve.settings import ServerSettings
from tests.makers.tiny_models import CONTROL_IDS, EOS_ID
from tests.standins.scripted_backend import ScriptedBackend, random_logits

CAPACITY = 512
KEY = "sk-of-the-client"
# What Qwen2.5's template does with tools, in short.
HERMES_TEMPLATE = (
    "{{bos_token}}{% if tools %}{{ '# Tools\n' }}{% for tool in tools %}"
    "{{ tool | tojson }}{{ '\n' }}{% endfor %}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' or message['role'] == 'system' %}"
    "{{'<｜User｜>' + message['content']}}"
    "{%- elif message['role'] == 'tool' %}{{'<tool_response>' + message['content']}}"
    "{%- elif message['role'] == 'assistant' %}{{'<｜Assistant｜>'}}"
    "{% if message['content'] %}{{message['content']}}{% endif %}"
    "{% if message['tool_calls'] %}{% for call in message['tool_calls'] %}"
    "{{'<tool_call>' + call['function']['name'] + ' '}}{{ call['function']['arguments'] | tojson }}"
    "{{'</tool_call>'}}{% endfor %}{% endif %}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
)


class ScriptedEngine:
    """What the engine says, and how it misbehaves.

    Attributes:
        delay_s: of every step.
        running: cleared, the next step waits until it is set.
        poison: a token id; once it is the last one, logits are NaN.
        fails_at: likewise, but the engine fails.
        default: answer to every chat that nothing else was said about.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.running = threading.Event()
        self.running.set()
        self.poison: int | None = None
        self.fails_at: int | None = None
        self.default: str | None = None
        self.backend: ScriptedBackend
        self.llm: LLM
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def open(self, bundle: Path, **options: Any) -> LLM:
        """An LLM of this bundle on a scripted backend."""

        def open_backend(bundle: Path, _manifest: Any, **given: Any) -> ScriptedBackend:
            table = EmbeddingTable(bundle / "embeddings.safetensors")
            self._random = random_logits(table.vocab_size)
            self.backend = ScriptedBackend(
                table,
                self._script,
                num_slots=given["num_slots"],
                capacity=given["kv_capacity"],
                max_step_tokens=given["max_step_tokens"],
            )
            for name in ("steps", "batches"):  # it may run for hours
                setattr(self.backend, name, deque(maxlen=1))
            table.close()
            return self.backend

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ort, "OrtBackend", open_backend)
            self.llm = LLM(bundle, **{"kv_capacity": CAPACITY, **options})
        return self.llm

    def say(self, prompt: Prompt, answer: str, *, ends: bool = True, **options: Any) -> None:
        """Answer ``prompt`` with this text and the end token; control tokens act."""
        ids = self.llm.tokenizer.encode(answer, control=True)
        key = tuple(self.llm.encode(prompt, **options))
        self._answers[key] = [*ids, EOS_ID] if ends else ids

    def _script(self, seen: tuple[int, ...]) -> int | NDArray[np.float32]:
        self.running.wait()
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.fails_at is not None and seen[-1] == self.fails_at:
            raise BackendError("cudaMalloc failed at 0x7f12deadbeef in /opt/secret/engine.plan")
        if self.poison is not None and seen[-1] == self.poison:
            return np.full(self.llm.manifest.model.vocab_size, np.nan, np.float32)
        for prompt, answer in self._answers.items():
            given = len(seen) - len(prompt)
            if 0 <= given < len(answer) and seen == (*prompt, *answer[:given]):
                return answer[given]
        if self.default is not None and CONTROL_IDS["<｜Assistant｜>"] in seen:
            start = len(seen) - seen[::-1].index(CONTROL_IDS["<｜Assistant｜>"])
            start += 2 * (seen[start : start + 1] == (CONTROL_IDS["<think>"],))  # and its newline
            answer = self.llm.tokenizer.encode(self.default, control=True)
            return answer[len(seen) - start] if len(seen) - start < len(answer) else self._ending()
        return self._random(seen)

    def _ending(self) -> NDArray[np.float32]:
        """Ends the answer; where a grammar does not let it, closes what is open."""
        logits = np.zeros(self.llm.manifest.model.vocab_size, np.float32)
        logits[[self.llm.tokenizer.encode(char)[0] for char in '"}]']] = 50
        logits[CONTROL_IDS["</think>"]] = 60
        logits[EOS_ID] = 100
        return logits


class RealEngine(ScriptedEngine):
    """Says what the bundles say."""

    def open(self, bundle: Path, **options: Any) -> LLM:
        """See `ScriptedEngine.open`."""
        self.llm = LLM(bundle, backend="ort-cpu", num_threads=1, **options)
        return self.llm


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream; ``[DONE]`` as text."""
        lines = self.body.decode().split("\n\n")
        datas = [line[6:] for line in lines if line.startswith("data: ")]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


class Live:
    """A running service."""

    def __init__(self, service: Service, engine: ScriptedEngine) -> None:
        self.service = service
        self.engine = engine
        self.port = service.port
        self.exit_code: int | None = None
        self.error: EdgeError | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
        timeout_s: float = 20,
    ) -> Answer:
        """GET, or POST where there is a body."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data)
        if data is not None:
            request.add_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return Answer(response.status, _lower(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, _lower(error.headers), error.read())

    def chat(self, text: str = "what", /, **fields: Any) -> Answer:
        messages = [{"role": "user", "content": text}]
        return self.ask("/v1/chat/completions", {"model": "tiny", "messages": messages, **fields})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=15)

    def idle(self, timeout_s: float = 5.0) -> bool:
        """Whether nothing runs and waits any more, within a time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            stats = self.engine.llm.scheduler.stats()
            if not (stats.running or stats.waiting or self.service.models.num_flights):
                return True
            time.sleep(0.005)
        return False


@contextmanager
def running(
    bundle: Path,
    engine: ScriptedEngine | None = None,
    *,
    telemetry: Any = Snapshot,
    notifier: Any = None,
    llm: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Live]:
    """Serve a bundle as ``tiny`` for as long as the block lasts."""
    engine = engine or ScriptedEngine()
    given: dict[str, Any] = {
        "port": 0,
        "model": {"tiny": bundle},
        "idle_connection_s": 2.0,
        **settings,
    }
    options = {"num_slots": 4, "queue_capacity": 64, **(llm or {})}
    service = Service(
        ServerSettings(**given),
        lambda path: engine.open(path, **options),
        telemetry=telemetry,
        notifier=notifier,
    )
    live = Live(service, engine)

    def run() -> None:
        try:
            live.exit_code = asyncio.run(service.run())
        except EdgeError as error:
            live.error = error

    thread = threading.Thread(target=run, name="service")
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while service.models.not_ready() == "loading" and time.monotonic() < deadline:
            if live.error is not None:
                raise live.error
            time.sleep(0.005)
        yield live
    finally:
        engine.running.set()
        with suppress(RuntimeError):  # it has ended by itself
            service.stop()
            time.sleep(0.01)
            service.stop()
        thread.join(15)
        assert not thread.is_alive(), "the service did not stop"


def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.01)


def tiny(bundle: Path, **changes: Any) -> ServerSettings:
    """Settings of a service on a free port."""
    return replace(ServerSettings(port=0, model={"tiny": bundle}), **changes)
