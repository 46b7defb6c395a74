"""The programs and the configuration of ``docs/recipes.md``, against real servers."""

from __future__ import annotations

import http.client
import importlib.util
import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import edge
from edge import LLM
from tests.conftest import Bundles, PoolingBundles
from tests.documents import ROOT, blocks
from tests.edge_serve.scripted import KEY, Live, ScriptedEngine, running, until
from tests.export.sources.local_server import LocalServer
from tests.ports import free_port

EXAMPLES = ROOT / "docs" / "examples"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian: nginx-light)")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.live
def test_the_agent_calls_a_tool_and_tells_its_result(
    tool_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    agent = load("agent")
    asked = []
    with running(tool_bundle, llm={"kv_capacity": 4096}) as live:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{live.url}/v1")

        def free_space_gb(path: str) -> float:
            asked.append(path)
            if len(asked) == 1:  # the model reads what went wrong and asks again
                raise FileNotFoundError(path)
            live.engine.default = "There are 42 GB free."
            return 42.0

        monkeypatch.setitem(agent.FUNCTIONS, "free_space_gb", free_space_gb)
        call = '<tool_call>\n{"name":"free_space_gb","arguments":{"path":"/var"}}\n</tool_call>'
        live.engine.default = call
        assert agent.main("How much space is free?") == "There are 42 GB free."
        assert asked[1:] == ["/var"]  # the first is bound by a grammar, which cuts the script
        assert "-> error: " in capsys.readouterr().err
        live.engine.default = call
        monkeypatch.setitem(agent.FUNCTIONS, "free_space_gb", lambda path: 42.0)
        assert agent.main("How much space is free?", max_turns=2) == "No answer after 2 turns."


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("format_disk", "{}", "error: KeyError: 'format_disk'"),
        ("free_space_gb", '{"path": "/va', "error: JSONDecodeError: "),
        ("free_space_gb", '{"path": "\\u0000"}', "error: ValueError: "),
    ],
)
def test_the_agent_tells_the_model_of_a_call_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: str, error: str
):
    agent = load("agent")
    function = SimpleNamespace(name=name, arguments=arguments)
    call = SimpleNamespace(id="1", function=function)
    replies = [
        SimpleNamespace(content=None, tool_calls=[call], model_dump=lambda **_: {}),
        SimpleNamespace(content="Sorry.", tool_calls=None),
    ]
    told: list[dict[str, Any]] = []

    def create(messages: list[dict[str, Any]], **_: Any) -> Any:
        told.extend(messages)
        return SimpleNamespace(choices=[SimpleNamespace(message=replies.pop(0))])

    client = SimpleNamespace(
        models=SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="x")])),
        chat=SimpleNamespace(completions=SimpleNamespace(create=create)),
    )
    monkeypatch.setattr(agent, "OpenAI", lambda **_: client)
    assert agent.main("How much space is free?") == "Sorry."
    assert json.loads(told[-1]["content"]).startswith(error)


