"""Adapters over HTTP: by the clients of OpenAI, Anthropic and Ollama, and by vLLM's endpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge import LLM, SamplingParams
from edge.adapters.library import library
from edge.errors import ConfigError
from edge_fleet.signing import sign_bundle
from edge_make.adapter_library import add_adapter, remove_adapter
from edge_serve.settings import ServerSettings
from export.pipeline import ExportConfig, export_checkpoint
from tests.edge.adapters.test_trust import sign
from tests.edge_serve.scripted import Live, ScriptedEngine, running
from tests.makers.keys import make_key
from tests.makers.tiny_adapters import write_adapter
from tests.makers.tiny_models import write_checkpoint

pytestmark = pytest.mark.live

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEYS = "ann:sk-of-ann-the-admin\nbob:sk-of-bob-the-client\n"
ANN, BOB = ({"authorization": "Bearer " + line.partition(":")[2]} for line in KEYS.split())
QUESTION = [{"role": "user", "content": "say something"}]
FIELDS: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}


class RealEngine(ScriptedEngine):
    """The CPU's engine in the place of a script."""

    def open(self, bundle: Path, **options: Any) -> LLM:
        self.llm = LLM(bundle, num_threads=1, int8_activations=False, **options)
        return self.llm


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one adapter beside it, two in a directory, and a file of keys."""
    root = tmp_path_factory.mktemp("adapters")
    base = write_checkpoint(root / "base", "qwen2")
    config = ExportConfig(
        source=str(base), output=root / "bundle", quant="fp16", kv_capacity=256, adapters=8
    )
    export_checkpoint(config)
    (root / "dir").mkdir()
    for seed, place in enumerate((root / "kept", root / "dir/first", root / "dir/second")):
        write_adapter(place, base, {"target_modules": LINEARS, "lora_alpha": 64}, seed=seed)
    write_adapter(root / "outside", base, {"target_modules": LINEARS})
    write_adapter(root / "dir/wide", base, {"target_modules": LINEARS, "r": 16})
    (root / "dir/link").symlink_to(root / "outside")
    add_adapter(root / "bundle", root / "kept", "kept")
    (root / "keys").write_text(KEYS)
    (root / "keys").chmod(0o600)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str | None, str]:
    """What the model says to `QUESTION`, alone and with each adapter."""
    with LLM(root / "bundle", num_threads=1, int8_activations=False) as llm:
        for name in ("first", "second"):
            llm.load_adapter(root / "dir" / name)
        params = SamplingParams(temperature=0, max_tokens=12)
        names = (None, "kept", "first", "second")
        found = {name: llm.generate(QUESTION, params, adapter=name) for name in names}
    texts = {name: result.reasoning + result.text for name, result in found.items()}
    assert len(set(texts.values())) == 4, "adapters that change nothing prove nothing"
    return texts


@pytest.fixture(scope="module")
def live(root: Path) -> Iterator[Live]:
    with running(root / "bundle", RealEngine(), adapter_dir=root / "dir") as live:
        yield live


def said(answer: Any) -> str:
    """Reasoning and text of a chat's answer."""
    message = answer.json["choices"][0]["message"]
    return (message.get("reasoning_content") or "") + (message["content"] or "")


def load(live: Live, name: str, path: str | None = None, **fields: Any) -> Any:
    body = {"lora_name": name, "lora_path": path or name, **fields}
    return live.ask("/v1/load_lora_adapter", body)


def test_real_clients_name_the_adapter_behind_the_model(
    live: Live, expected: dict[str | None, str]
):
    openai = pytest.importorskip("openai")
    anthropic = pytest.importorskip("anthropic")
    ollama = pytest.importorskip("ollama")
    for name, adapter in (("tiny", None), ("tiny:kept", "kept"), ("tiny", None)):
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0) as client:
            chat = client.chat.completions.create(model=name, **FIELDS)
            assert chat.model == name
            message = chat.choices[0].message
            text = (getattr(message, "reasoning_content", "") or "") + (message.content or "")
            assert text == expected[adapter]
            response = client.responses.create(
                model=name, input="say something", temperature=0, max_output_tokens=12
            )
            assert response.model == name
        with anthropic.Anthropic(base_url=live.url, api_key="-", max_retries=0) as client:
            answer = client.messages.create(
                model=name, messages=QUESTION, max_tokens=12, extra_body={"temperature": 0}
            )
            assert answer.model == name
            texts: list[Any] = [
                getattr(b, "thinking", None) or getattr(b, "text", "") for b in answer.content
            ]
            assert "".join(texts) == expected[adapter]
        options = {"temperature": 0, "num_predict": 12}
        with ollama.Client(host=live.url) as client:
            spoken = client.chat(model=name, messages=QUESTION, options=options)
        assert spoken.model == name
        assert (spoken.message.thinking or "") + (spoken.message.content or "") == expected[adapter]


