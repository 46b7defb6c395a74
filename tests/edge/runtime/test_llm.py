"""`LLM`: text around the loop of ids, once with a scripted engine and once with the real one."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import numpy as np
import pytest

import edge.runtime.drafts
import edge.runtime.llm
from edge import LLM, GenerationChunk, SamplingParams
from edge.backends.ort import cpu as ort
from edge.backends.step import all_tokens, prefill
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError, ContextLengthError, OverloadError, RequestError
from edge.runtime.drafts import NgramDrafter
from edge.runtime.llm import Prompt
from edge.runtime.scheduler.drafter import DraftContext
from edge.runtime.stream import OutputStream
from edge.runtime.structured_output import OutputFormat
from tests.conftest import TINY_KV_CAPACITY, Bundles
from tests.edge.text.test_tokenizer import added, sentencepiece
from tests.makers.manifests import replace_file
from tests.makers.tiny_models import BOS_ID, CHAT_TEMPLATE, CONTROL_IDS, EOS_ID
from tests.standins.scripted_backend import ScriptedBackend, random_logits

QUESTION = [{"role": "user", "content": "what"}]
GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.0, top_p=1.0, seed=5, max_tokens=40)


class Scripted:
    """An LLM whose engine says what a test tells it to."""

    backend: ScriptedBackend

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        def open_backend(bundle: Path, _manifest: Any, **given: Any) -> ScriptedBackend:
            table = EmbeddingTable(bundle / "embeddings.safetensors")
            self.backend = ScriptedBackend(
                table,
                random_logits(table.vocab_size),
                capacity=given["kv_capacity"] or TINY_KV_CAPACITY,
                max_step_tokens=given["max_step_tokens"],
                num_slots=given["num_slots"],
            )
            table.close()
            return self.backend

        monkeypatch.setattr(ort, "OrtBackend", open_backend)
        self.llm = LLM(bundle, **options)

    def say(self, prompt: Prompt, answer: str, **options: Any) -> None:
        """Answer ``prompt`` with this text and the end token; control tokens act."""
        start = len(self.llm.encode(prompt, **options))
        ids = [*self.llm.tokenizer.encode(answer, control=True), EOS_ID]
        # A draft may run past the end.
        self.backend.script = lambda seen: ids[min(len(seen) - start, len(ids) - 1)]


@pytest.fixture
def scripted(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    scripted = Scripted(tiny_bundles("qwen2"), monkeypatch)
    yield scripted
    scripted.llm.close()


@pytest.fixture
def llm(tiny_bundles: Bundles) -> Iterator[LLM]:
    with LLM(tiny_bundles("qwen2"), num_threads=1, prefill_chunk=16) as opened:
        yield opened


def joined(chunks: list[GenerationChunk]) -> tuple[str, str]:
    return "".join(c.text for c in chunks), "".join(c.reasoning for c in chunks)


# Text


def test_a_chat_answer_is_split_into_reasoning_and_answer(scripted: Scripted):
    answer = "Let me see.\n</think>\n\nHéllo 🙂 <b>"
    scripted.say(QUESTION, answer)
    result = scripted.llm.generate(QUESTION, GREEDY)
    assert (result.reasoning, result.text) == ("Let me see.", "Héllo 🙂 <b>")
    assert result.finish_reason == "stop"
    ids = [token.id for token in result.tokens]
    assert ids == scripted.llm.tokenizer.encode(answer, control=True)  # without the end token
    assert result.stats.completion_tokens == len(ids) + 1
    assert result.stats.prompt_tokens == len(scripted.llm.encode(QUESTION))


def test_an_answer_continues_where_it_broke_off(scripted: Scripted):
    reasoning, text = "Let me see.\n\nYes.", " Héllo 🙂\n\nso"
    for reasoned, said in [(4, 0), (12, 0), (len(reasoning), 0), (len(reasoning), 3), (0, 7)]:
        begun = {"role": "assistant", "content": text[:said], "reasoning": reasoning[:reasoned]}
        messages = [*QUESTION, begun]
        rest = text[said:]
        if not said:
            rest = f"{reasoning[reasoned:]}\n</think>\n\n{text}"
        scripted.say(messages, rest, continue_final_message=True)
        prompt = scripted.llm.encode(messages, continue_final_message=True)
        result = scripted.llm.generate(messages, GREEDY, continue_final_message=True)
        assert result.text == text[said:]
        assert result.reasoning == ("" if said else reasoning[reasoned:])
        assert result.stats.prompt_tokens == len(prompt)
        # A budget counts what was reasoned before.
        given: dict[str, Any] = {"continue_final_message": True}
        used = len(scripted.llm.tokenizer.encode(reasoning[:reasoned]))
        enough = scripted.llm.generate(messages, GREEDY, thinking_budget=100, **given)
        assert (enough.text, enough.reasoning) == (result.text, result.reasoning)
        if not said:
            params = replace(GREEDY, max_tokens=20)
            spent = scripted.llm.generate(messages, params, thinking_budget=used, **given)
            assert spent.reasoning == ""
    messages = [*QUESTION, {"role": "assistant", "content": "<think>so"}]
    with pytest.raises(RequestError, match="thinking: is off"):
        scripted.llm.generate(messages, GREEDY, continue_final_message=True, thinking=False)
    for content, text in [("</think>", "Yes"), ("<think>\n", "so</think>Yes")]:
        messages = [*QUESTION, {"role": "assistant", "content": content}]
        scripted.say(messages, text, continue_final_message=True)
        result = scripted.llm.generate(messages, GREEDY, continue_final_message=True)
        assert (result.reasoning, result.text) == (text[:-3].removesuffix("</think>"), "Yes")
    others: list[Any] = ["what", [1, 2]]
    for other in others:
        with pytest.raises(RequestError, match="continue_final_message belong to chat"):
            scripted.llm.generate(other, GREEDY, continue_final_message=True)


def test_what_was_begun_is_part_of_the_form(scripted: Scripted):
    pytest.importorskip("llguidance")
    from edge.runtime.structured_output import OutputFormat

    params = SamplingParams(temperature=1.0, top_p=1.0, seed=3, max_tokens=100)
    form = OutputFormat("regex", "ab[0-9]{3}x")
    for begun in ("", "a", "ab", "ab12", "ab123x"):
        messages = [*QUESTION, {"role": "assistant", "content": begun}]
        result = scripted.llm.generate(
            messages, params, output=form, continue_final_message=True, thinking_budget=3
        )
        assert re.fullmatch("ab[0-9]{3}x", begun + result.text)
        assert result.finish_reason == "stop"
        assert not (begun and result.reasoning)
    messages = [*QUESTION, {"role": "assistant", "content": "abc"}]
    with pytest.raises(RequestError, match="breaks the regular expression"):
        scripted.llm.generate(messages, params, output=form, continue_final_message=True)


def test_a_form_counts_the_space_that_sentencepiece_begins_with(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("llguidance")
    from edge.runtime.structured_output import OutputFormat

    bundle = shutil.copytree(tiny_bundles("qwen2"), tmp_path / "spaced")
    file = json.loads(sentencepiece())
    file["model"]["vocab"] |= CONTROL_IDS
    file["added_tokens"] += [added(id_, token) for token, id_ in CONTROL_IDS.items()]
    replace_file(bundle, "tokenizer.json", json.dumps(file).encode())
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=3, max_tokens=100)
    with Scripted(bundle, monkeypatch).llm as llm:
        for pattern in (" a b", "a b"):
            for begun in ("", pattern[:1], pattern[:2]):
                messages = [*QUESTION, {"role": "assistant", "content": begun}]
                given: Any = {"output": OutputFormat("regex", pattern), "thinking_budget": 0}
                result = llm.generate(messages, params, continue_final_message=True, **given)
                assert begun + result.text == pattern


def test_the_stream_is_the_answer_in_whole_characters(scripted: Scripted):
    scripted.say(QUESTION, "thinking…</think>\n\n🙂🙂 the end")
    chunks = list(scripted.llm.stream(QUESTION, GREEDY))
    result = scripted.llm.generate(QUESTION, GREEDY)
    assert joined(chunks) == (result.text, result.reasoning) == ("🙂🙂 the end", "thinking…")
    assert tuple(token for chunk in chunks for token in chunk.tokens) == result.tokens
    assert not any("�" in chunk.text + chunk.reasoning for chunk in chunks)
    *before, last = chunks
    assert all(chunk.finish_reason is None and chunk.stats is None for chunk in before)
    assert last.finish_reason == "stop"
    assert last.stats is not None
    assert last.tokens == ()  # the end token is no part of the answer


def test_a_gap_is_filled_until_its_end(code_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    scripted = Scripted(code_bundle, monkeypatch)
    with scripted.llm as llm:
        encode, marks = llm.tokenizer.encode, llm.tokenizer.control_tokens
        prompt = llm.encode("hello(", suffix=")")
        assert prompt == [
            BOS_ID, marks["<|fim_prefix|>"], *encode("hello("),
            marks["<|fim_suffix|>"], *encode(")"), marks["<|fim_middle|>"],
        ]  # fmt: skip
        for end in ("<|file_sep|>", "<|fim_prefix|>"):
            scripted.say("hello(", f" the world{end}junk", suffix=")")
            result = llm.generate("hello(", GREEDY, suffix=")")
            assert (result.text, result.finish_reason) == (" the world", "stop")
            on = llm.generate("hello(", replace(GREEDY, ignore_eos=True, max_tokens=8), suffix=")")
            assert on.text.startswith(f" the world{end}junk")
            # The very ids, without a gap: only the model's own end counts.
            assert f"{end}junk" in llm.generate(prompt, GREEDY).text
        for prefix, suffix in (("", "x"), ("x", ""), ("", "")):
            assert len(llm.encode(prefix, suffix=suffix)) == 4 + len(prefix + suffix)
            llm.generate(prefix, GREEDY, suffix=suffix)


def test_a_suffix_needs_a_plain_text_and_a_model_for_it(llm: LLM, code_bundle: Path):
    for prompt in (QUESTION, [1, 2]):
        with pytest.raises(RequestError, match="suffix: belongs to a plain text"):
            llm.generate(prompt, GREEDY, suffix="x")
    with pytest.raises(RequestError, match="suffix: this model has no tokens"):
        llm.generate("x", GREEDY, suffix="")
    with LLM(code_bundle, num_threads=1) as coder:
        for texts in (("x y " * 200, ""), ("", "x y " * 200)):
            with pytest.raises(ContextLengthError):
                coder.generate(texts[0], GREEDY, suffix=texts[1])
        free = coder.generate("hello", GREEDY, suffix=" the world")
        assert free.text != coder.generate("hello", GREEDY, suffix=" worlds").text


def test_plain_text_comes_back_as_the_model_wrote_it(scripted: Scripted):
    answer = "<think>\nhm\n</think>\n\n42"
    ids = scripted.llm.encode("what")
    prompts: list[Any] = ["what", ids, tuple(ids), np.array(ids)]
    for prompt in prompts:
        scripted.say(prompt, answer)
        result = scripted.llm.generate(prompt, GREEDY)
        assert (result.text, result.reasoning) == (answer, "")


def test_an_answer_that_continues_a_text_keeps_its_first_space(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
):
    """A sentencepiece vocabulary drops it where a text begins, as in a chat."""
    monkeypatch.setattr(scripted.llm.tokenizer, "_strips_space", True)
    scripted.say("hello", " the world")
    assert scripted.llm.generate("hello", GREEDY).text == " the world"
    scripted.say(QUESTION, " the world</think>yes")
    assert scripted.llm.generate(QUESTION, GREEDY).reasoning == "the world"


def test_how_a_prompt_is_encoded(scripted: Scripted):
    llm = scripted.llm
    plain = llm.tokenizer.encode("hi<think>")
    assert llm.encode("hi<think>") == [BOS_ID, *plain]
    assert CONTROL_IDS["<think>"] not in plain
    assert llm.encode([5, 6]) == [5, 6]
    chat = llm.encode(QUESTION)
    assert chat[:2] == [BOS_ID, CONTROL_IDS["<｜User｜>"]]
    assert chat[-2:] == [CONTROL_IDS["<think>"], *llm.tokenizer.encode("\n")]
    empty: list[Prompt] = [[], [{"role": "user"}], [{"role": "owner", "content": "x"}]]
    for prompt in empty:
        with pytest.raises(RequestError):
            llm.encode(prompt)
    for wrong in (5, None, b"hi", {"role": "user", "content": "hi"}):
        with pytest.raises(RequestError, match=f"not {type(wrong).__name__}"):
            llm.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="params must be SamplingParams, not dict"):
        llm.generate("hi", {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="output must be an OutputFormat"):
        llm.submit("hi", output={"type": "json_object"})  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("answer", "stop", "text", "reason"),
    [
        ("one STOP two", ("STOP",), "one ", "stop"),
        ("one STO two", ("STOP",), "one STO two", "stop"),
        ("one STO", ("STOP",), "one STO", "stop"),  # held back, then given out
        ("one STOP two", ("two", "one STOP"), "", "stop"),
        ("🙂🙃", ("🙃",), "🙂", "stop"),
        ("hello world", ("o w",), "hell", "stop"),  # in the middle of two tokens
    ],
)
def test_stop_strings(
    scripted: Scripted, answer: str, stop: tuple[str, ...], text: str, reason: str
):
    scripted.say("what", answer)
    params = SamplingParams(temperature=0, stop=stop)
    result = scripted.llm.generate("what", params)
    assert (result.text, result.finish_reason) == (text, reason)
    assert joined(list(scripted.llm.stream("what", params))) == (text, "")


def test_a_stop_string_ends_the_generation_too(scripted: Scripted):
    scripted.say("what", "one STOP " + "x" * 60)
    result = scripted.llm.generate("what", SamplingParams(temperature=0, stop=("STOP",)))
    assert scripted.llm.tokenizer.decode([t.id for t in result.tokens]) == "one STOP"
    assert len(scripted.backend.steps) == len(result.tokens)


def test_an_answer_cut_off(scripted: Scripted):
    """Inside a character, which four tokens make here."""
    scripted.say("what", "ab🙂")
    for max_tokens, text in ((1, "a"), (2, "ab"), (4, "ab�"), (6, "ab🙂")):
        result = scripted.llm.generate("what", SamplingParams(temperature=0, max_tokens=max_tokens))
        assert (result.text, result.finish_reason) == (text, "length")
        assert len(result.tokens) == result.stats.completion_tokens == max_tokens
    assert (
        scripted.llm.generate("what", SamplingParams(temperature=0, max_tokens=7)).finish_reason
        == "stop"
    )


def test_a_full_cache_ends_the_answer(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch):
    """The scripted engine asserts that no step passes the capacity."""
    scripted = Scripted(tiny_bundles("qwen2"), monkeypatch, kv_capacity=16)
    prompt = scripted.llm.encode("hello")
    scripted.say(prompt, "x" * 60)
    result = scripted.llm.generate(prompt, GREEDY)
    assert result.finish_reason == "length"
    assert len(prompt) + len(result.tokens) == 16 + 1
    assert scripted.llm.cached_tokens == scripted.llm.kv_capacity == 16
    with pytest.raises(ContextLengthError):
        scripted.llm.generate("x" * 40)
    scripted.llm.close()


def test_end_tokens(scripted: Scripted):
    scripted.say("what", "ab")
    ids = scripted.llm.tokenizer.encode("ab")
    stopped = scripted.llm.generate("what", SamplingParams(temperature=0, stop_token_ids=(ids[1],)))
    assert (stopped.text, stopped.finish_reason) == ("a", "stop")
    ignored = SamplingParams(temperature=0, ignore_eos=True, max_tokens=3)
    assert [t.id for t in scripted.llm.generate("what", ignored).tokens] == [*ids, EOS_ID]
    assert list(scripted.llm.generate_ids(scripted.llm.encode("what"), GREEDY)) == ids


def test_what_is_left_open_comes_from_the_bundle(scripted: Scripted):
    def tokens(params: SamplingParams | None) -> list[int]:
        return [token.id for token in scripted.llm.generate("what", params).tokens]

    found = tokens(SamplingParams(seed=3, max_tokens=50))
    assert found == tokens(SamplingParams(seed=3, max_tokens=50, temperature=0.6, top_p=0.95))
    assert found != tokens(SamplingParams(seed=3, max_tokens=50, temperature=1.5, top_p=1.0))


def test_log_probabilities_come_with_the_tokens(scripted: Scripted):
    result = scripted.llm.generate("what", SamplingParams(max_tokens=3, logprobs=2, seed=0))
    assert all(t.logprob is not None and len(t.top_logprobs or ()) == 2 for t in result.tokens)


@pytest.mark.parametrize("ids", ["2024", b"12", [1, 2.9, 3], [1, "2", 3]])
def test_only_lists_of_ids_count_as_ids(scripted: Scripted, ids: Any):
    llm = scripted.llm
    for ask in (llm.score, llm.generate_ids) + (() if isinstance(ids, str) else (llm.encode,)):
        with pytest.raises(RequestError):
            ask(ids)
    numbers: Any = np.array([1, 2, 3])
    assert len(llm.score(numbers)) == 2
    each: Any = iter([1, 2, 3])
    assert len(llm.score(each)) == 2


def test_sampling_beside_the_prompt_is_refused_with_its_place(scripted: Scripted):
    llm = scripted.llm
    asks: list[Any] = [llm.submit, llm.generate, llm.stream, llm.generate_best]
    for ask in asks:
        options: dict[str, Any] = {"best_of": 1} if ask == llm.generate_best else {}
        for name, instead in (
            ("max_tokens", r"max_tokens: did you mean SamplingParams\(max_tokens=\.\.\.\), after"),
            ("max_new_tokens", r"max_new_tokens: did you mean SamplingParams\(max_tokens="),
            ("repeat_penalty", r"\(repetition_penalty=\.\.\.\)"),
            ("temprature", r"\(temperature=\.\.\.\)"),
            ("min_tokens", "no option min_tokens: take ignore_eos, which goes on to max_tokens$"),
            ("length_penalty", "no option length_penalty: answers are sampled, without beams$"),
            ("num_ctx", r"no option num_ctx: --kv-capacity, LLM\(kv_capacity=\.\.\.\), sets it"),
            ("max_time", r"no option max_time: did you mean deadline_s\?$"),
            ("num_return_sequences", "_sequences: n of LLM.submit is how many answers there are$"),
            ("thinkin", "no option thinkin: did you mean thinking?"),
            ("do_sample", "no option do_sample: temperature 0 takes the likeliest token"),
            ("qqq", "no option qqq: there are priority, client, "),
        ):
            with pytest.raises(RequestError, match=instead):
                ask("what", **{name: 3}, **options)
    wrong: Any
    for wrong in ("2", True, 2.0, np.int64(0)):
        with pytest.raises(RequestError, match="n must be an integer of at least 1, not "):
            llm.submit("what", n=wrong)
    two: Any = np.int64(2)
    assert len([generation.result() for generation in llm.submit("what", n=two)]) == 2


def test_generate_ids_refuses_stop_strings(scripted: Scripted):
    with pytest.raises(RequestError, match="stop_token_ids"):
        next(iter(scripted.llm.generate_ids([1], SamplingParams(stop=("x",)))))


# Many at a time


def test_answers_that_run_together_are_those_of_each_alone(scripted: Scripted):
    llm = scripted.llm
    params = [replace(SEEDED, seed=seed, max_tokens=12) for seed in range(6)]
    expected = [llm.generate("what", each).tokens for each in params]
    generations = [llm.submit("what", each) for each in params]
    results = [generation.result() for generation in reversed(generations)]
    assert [result.tokens for result in reversed(results)] == expected
    assert max(map(len, scripted.backend.batches)) == 4  # slots


@pytest.mark.parametrize("num_read", [0, 1, 9])
@pytest.mark.parametrize("form", [None, "json_object"])
def test_an_answer_suspended_resumes_in_another_process(
    tiny_bundles: Bundles, num_read: int, form: Literal["json_object"] | None
):
    """With reasoning that its budget ends, then a form, and penalties that count what was said."""
    asked: dict[str, Any] = {"thinking_budget": 6}
    if form is not None:
        pytest.importorskip("llguidance")
        asked["output"] = OutputFormat(form)
    params = replace(SEEDED, presence_penalty=1.0, frequency_penalty=0.5)
    with LLM(tiny_bundles("qwen2"), reuse_prefix=False) as first:
        whole = first.submit(QUESTION, params, **asked)
        wanted = whole.result()
        backend: Any = first.backend
        forward = backend.forward

        def slow(step: Any) -> Any:  # it must not end sooner
            time.sleep(0.02)
            return forward(step)

        backend.forward = slow
        generation = first.submit(QUESTION, params, **asked)
        seen = [chunk for _, chunk in zip(range(num_read), generation, strict=False)]
        (state,) = first.suspend([generation], 10)
        rest = list(generation)
        assert state is not None
        assert rest[-1].finish_reason == "cancelled"
        had = tuple(token.id for chunk in [*seen, *rest] for token in chunk.tokens)
        assert state.answer == had
        assert first.suspend([generation], 10) == [None]
    with LLM(tiny_bundles("qwen2"), reuse_prefix=False) as second:
        with pytest.raises(RequestError, match="n must be 1"):
            second.submit(QUESTION, params, **asked, n=2, resumed=state)
        resumed = second.submit(QUESTION, params, **asked, resumed=state)
        result = resumed.result()
    assert (result.text, result.reasoning) == (wanted.text, wanted.reasoning)
    assert result.tokens == wanted.tokens
    assert result.stats.completion_tokens == wanted.stats.completion_tokens
    assert result.stats.prompt_tokens == wanted.stats.prompt_tokens >= result.stats.cached_tokens


def test_samples_of_a_prompt_have_seeds_in_a_row(scripted: Scripted):
    llm = scripted.llm
    generations = llm.submit(QUESTION, SEEDED, n=3)
    assert [generation.index for generation in generations] == [0, 1, 2]
    assert [generation.seed for generation in generations] == [5, 6, 7]
    assert generations[0].prompt_ids == llm.encode(QUESTION)
    for i, generation in enumerate(generations):
        alone = llm.generate(QUESTION, replace(SEEDED, seed=5 + i))
        assert generation.result().tokens == alone.tokens
    with pytest.raises(RequestError, match="n must be"):
        llm.submit(QUESTION, n=0)
    with pytest.raises(RequestError, match="1000000000 answers at once are more than the"):
        llm.submit(QUESTION, n=10**9)  # before anything is made for each
    with pytest.raises(RequestError, match="read to its end before"):
        generations[0].result()
    with pytest.raises(RequestError, match="submit gives n"):
        llm.stream(QUESTION, n=2)  # type: ignore[call-arg]
    (only,) = llm.submit(QUESTION, SEEDED, n=1)  # a list, as of any number that is given
    assert only.result().tokens == llm.submit(QUESTION, SEEDED).result().tokens


def test_the_best_answers_are_the_most_probable(scripted: Scripted):
    llm = scripted.llm
    params = replace(SEEDED, max_tokens=6)
    every = [llm.generate("what", replace(params, seed=5 + i, logprobs=0)) for i in range(5)]

    def mean(result: Any) -> float:
        return float(sum(token.logprob for token in result.tokens)) / len(result.tokens)

    expected = sorted(every, key=mean, reverse=True)[:2]
    found = llm.generate_best("what", params, best_of=5, n=2)
    assert [result.tokens for result in found] == [result.tokens for result in expected]
    by_sum = llm.generate_best("what", params, best_of=5, rank_by="sum")
    totals = [sum(token.logprob or 0 for token in result.tokens) for result in every]
    assert sum(token.logprob or 0 for token in by_sum[0].tokens) == max(totals)
    with pytest.raises(RequestError, match="best_of"):
        llm.generate_best("what", best_of=1, n=2)


@pytest.mark.parametrize("rank_by", ["mean", "sum"])
def test_an_answer_without_a_token_ranks_last(scripted: Scripted, rank_by: Literal["mean", "sum"]):
    llm = scripted.llm
    params = replace(SEEDED, max_tokens=6)
    first = llm.generate("what", params).tokens[0].id
    params = replace(params, stop_token_ids=(first,))
    found = llm.generate_best("what", params, best_of=4, n=4, rank_by=rank_by)
    empty = [not result.tokens for result in found]
    assert set(empty) == {False, True}
    assert empty == sorted(empty)


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm, params: llm.generate("what", params),
        lambda llm, params: llm.generate_best("what", params, best_of=3),
        lambda llm, params: list(llm.generate_ids([1], params)),
    ],
)
def test_an_interrupt_ends_the_answers(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, ask: Callable[[LLM, SamplingParams], Any]
) -> None:
    """Also where somebody keeps the exception, as a shell does."""
    llm = scripted.llm
    with monkeypatch.context() as patch:
        patch.setattr(OutputStream, "get", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as kept:
            ask(llm, SamplingParams(ignore_eos=True, max_tokens=200))
    stats = llm.scheduler.stats()
    deadline = time.monotonic() + 10
    while stats.running or stats.waiting:
        assert time.monotonic() < deadline
        stats = llm.scheduler.stats()
    assert set(stats.outcomes) == {"cancelled"}
    assert kept.value is not None


def test_answers_for_asyncio(scripted: Scripted):
    llm = scripted.llm
    params = replace(SEEDED, max_tokens=9)
    expected = llm.generate(QUESTION, params)

    async def read(index: int) -> list[GenerationChunk]:
        generation = llm.submit(QUESTION, params)
        chunks = []
        async for chunk in generation:
            chunks.append(chunk)
            if index == 2 and len(chunks) == 3:
                generation.cancel()
        return chunks

    async def read_all() -> list[list[GenerationChunk]]:
        return await asyncio.gather(*(read(i) for i in range(8)))

    every = asyncio.run(read_all())
    for index, chunks in enumerate(every):
        if index != 2:
            assert joined(chunks) == (expected.text, expected.reasoning)
    assert every[2][-1].finish_reason in ("cancelled", "length")


def test_scores_come_between_the_answers(scripted: Scripted):
    """And what the scoring wrote into the cache is no prefix of anything."""
    llm = scripted.llm
    expected = llm.generate("what", SEEDED).tokens
    stream = llm.stream("what", SEEDED)
    next(stream)
    ids = [*llm.encode("what"), 5, 6, 7, 8, 9, 10]
    scores: list[Any] = []
    thread = threading.Thread(target=lambda: scores.append(llm.score(ids)))
    thread.start()
    rest = list(stream)
    thread.join()
    assert scores[0].shape == (len(ids) - 1,)
    assert llm.generate("what", SEEDED).tokens == expected
    assert rest[-1].finish_reason in ("stop", "length")
    with pytest.raises(RequestError):
        llm.score([1])


def test_a_score_is_never_nan(scripted: Scripted):
    """And the engine goes on: it is the bundle's arithmetic that failed, not the process."""
    llm, script = scripted.llm, scripted.backend.script
    nan = np.full(llm.manifest.model.vocab_size, np.nan, np.float32)
    scripted.backend.script = lambda seen: nan if len(seen) == 3 else script(seen)
    with pytest.raises(BackendError, match="NaN or infinite"):
        llm.score([5, 6, 7, 8])
    assert np.isfinite(llm.score([5, 6, 7])).all()


