"""`DeepSeekModel`: where it finds a bundle, and what its tutorial names mean."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edge
from edge import DeepSeekModel, SamplingParams
from edge.errors import BundleError, ConfigError, RequestError
from tests.conftest import Bundles
from tests.edge_serve.scripted import ScriptedEngine

QUESTION = "what is the world"
CHAT = [{"role": "user", "content": QUESTION}]
NAME = "deepseek-r1-distill-qwen-1.5b-int8"


@pytest.fixture
def bundles(tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path))
    (tmp_path / NAME).symlink_to(tiny_bundles("qwen2"))
    return tmp_path


def test_the_bundle_is_found_under_the_variable(bundles: Path):
    with DeepSeekModel(version="1.5B", precision="int8", device="cpu") as model:
        assert model.bundle == bundles / NAME
        assert model.llm.backend.name == "ort-cpu"
    with DeepSeekModel() as model:
        assert model.bundle == bundles / NAME
    for version in (
        "deepseek-r1:1.5b",
        "r1-qwen-1.5b",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    ):
        DeepSeekModel(version, "INT8", device="CPU").close()


@pytest.mark.parametrize("device", ["cuda", "gpu", "GPU", "cuda:0"])
def test_every_word_for_the_gpu_asks_for_it(
    bundles: Path, monkeypatch: pytest.MonkeyPatch, device: str
):
    opened: list[str] = []
    monkeypatch.setattr("edge.runtime.deepseek.LLM", lambda _, backend: opened.append(str(backend)))
    DeepSeekModel(device=device)
    assert opened == ["ort-cuda"]


def test_the_bundle_is_found_in_the_working_directory(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "bundles").symlink_to(bundles)
    monkeypatch.delenv("EDGE_LLM_BUNDLES")
    monkeypatch.chdir(tmp_path / "here")
    DeepSeekModel().close()


@pytest.mark.parametrize(
    ("version", "precision", "name", "hub_id"),
    [
        ("7B", "int4", "deepseek-r1-distill-qwen-7b-int4", "DeepSeek-R1-Distill-Qwen-7B"),
        ("8B", "fp16", "deepseek-r1-distill-llama-8b-fp16", "DeepSeek-R1-Distill-Llama-8B"),
        ("1.5B", "int4", "deepseek-r1-distill-qwen-1.5b-int4", "DeepSeek-R1-Distill-Qwen-1.5B"),
        ("7b", "int8-w8a8", "deepseek-r1-distill-qwen-7b-int8-w8a8", "DeepSeek-R1-Distill-Qwen-7B"),
        ("8b-0528", "int8", "deepseek-r1-0528-qwen3-8b-int8", "DeepSeek-R1-0528-Qwen3-8B"),
    ],
)
def test_a_missing_bundle_comes_with_the_command_that_makes_it(
    version: str, precision: str, name: str, hub_id: str, bundles: Path
):
    command = f"edge-llm export deepseek-ai/{hub_id} -o {bundles / name} --quant {precision}"
    with pytest.raises(BundleError) as caught:
        DeepSeekModel(version, precision)
    assert str(caught.value).endswith(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": "70B"}, "unknown version '70B'; known: deepseek-r1:1.5b, "),
        (
            {"precision": "int2"},
            "unknown precision 'int2'; use one of fp16, bf16, int8, int8-w8a8, int4",
        ),
        ({"device": "tpu"}, "unknown device 'tpu'; use one of auto"),
        ({"device": "cuda:1"}, "'cuda:1'; .* of several GPUs CUDA_VISIBLE_DEVICES chooses"),
    ],
)
def test_unknown_names_list_the_known_ones(arguments: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        DeepSeekModel(**arguments)


@pytest.fixture
def model(bundles: Path) -> DeepSeekModel:
    return DeepSeekModel()


def test_max_length_counts_prompt_and_answer(model: DeepSeekModel):
    num_prompt = len(model.llm.encode(CHAT))
    with model:
        for room in (1, 2, 9):
            params = SamplingParams(temperature=0, top_k=0, max_tokens=room, ignore_eos=True)
            expected = model.llm.generate(CHAT, params)
            assert len(expected.tokens) == room
            answer = model.generate(
                QUESTION, max_length=num_prompt + room, temperature=0, top_k=0, ignore_eos=True
            )
            assert answer == as_written(expected.text, expected.reasoning)
        for max_length in (num_prompt, 1):
            message = f"{num_prompt} tokens, max_length is {max_length}"
            with pytest.raises(RequestError, match=message):
                model.generate(QUESTION, max_length=max_length)


def as_written(text: str, reasoning: str) -> str:
    """The tiny model never closes its reasoning."""
    return f"<think>\n{reasoning}" if reasoning else text


def test_a_text_is_one_user_message(model: DeepSeekModel):
    options: dict[str, Any] = {"max_length": 60, "temperature": 1.0, "top_k": 50, "seed": 4}
    with model:
        answer = model.generate(QUESTION, **options)
        assert answer == model.generate(CHAT, **options)
        assert answer != model.generate(QUESTION, **{**options, "seed": 5})


def test_wrong_parameters(model: DeepSeekModel):
    with model:
        with pytest.raises(RequestError, match="not both"):
            model.generate(QUESTION, max_length=50, max_new_tokens=5)
        with pytest.raises(RequestError, match="do_sample must be True or False, not 1"):
            model.generate(QUESTION, do_sample=1)  # type: ignore[arg-type]
        for max_length in (0, -1):
            with pytest.raises(RequestError, match=f"max_length is {max_length}"):
                model.generate(QUESTION, max_length=max_length)
        with pytest.raises(RequestError, match="temperature"):
            model.generate(QUESTION, temperature=-1)
        for name, words in (
            ("max_tokens", "max_new_tokens"),
            ("num_return_sequences", r"submit\(messages, n="),
            ("repetition_penalti", r"did you mean repetition_penalty\?"),
            ("max_lenght", r"did you mean max_length\?"),
            ("repeat_penalty", r"did you mean repetition_penalty\?"),
            ("eos_token_id", r"did you mean stop_token_ids\?"),
            ("qqq", "see edge.SamplingParams for all"),
        ):
            options: dict[str, Any] = {name: 1}
            with pytest.raises(RequestError, match=f"no option {name}: .*{words}"):
                model.generate(QUESTION, **options)
        for item in dataclasses.fields(SamplingParams):  # and no known one is refused as unknown
            if item.name not in ("max_tokens", "temperature", "top_k"):  # in the signature
                default = getattr(SamplingParams(), item.name)
                assert model.generate(QUESTION, 60, **{item.name: default})


def test_max_new_tokens_counts_the_answer(model: DeepSeekModel):
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    with model:
        num_prompt = len(model.llm.encode(CHAT))
        for number in (1, 9):
            answer = model.generate(QUESTION, max_new_tokens=number, **options)
            assert answer == model.generate(QUESTION, max_length=num_prompt + number, **options)


def test_an_answer_that_max_length_cuts_is_said_once(
    model: DeepSeekModel, caplog: pytest.LogCaptureFixture
):
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    with model:
        model.generate(QUESTION, max_new_tokens=3, **options)  # what was asked for
        model.generate(QUESTION, 10**6, temperature=0, ignore_eos=True)  # the KV cache cuts it
        assert not caplog.records
        model.generate(QUESTION, 40, **options)
        (said,) = caplog.records
        assert "max_length=40 cut the answer off" in said.getMessage()
        assert "give max_new_tokens" in said.getMessage()
        model.generate(QUESTION, 41, **options)
    assert caplog.records == [said]


def test_do_sample_draws_or_does_not(model: DeepSeekModel, monkeypatch: pytest.MonkeyPatch):
    with model:
        greedy = model.generate(QUESTION, 60, temperature=0)
        assert greedy == model.generate(QUESTION, 60, do_sample=False, seed=1)
        assert greedy == model.generate(QUESTION, 60, do_sample=False, temperature=0)
        own = model.generate(QUESTION, 60, seed=1)
        assert own == model.generate(QUESTION, 60, do_sample=True, seed=1) != greedy
        assert own != model.generate(QUESTION, 60, do_sample=True, temperature=3.0, seed=1)
        for do_sample, temperature in ((True, 0), (False, 0.7)):
            message = f"do_sample={do_sample} contradicts temperature={temperature}"
            with pytest.raises(RequestError, match=message):
                model.generate(QUESTION, do_sample=do_sample, temperature=temperature)
        drawn = model.generate(QUESTION, 60, temperature=1.0, seed=1)
        sampling = msgspec.structs.replace(model.llm.manifest.sampling, temperature=0.0)
        manifest = msgspec.structs.replace(model.llm.manifest, sampling=sampling)
        monkeypatch.setattr(model.llm, "manifest", manifest)  # a model that is greedy by itself
        assert model.generate(QUESTION, 60, seed=1) == greedy
        assert model.generate(QUESTION, 60, do_sample=True, seed=1) == drawn


def test_tutorials_import_it_from_a_module_of_its_own():
    """The installed file, which is a copy in an editable install too."""
    shim = importlib.import_module("deepseek_r1")
    assert shim.DeepSeekModel is DeepSeekModel
    source = Path(edge.__file__).with_name("deepseek_r1.py")
    assert Path(str(shim.__file__)).read_bytes() == source.read_bytes(), "pip install -e . again"


def test_reasoning_is_part_of_the_text(model: DeepSeekModel):
    with model:
        expected = model.llm.generate(CHAT, SamplingParams(temperature=0, max_tokens=4))
        assert expected.reasoning
        answer = model.generate(CHAT, len(model.llm.encode(CHAT)) + 4, temperature=0)
        assert answer == as_written(expected.text, expected.reasoning)


@pytest.mark.parametrize(
    ("written", "ends", "stop", "answer"),
    [
        ("hm</think>\n\nyes", True, (), "<think>\nhm\n</think>\n\nyes"),
        ("hm</think>", True, (), "<think>\nhm\n</think>\n\n"),
        ("hm", False, (), "<think>\nhm"),
        ("hm", True, (), "<think>\nhm"),
        ("hm. So</think>\n\nyes. Or", True, (".",), "<think>\nhm. So\n</think>\n\nyes"),
        ("</think>\n\nyes", True, (), "yes"),
    ],
)
def test_the_reasoning_is_closed_where_the_model_closed_it(
    model: DeepSeekModel, written: str, ends: bool, stop: tuple[str, ...], answer: str
):
    engine = ScriptedEngine()
    model.llm.close()
    model.llm = engine.open(model.bundle)
    with model:
        engine.say(CHAT, written, ends=ends)
        number = len(model.llm.tokenizer.encode(written, control=True)) + ends
        got = model.generate(QUESTION, max_new_tokens=number, temperature=0, stop=stop)
        assert got == answer