def test_retrieval_puts_the_nearest_passages_into_the_prompt(
    pooling_bundles: PoolingBundles,
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    retrieval = load("retrieval")
    prompts = []

    class Spied(LLM):
        def generate(self, prompt: Any, *args: Any, **options: Any) -> Any:
            prompts.append(prompt[0]["content"])
            return super().generate(prompt, *args, **options)

    monkeypatch.setattr(retrieval, "LLM", Spied)
    monkeypatch.setattr(retrieval, "EMBEDDER", str(pooling_bundles("embed")))
    monkeypatch.setattr(retrieval, "MODEL", str(tiny_bundles("qwen2")))
    texts = ["Hold reset.", "Bread is baked.", "It has a fan.", "Red is hot."]
    path = tmp_path / "manual.txt"
    path.write_text("\n\n".join(texts), "utf-8")
    monkeypatch.setattr(retrieval.passages, "__defaults__", (10,))  # each is a passage
    retrieval.main(str(path), "How is it reset?", nearest=2)
    with LLM(pooling_bundles("embed")) as embedder:
        [asked] = embedder.embed(["How is it reset?"], prompt_name="query")
        near = np.argsort(-(embedder.embed(texts) @ asked))[:2]
    [prompt] = prompts
    assert {texts[i] for i in near} == {text for text in texts if text in prompt}
    assert prompt.index(texts[min(near)]) < prompt.index(texts[max(near)])  # as in the source
    assert prompt.endswith("Question: How is it reset?")


def test_short_paragraphs_are_one_passage():
    passages = load("retrieval").passages
    assert passages("a\n\nb\n\n\n\n" + "c" * 9, max_chars=8) == ["a\n\nb", "c" * 9]


class FakeNode:
    """What the example takes of ``rclpy.node.Node``."""

    parameters: dict[str, Any] = {}  # noqa: RUF012 (a test sets it)

    def __init__(self, name: str) -> None:
        self.published: dict[str, list[str]] = {}
        self.errors: list[str] = []
        self.heard: Callable[[Any], None]

    def declare_parameter(self, name: str, default: Any) -> Any:
        return SimpleNamespace(value=self.parameters.get(name, default))

    def create_publisher(self, _type: type, topic: str, _depth: int) -> Any:
        told = self.published.setdefault(topic, [])
        return SimpleNamespace(publish=lambda message: told.append(message.data))

    def create_subscription(
        self, _type: type, topic: str, callback: Callable[[Any], None], _depth: int
    ) -> None:
        assert topic == "prompt"
        self.heard = callback

    def get_logger(self) -> Any:
        return SimpleNamespace(error=self.errors.append)


@pytest.fixture
def ros2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The node, on stand-ins for ROS 2, which PyPI has not."""
    rclpy, node, std, msg = map(ModuleType, ("rclpy", "rclpy.node", "std_msgs", "std_msgs.msg"))
    node.Node = FakeNode  # type: ignore[attr-defined]
    msg.String = SimpleNamespace  # type: ignore[attr-defined]
    for module in (rclpy, node, std, msg):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return load("ros2_node")


@pytest.mark.live
def test_the_ros_node_answers_the_newest_prompt(
    tool_bundle: Path, ros2: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    with running(tool_bundle) as live:
        monkeypatch.setattr(FakeNode, "parameters", {"url": live.url, "model": "tiny"})
        node = ros2.EdgeLLMNode()
        live.engine.default = "To the left."
        node.heard(SimpleNamespace(data="Which way?"))
        until(lambda: bool(node.published["answer"]))
        assert node.published["answer"] == ["To the left."]
        assert "".join(node.published["answer_piece"]) == "To the left."
        assert len(node.published["answer_piece"]) > 1

        node.published["answer_piece"].clear()
        live.engine.delay_s = 0.05
        live.engine.default = "a" * 60
        node.heard(SimpleNamespace(data="Tell me all."))
        until(lambda: len(node.published["answer_piece"]) > 10)
        node.heard(SimpleNamespace(data="Tell me all again."))
        until(lambda: len(node.published["answer"]) > 1)
        assert node.published["answer"][1:] == ["a" * 60]
        assert 60 + 10 < len("".join(node.published["answer_piece"])) < 60 + 50, "both were read"
        assert node.errors == []
    node.heard(SimpleNamespace(data="Still there?"))  # the server is gone
    until(lambda: bool(node.errors))
    assert live.url in node.errors[0]


PIECE, END = b'data: {"choices":[{"delta":{"content":"Left."}}]}\n\n', b"data: [DONE]\n\n"
IN_CHUNKS, LAST = (b"%x\r\n%b\r\n" % (len(text), text) for text in (PIECE, END))


@pytest.mark.live
@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        (PIECE, PIECE + END),
        (IN_CHUNKS, IN_CHUNKS + LAST + b"0\r\n\r\n"),
        (IN_CHUNKS + LAST[:7], IN_CHUNKS + LAST + b"0\r\n\r\n"),
    ],
    ids=["plain", "between chunks", "in a chunk"],
)
def test_the_ros_node_publishes_no_answer_that_broke_off(
    ros2: ModuleType, monkeypatch: pytest.MonkeyPatch, broken: bytes, whole: bytes
):
    """And goes on to answer what is asked next."""
    bodies = [broken, whole]

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Connection", "close")
        if IN_CHUNKS in whole:
            request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(bodies.pop(0))

    server = LocalServer()
    monkeypatch.setattr(server, "answer", answer)
    with server:
        monkeypatch.setattr(FakeNode, "parameters", {"url": server.url})
        node = ros2.EdgeLLMNode()
        node.heard(SimpleNamespace(data="Which way?"))
        until(lambda: bool(node.errors or node.published["answer"]))
        assert node.published["answer"] == []
        node.heard(SimpleNamespace(data="Which way?"))
        until(lambda: bool(node.published["answer"]))
    assert node.published["answer"] == ["Left."]
    assert len(node.errors) == 1


@pytest.fixture
def proxied(tool_bundle: Path, client_keys: Path, tmp_path: Path) -> Iterator[tuple[Live, int]]:
    """A server with keys behind nginx with the printed configuration: ``(server, port)``."""
    port = free_port()
    with running(tool_bundle, api_key_file=client_keys) as live:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
                *("-subj", "/CN=llm.example.com", "-keyout", "own.key", "-out", "own.pem"),
            ],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        site = (EXAMPLES / "nginx.conf").read_text("utf-8")
        for printed, here in (
            ("listen 443", f"listen 127.0.0.1:{port}"),
            ("/etc/ssl/certs/llm.example.com.pem", f"{tmp_path}/own.pem"),
            ("/etc/ssl/private/llm.example.com.key", f"{tmp_path}/own.key"),
            ("http://127.0.0.1:8000", live.url),
        ):
            assert site.count(printed) == 1
            site = site.replace(printed, here)
        paths = "".join(
            f"{kind}_temp_path {tmp_path}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        own = tmp_path / "nginx.conf"
        own.write_text(
            f"daemon off;\npid {tmp_path}/pid;\nerror_log {tmp_path}/errors;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{paths}{site}}}\n"
        )
        assert NGINX is not None
        nginx = subprocess.Popen([NGINX, "-c", own, "-e", tmp_path / "errors"])
        try:
            until(lambda: nginx.poll() is None and _listens(port))
            yield live, port
        finally:
            nginx.terminate()
            nginx.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _connect(port: int) -> http.client.HTTPSConnection:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=5)


def _get(port: int, path: str) -> tuple[int, bytes]:
    with closing(_connect(port)) as client:
        client.request("GET", path)
        response = client.getresponse()
        return response.status, response.read()


@pytest.mark.live
@needs_nginx
def test_nginx_passes_each_token_on_and_the_end_of_a_client(proxied: tuple[Live, int]):
    live, port = proxied
    live.engine.default = "x" * 400
    live.engine.delay_s = 0.1
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {KEY}",
        "Host": "llm.example.com",
        "Origin": "https://llm.example.com",
        "Sec-Fetch-Site": "same-origin",
    }
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
    )
    client = _connect(port)
    client.request("POST", "/v1/chat/completions", body, headers)
    until(lambda: live.engine.llm.scheduler.stats().running == 1)
    time.sleep(0.5)
    live.engine.running.clear()  # no more tokens: what there are must come through
    response = client.getresponse()
    assert response.status == 200
    while b'"x"' not in response.readline():
        pass
    response.close()
    client.close()
    live.engine.running.set()
    assert live.idle(), "the answer goes on though its client has left"
    assert _get(port, "/v1/models")[0] == 401
    status, page = _get(port, "/")
    assert status == 200
    assert b"<html" in page


def test_the_python_of_the_page_prints_json(
    tool_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "mine").symlink_to(tool_bundle)
    [source] = blocks(ROOT / "docs" / "recipes.md", "python")
    engine = ScriptedEngine()
    engine.default = '{"name":"Bob","age":42} is what I found.'
    monkeypatch.setattr(edge, "LLM", engine.open)
    exec(compile(source, "recipes.md", "exec"), {})
    assert json.loads(capsys.readouterr().out) == {"name": "Bob", "age": 42}


def test_no_recipe_is_long():
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    recipes = text.split("\n## ")[1:]
    assert all(recipe.startswith("... ") for recipe in recipes)
    assert len(recipes) >= 10
    lines = {
        name: body.strip().count("\n") for name, _, body in (r.partition("\n") for r in recipes)
    }
    assert max(lines.values()) <= 20, lines