def test_a_full_queue_refuses(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch):
    scripted = Scripted(tiny_bundles("qwen2"), monkeypatch, num_slots=1, queue_capacity=1)
    llm = scripted.llm
    gate = threading.Event()
    script = scripted.backend.script
    scripted.backend.script = lambda seen: (gate.wait(), script(seen))[1]
    running, waiting = llm.submit("what", SEEDED), llm.submit("what", SEEDED)
    with pytest.raises(OverloadError, match="try again") as caught:
        llm.submit("what", SEEDED)
    assert caught.value.retry_after_s > 0
    with pytest.raises(OverloadError):
        llm.generate("what", SEEDED)
    gate.set()
    assert running.result().tokens == waiting.result().tokens
    for _ in range(20):  # a place is free as soon as an answer has ended
        assert [llm.submit("what", SEEDED) for _ in range(2)][1].result().tokens
    assert llm.scheduler.stats().outcomes["rejected"] == 2
    llm.close()


def test_output_keeps_its_form_and_reasoning_its_budget(scripted: Scripted):
    pytest.importorskip("llguidance")
    from edge.runtime.structured_output import OutputFormat

    llm = scripted.llm
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=3, max_tokens=100)
    digits = OutputFormat("regex", "[0-9]{3}x")
    plain = llm.generate("what", params, output=digits)
    assert re.fullmatch("[0-9]{3}x", plain.text)
    assert plain.finish_reason == "stop"
    chat = llm.generate(QUESTION, params, output=digits, thinking_budget=5)
    assert re.fullmatch("[0-9]{3}x", chat.text)
    reasoning = [*llm.tokenizer.encode(chat.reasoning)]
    assert 0 < len(reasoning) <= 12  # of five tokens, some are half a character
    direct = llm.generate(QUESTION, params, output=digits, thinking=False)
    assert re.fullmatch("[0-9]{3}x", direct.text)
    assert direct.reasoning == ""
    with pytest.raises(RequestError, match="thinking budget"):
        llm.generate("what", params, thinking_budget=5)
    with pytest.raises(RequestError, match="thinking budget"):
        llm.generate(QUESTION, params, thinking=False, thinking_budget=5)
    with pytest.raises(RequestError, match="ignore_eos"):
        llm.generate("what", replace(params, ignore_eos=True), output=digits)
    with pytest.raises(RequestError, match="plain text or ids"):
        llm.generate("what", params, thinking=False)