def test_unknown_adapters_are_404_in_each_protocols_form(live: Live):
    openai = pytest.importorskip("openai")
    anthropic = pytest.importorskip("anthropic")
    ollama = pytest.importorskip("ollama")
    name = "tiny:nobody"
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="tiny:nobody"):
            client.chat.completions.create(model=name, **FIELDS)
        with pytest.raises(openai.NotFoundError, match="tiny:nobody"):
            client.responses.create(model=name, input="a")
    with (
        anthropic.Anthropic(base_url=live.url, api_key="-", max_retries=0) as client,
        pytest.raises(anthropic.NotFoundError, match="tiny:nobody"),
    ):
        client.messages.create(model=name, messages=QUESTION, max_tokens=12)
    with (
        ollama.Client(host=live.url) as client,
        pytest.raises(ollama.ResponseError, match="tiny:nobody") as caught,
    ):
        client.chat(model=name, messages=QUESTION)
    assert caught.value.status_code == 404


def test_vllms_endpoints_load_list_and_unload(live: Live, expected: dict[str | None, str]):
    listed = {card["id"]: card for card in live.ask("/v1/models").json["data"]}
    assert listed["tiny:kept"]["parent"] == "tiny"
    assert "parent" not in listed["tiny"]
    assert load(live, "mine", "first").status == 200
    assert said(live.chat(**{**FIELDS, "model": "tiny:mine"})) == expected["first"]
    assert said(live.chat(**{**FIELDS, "model": "mine"})) == expected["first"]  # as vLLM names it
    again = load(live, "mine", "second")
    assert again.status == 400
    assert "loaded already" in again.json["error"]["message"]
    assert load(live, "mine", "second", load_inplace=True).status == 200
    assert said(live.chat(**{**FIELDS, "model": "tiny:mine"})) == expected["second"]
    assert "tiny:mine" in {card["id"] for card in live.ask("/v1/models").json["data"]}
    assert live.ask("/v1/models/tiny:mine").json["parent"] == "tiny"
    assert live.ask("/v1/unload_lora_adapter", {"lora_name": "mine"}).status == 200
    assert live.ask("/v1/unload_lora_adapter", {"lora_name": "mine"}).status == 404
    assert live.chat(**{**FIELDS, "model": "tiny:mine"}).status == 404
    assert live.ask("/v1/unload_lora_adapter", {"lora_name": "kept"}).status == 409
    assert said(live.chat(**FIELDS)) == expected[None]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("../outside", 403, "leads out of adapter_dir"),
        ("link", 403, "leads out of adapter_dir"),
        ("/etc", 403, "leads out of adapter_dir"),
        ("nothing", 400, "save_pretrained of peft"),
        ("a\0b", 400, "lora_path"),
        ("wide", 400, "rank 8 at most"),
    ],
)
def test_paths_that_are_refused(live: Live, path: str, status: int, message: str):
    refused = load(live, "hostile", path)
    assert (refused.status, message in refused.json["error"]["message"]) == (status, True)
    assert live.chat(**{**FIELDS, "model": "tiny:hostile"}).status == 404


@pytest.mark.parametrize("name", ["../a", "a/b", ".a", "a b", "x" * 65])
def test_names_that_are_refused(live: Live, name: str):
    assert load(live, name, "first").status == 400


def test_without_a_directory_none_is_loaded_by_path(root: Path):
    with running(root / "bundle", RealEngine()) as live:
        refused = load(live, "first")
        assert refused.status == 403
        assert "adapter_dir" in refused.json["error"]["message"]