def test_a_reasoning_that_only_the_model_opens_is_turned_off_too(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first templates of the R1 distills end with the assistant's mark."""
    bundle = Path(shutil.copytree(tiny_bundles("qwen2"), tmp_path / "copy"))
    replace_file(bundle, "chat_template.jinja", CHAT_TEMPLATE.replace("<think>\\n", "").encode())
    scripted = Scripted(bundle, monkeypatch)
    with scripted.llm as llm:
        encode, start = llm.tokenizer.encode, len(llm.encode(QUESTION))
        (opening,), (thought, *_) = encode("<think>", control=True), encode("hm")
        closing = [*encode("</think>", control=True), *encode("\n\n")]
        answer = [*encode("yes"), EOS_ID]

        def script(seen: tuple[int, ...]) -> int:
            said = list(seen[start:])
            if said[1 : 1 + len(closing)] == closing:
                return answer[len(said) - 1 - len(closing)]
            return thought if said else opening

        scripted.backend.script = script
        on = llm.generate(QUESTION, replace(GREEDY, max_tokens=9))
        assert on.reasoning
        assert not on.text
        off = llm.generate(QUESTION, GREEDY, thinking=False)
        assert (off.reasoning, off.text, off.finish_reason) == ("", "yes", "stop")


def test_a_reasoning_that_the_template_opens_is_closed_in_the_tokens_of_its_text(
    tiny_bundles: Bundles, tmp_path: Path
):
    """Qwen's tokenizer has one token for the two line breaks between the tags."""
    bundle = Path(shutil.copytree(tiny_bundles("qwen2"), tmp_path / "copy"))
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    vocab["ĊĊ"] = vocab.pop("".join(merges[-1]))
    merges[-1] = ["Ċ", "Ċ"]
    replace_file(bundle, "tokenizer.json", json.dumps(tokenizer).encode())
    closed = [*QUESTION, {"role": "assistant", "content": "</think>"}]
    started = [*QUESTION, {"role": "assistant", "content": ""}]
    with LLM(bundle, num_threads=1) as llm:
        ids = llm.encode(QUESTION, thinking=False)
        text = llm.tokenizer.decode(ids)
        assert text.endswith("<think>\n\n</think>\n\n")
        assert ids == llm.tokenizer.encode(text, control=True)
        assert ids == llm.encode(closed, continue_final_message=True)
        assert ids == llm.encode(started, continue_final_message=True, thinking=False)


def test_speculation_leaves_the_answer_as_it_is(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    limits: list[int] = []

    class Asked(NgramDrafter):
        def offer(self, context: DraftContext) -> int:
            limits.append(context.limit)
            return super().offer(context)

    monkeypatch.setattr(edge.runtime.drafts, "NgramDrafter", Asked)
    for speculative in (0, 1, 4):
        limits.clear()
        scripted = Scripted(tiny_bundles("qwen2"), monkeypatch, speculative=speculative)
        scripted.say("what", "ab" * 30)
        assert scripted.llm.generate("what", GREEDY).text == "ab" * 30
        assert max(limits, default=0) == speculative  # as many as were asked for, not more
        scripted.llm.close()


def test_the_target_is_in_milliseconds(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch):
    for given, seconds in ((None, None), (40, 0.04)):
        scripted = Scripted(tiny_bundles("qwen2"), monkeypatch, target_itl_ms=given)
        assert scripted.llm.scheduler._core.policy.target_itl_s == seconds
        scripted.llm.close()


def test_streams_that_end_in_any_way_free_the_engine(scripted: Scripted):
    llm = scripted.llm
    params = SamplingParams(temperature=0, max_tokens=5)
    expected = llm.generate("what", params).text
    closed = llm.stream("what", params)
    next(closed)
    closed.close()
    assert llm.generate("what", params).text == expected
    next(llm.stream("what", params))  # dropped
    gc.collect()
    assert llm.generate("what", params).text == expected
    kept = llm.stream("what", params)
    for chunk in kept:
        if chunk.finish_reason is not None:  # not exhausted: nobody has asked for more
            assert llm.generate("what", params).text == expected
    unused = llm.stream("what", params)
    assert llm.generate("what", params).text == expected
    assert joined(list(unused))[0] == expected


@pytest.mark.parametrize("reuse", [False, True])
def test_a_request_that_fails_leaves_the_next_one_working(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch, reuse: bool
):
    scripted = Scripted(tiny_bundles("qwen2"), monkeypatch, reuse_prefix=reuse)
    params = SamplingParams(temperature=0, max_tokens=6)
    expected = scripted.llm.generate("what", params).tokens
    script, start = scripted.backend.script, len(scripted.llm.encode("what"))
    for pieces in range(3):
        stream = scripted.llm.stream("what", params)

        def fail_after(seen: tuple[int, ...], length: int = start + pieces) -> Any:
            scripted.backend.fails = len(seen) == length
            return script(seen)

        scripted.backend.fails = not pieces
        scripted.backend.script = fail_after if pieces else script
        found: list[GenerationChunk] = []
        with pytest.raises(BackendError, match="told to"):
            found.extend(stream)
        scripted.backend.script = script
        assert scripted.llm.scheduler.stats().kv_used_tokens == 0
        with pytest.raises(RequestError, match="token id 1000000"):
            scripted.llm.generate([10**6], params)
        assert scripted.llm.generate("what", params).tokens == expected
    scripted.llm.close()


def test_closing(scripted: Scripted):
    llm = scripted.llm
    stream = llm.stream("what", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    *_, last = stream
    assert last.finish_reason == "cancelled"
    with pytest.raises(BackendError, match="closed"):
        list(llm.stream("what"))
    for attempt in (lambda: llm.generate("what"), lambda: llm.score([1, 2])):
        with pytest.raises(BackendError, match="closed"):
            attempt()
    with llm:
        pass


# The real engine


def test_a_seed_makes_an_answer_reproducible(llm: LLM):
    first = llm.generate(QUESTION, SEEDED)
    assert llm.generate(QUESTION, SEEDED).tokens == first.tokens
    streamed = list(llm.stream(QUESTION, SEEDED))
    assert joined(streamed) == (first.text, first.reasoning)
    ids = [token.id for token in first.tokens]
    assert list(llm.generate_ids(llm.encode(QUESTION), SEEDED)) == ids
    other = replace(SEEDED, seed=6)
    assert llm.generate(QUESTION, other).tokens != first.tokens
    assert first.finish_reason == ("length" if len(ids) == 40 else "stop")


def test_the_real_engine_gives_each_answer_as_if_it_ran_alone(tiny_bundles: Bundles):
    """Batched, behind gaps of free slots, with prefixes of others, and with drafts."""
    bundle = tiny_bundles("llama")
    texts = ["hello world", "hello there", "what", "hello world and then", "what is", "a"]
    params = [replace(SEEDED, seed=i, max_tokens=8 + 5 * i) for i in range(len(texts))]
    with LLM(bundle, num_threads=1, num_slots=1, reuse_prefix=False) as llm:
        pairs = list(zip(texts, params, strict=True))
        expected = [llm.generate(text, each).tokens for text, each in pairs]
    for speculative in (0, 4):
        with LLM(
            bundle, num_threads=1, prefill_chunk=4, num_slots=4, speculative=speculative
        ) as llm:
            for _ in range(2):
                generations = [llm.submit(text, each) for text, each in pairs]
                found = [generation.result().tokens for generation in generations]
                assert found == expected
            assert llm.scheduler.stats().cached_tokens > 0


def test_a_full_slot_slides(tiny_bundles: Bundles):
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=3 * TINY_KV_CAPACITY)
    with LLM(tiny_bundles("llama"), num_threads=1, overflow="slide") as llm:
        result = llm.generate("hello", params)
        assert len(result.tokens) == 3 * TINY_KV_CAPACITY
        assert result.finish_reason == "length"
        assert result.stats.context_left is None  # max_tokens ended it, and no slot's end
        assert llm.cached_tokens == 0  # rows that were turned are no prefix of anything


def test_reuse_of_a_prefix_gives_the_same_conversation(tiny_bundles: Bundles):
    bundle = tiny_bundles("llama")
    params = SamplingParams(temperature=0, max_tokens=12)
    options: dict[str, Any] = {"num_threads": 1, "prefill_chunk": 8}
    with LLM(bundle, reuse_prefix=False, **options) as plain, LLM(bundle, **options) as reusing:
        messages: list[dict[str, str]] = []
        cached = []
        for text in ("hello", "what is the world", "and then"):
            messages.append({"role": "user", "content": text})
            expected, found = plain.generate(messages, params), reusing.generate(messages, params)
            assert [t.id for t in found.tokens] == [t.id for t in expected.tokens]
            assert expected.stats.cached_tokens == 0
            cached.append(found.stats.cached_tokens)
            messages.append({"role": "assistant", "content": found.text})
        assert cached[0] == 0
        assert 0 < cached[1] < cached[2]


@pytest.mark.parametrize("chunk", [3, 64, 128])
def test_scores_are_the_log_softmax_of_one_big_step(chunk: int, tiny_bundles: Bundles):
    ids = np.random.default_rng(0).integers(0, 300, 100)
    with LLM(tiny_bundles("qwen3"), num_threads=1, prefill_chunk=chunk) as llm:
        scores = llm.score(ids.tolist())
    with LLM(tiny_bundles("qwen3"), num_threads=1) as llm:
        [(_, logits)] = prefill(llm.backend, llm.embeddings, ids[:-1], wanted=all_tokens)
        wide = logits.astype(np.float64)
    expected = wide[np.arange(99), ids[1:]] - np.log(np.exp(wide).sum(axis=-1))
    np.testing.assert_allclose(scores, expected, atol=5e-5)


def test_the_end_of_the_real_cache(llm: LLM):
    result = llm.generate("hello", SamplingParams(temperature=0, ignore_eos=True))
    assert result.finish_reason == "length"
    assert llm.cached_tokens == TINY_KV_CAPACITY
    assert result.stats.prompt_tokens + result.stats.completion_tokens == TINY_KV_CAPACITY + 1