def test_keys_decide_who_loads_and_who_uses(root: Path, expected: dict[str | None, str]):
    settings: dict[str, Any] = {
        "api_key_file": root / "keys",
        "admin_keys": ["ann"],
        "key_adapters": {"bob": "first, other"},
        "adapter_dir": root / "dir",
    }
    with running(root / "bundle", RealEngine(), **settings) as live:
        body = {"lora_name": "first", "lora_path": "first"}
        assert live.ask("/v1/load_lora_adapter", body, headers=BOB).status == 403
        assert live.ask("/v1/load_lora_adapter", body, headers=ANN).status == 200
        for headers, may in ((ANN, {"kept", "first"}), (BOB, {"first"})):
            cards = live.ask("/v1/models", headers=headers).json["data"]
            assert {card["id"] for card in cards} == {"tiny", *(f"tiny:{name}" for name in may)}
            for name in ("kept", "first"):
                asked = {**FIELDS, "model": f"tiny:{name}"}
                answer = live.ask("/v1/chat/completions", asked, headers=headers)
                assert answer.status == (200 if name in may else 404)
                if name in may:
                    assert said(answer) == expected[name]
        body = {"lora_name": "first"}
        assert live.ask("/v1/unload_lora_adapter", body, headers=BOB).status == 403


def test_a_bare_adapter_name_needs_exactly_one_model_that_has_it(
    root: Path, tmp_path: Path, expected: dict[str | None, str]
):
    other = tmp_path / "other"
    shutil.copytree(root / "bundle", other)
    for name, source in (("only", "dir/first"), ("kept", "dir/second"), ("tiny", "dir/second")):
        add_adapter(other, root / source, name)
    meant = {
        "only": "first",
        "other:kept": "second",
        "tiny:kept": "kept",
        "tiny": None,  # a model's own name comes before an adapter's
        "other:tiny": "second",
    }
    models = {"tiny": root / "bundle", "other": other}
    with running(root / "bundle", RealEngine(), model=models) as live:
        for name, adapter in meant.items():
            assert said(live.chat(**{**FIELDS, "model": name})) == expected[adapter], name
        assert live.chat(**{**FIELDS, "model": "kept"}).status == 404
        both = live.ask("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "first"})
        assert both.status == 400, "which model it is for has to be said"


def test_where_keys_are_trusted_only_signed_adapters_answer(
    root: Path, tmp_path: Path, expected: dict[str | None, str]
):
    key, keys, bundle = make_key(), tmp_path / "trusted-keys", tmp_path / "bundle"
    keys.write_text(key.public_text)
    keys.chmod(0o644)
    shutil.copytree(root / "bundle", bundle)
    shutil.copytree(root / "dir/first", tmp_path / "dir/first")
    sign_bundle(bundle, key, "of a test")
    add_adapter(bundle, root / "kept", "kept")
    settings: dict[str, Any] = {"trusted_keys": keys, "adapter_dir": tmp_path / "dir"}
    with running(bundle, RealEngine(), **settings) as live:
        refused = load(live, "first")
        assert refused.status == 400
        assert "it is not signed" in refused.json["error"]["message"]
        answer = live.chat(**{**FIELDS, "model": "tiny:kept"})
        assert (answer.status, answer.json["error"]["code"]) == (503, "adapter_failed")
        sign(tmp_path / "dir/first", key)
        assert load(live, "first").status == 200
        assert said(live.chat(**{**FIELDS, "model": "tiny:first"})) == expected["first"]


def test_answers_keep_an_adapter_that_is_removed(
    root: Path, live: Live, expected: dict[str | None, str]
):
    """And it stays out of the server's list."""
    add_adapter(root / "bundle", root / "dir/second", "brief")
    model = {"model": "tiny:brief", **FIELDS}
    body = {**model, "stream": True, "max_tokens": 100, "ignore_eos": True}
    whole = live.ask("/v1/chat/completions", body).events
    import threading

    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.extend(live.ask("/v1/chat/completions", body).events)
    )
    asking.start()
    while not live.engine.llm.scheduler.stats().running and not found:
        pass
    remove_adapter(root / "bundle", "brief")
    asking.join()
    assert [event for event in map(delta, found) if event] == [e for e in map(delta, whole) if e]
    assert live.chat(**model).status == 404
    assert not (library(root / "bundle") / "brief").exists()


def delta(event: Any) -> Any:
    return None if isinstance(event, str) else [each["delta"] for each in event["choices"]]


def test_settings_name_keys_that_are_there(root: Path):
    with pytest.raises(ConfigError, match="key_adapters names bob, and there are no API keys"):
        ServerSettings(key_adapters={"bob": "a"})
    with (
        pytest.raises(ConfigError, match=r"key_adapters names eve, and .* has no key of that name"),
        running(
            root / "bundle", RealEngine(), api_key_file=root / "keys", key_adapters={"eve": ""}
        ),
    ):
        pass
