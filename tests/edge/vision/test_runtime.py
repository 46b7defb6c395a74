"""Answers to prompts with pictures: what they are, and what they leave others."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge import LLM, GenerationResult, OutputFormat, SamplingParams
from edge.backends.step import all_tokens, prefill
from edge.bundle.embeddings import PICTURE_IDS
from edge.errors import BackendError, DeadlineError, EdgeError, RequestError
from edge.vision.rows import PictureTable
from tests.conftest import Bundles

from .test_prompt import ask, draw

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
OPTIONS: dict[str, Any] = {"backend": "ort-cpu", "num_threads": 1, "image_tiles": 16}


@pytest.fixture
def llm(vision_bundle: Path) -> Iterator[LLM]:
    with LLM(vision_bundle, **OPTIONS) as llm:
        yield llm


def tokens(result: GenerationResult) -> list[int]:
    return [token.id for token in result.tokens]


def table_of(llm: LLM) -> PictureTable:
    assert isinstance(llm.embeddings, PictureTable)
    return llm.embeddings


def fresh_answer(bundle: Path, messages: Any, params: SamplingParams = GREEDY) -> list[int]:
    with LLM(bundle, **OPTIONS) as llm:
        return tokens(llm.generate(messages, params))


def test_an_answer_is_what_the_decoder_says_of_the_encoder_s_rows(llm: LLM) -> None:
    """The plainest loop: all rows in one prompt, a token at a time, no cache kept."""
    ids: Any = llm.encode(ask(draw(1), "What is it?"))
    answer = tokens(llm.generate(ask(draw(1), "What is it?"), GREEDY))
    table, backend = llm.embeddings, llm.backend

    def loop() -> list[int]:
        seen, found = list(ids), []
        for _ in range(8):
            chunks = prefill(
                backend,
                table,
                np.array(seen),
                max_tokens=backend.max_step_tokens,
                wanted=all_tokens,
            )
            *_, (_, logits) = chunks
            found.append(int(np.argmax(logits[-1])))
            seen.append(found[-1])
        return found

    assert llm.call(loop) == answer[:8]


def test_pictures_matter_and_other_pictures_make_other_answers(llm: LLM) -> None:
    answers = [tokens(llm.generate(ask(draw(seed), "What?"), GREEDY)) for seed in range(4)]
    answers.append(tokens(llm.generate(ask("What?"), GREEDY)))
    assert len({tuple(answer) for answer in answers}) == 5


def test_answers_are_those_that_they_have_alone(vision_bundle: Path) -> None:
    asks = [
        ask(draw(1), "What is it?"),
        ask("Say something"),
        ask("Compare", draw(2, 30, 90), "with", draw(1)),
        ask(draw(1), "What is it, again?"),
        ask("Another text"),
        ask(draw(3, 200, 20), "?"),
    ]
    alone = [fresh_answer(vision_bundle, messages) for messages in asks]
    with LLM(vision_bundle, **OPTIONS, num_slots=3, prefill_chunk=16) as llm:
        running = [llm.submit(messages, GREEDY, client=str(i)) for i, messages in enumerate(asks)]
        assert [tokens(generation.result()) for generation in running] == alone
        assert table_of(llm).encoded_tiles == 13 + 9 + 5, "each picture once"


def test_the_prefix_cache_goes_by_the_picture(llm: LLM) -> None:
    def cached(messages: Any) -> int:
        return llm.generate(messages, GREEDY).stats.cached_tokens

    first = llm.encode(ask(draw(1), "What?"))
    before = first.index(next(id_ for id_ in first if id_ >= PICTURE_IDS))
    assert cached(ask(draw(1), "What?")) == 0
    encoded = table_of(llm).encoded_tiles
    assert cached(ask(draw(1), "What?")) == len(first) - 1
    assert table_of(llm).encoded_tiles == encoded, "rows that are in the cache are not computed"
    assert cached(ask(draw(2), "What?")) == before
    changed = draw(1)
    changed[0, 0, 0] ^= 255
    assert cached(ask(changed, "What?")) == before


def test_rows_that_were_kept_are_those_that_are_computed(vision_bundle: Path) -> None:
    messages = ask(draw(1), "What?")
    with LLM(vision_bundle, **OPTIONS, reuse_prefix=False) as llm:
        fresh = llm.generate(messages, GREEDY)
        tiles = table_of(llm).encoded_tiles
        kept = llm.generate(messages, GREEDY)
        assert table_of(llm).encoded_tiles == tiles
        assert kept.stats.cached_tokens == 0
        assert tokens(kept) == tokens(fresh)


def test_samples_share_a_picture(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, max_tokens=12, seed=3, ignore_eos=True)
    answers = [g.result() for g in llm.submit(ask(draw(1), "What?"), params, n=3)]
    assert table_of(llm).encoded_tiles == 13
    assert len({tuple(tokens(answer)) for answer in answers}) > 1
    assert tokens(answers[0]) == tokens(llm.generate(ask(draw(1), "What?"), params))


@pytest.mark.parametrize(
    "options",
    [{"speculative": 4}, {"prefill_chunk": 7}, {"num_slots": 1}, {"target_itl_ms": 0.001}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_engine_change_no_answer(
    vision_bundle: Path, options: dict[str, Any]
) -> None:
    # What follows the question both times is a picture: a draft would have its rows.
    messages = ask("Look at this:", draw(1), "and look at this:", draw(2), "Look at")
    alone = fresh_answer(vision_bundle, messages)
    with LLM(vision_bundle, **OPTIONS, **options) as llm:
        beside = llm.submit(ask("Say something"), GREEDY, client="other")
        assert tokens(llm.generate(messages, GREEDY)) == alone
        beside.result()


def test_a_draft_model_guesses_beside_a_picture_that_it_does_not_see(vision_bundle: Path) -> None:
    messages = ask("Look at this:", draw(1), "What is it?")
    alone = fresh_answer(vision_bundle, messages)
    options: dict[str, Any] = {**OPTIONS, "draft": vision_bundle, "speculative": 3}
    with LLM(vision_bundle, **options) as llm:
        for _ in range(4):
            assert tokens(llm.generate(messages, GREEDY)) == alone
        stats = llm.scheduler.stats()
        assert stats.drafts_failed is None
        assert stats.drafted_tokens > 0


def test_penalties_and_biases_are_about_tokens(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=16, repetition_penalty=1.3, frequency_penalty=0.5,
        presence_penalty=0.5, logit_bias={7: 2.0}, ignore_eos=True,
    )  # fmt: skip
    first = tokens(llm.generate(ask(draw(1), "What?"), params))
    assert first == tokens(llm.generate(ask(draw(1), "What?"), params))
    assert len(first) == 16


def test_a_form_is_kept(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    form = OutputFormat("regex", "[a-c]{5}")
    found = llm.generate(ask(draw(1), "What?"), SamplingParams(max_tokens=40), output=form)
    assert len(found.text) == 5
    assert set(found.text) <= set("abc")


def test_an_answer_outgrows_its_slot(vision_bundle: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    with LLM(vision_bundle, **OPTIONS, overflow="slide", kv_capacity=128) as llm:
        found = llm.generate(ask(draw(1), "What?"), params)
        assert len(found.tokens) == 150
        # What slid is no prefix any more, and the next answer has a slot of its own.
        assert len(llm.generate(ask(draw(1), "What?"), params).tokens) == 150


def test_an_answer_about_a_picture_continues_after_putting_away(vision_bundle: Path) -> None:
    messages = ask(draw(1), "What is it?")
    params = SamplingParams(temperature=0.9, max_tokens=40, seed=5, ignore_eos=True)
    alone = fresh_answer(vision_bundle, messages, params)
    with LLM(vision_bundle, **OPTIONS) as llm:
        generation = llm.submit(messages, params)
        assert generation.take(20) is not None
        (state,) = llm.suspend([generation], 20)
        assert state is not None
        again = llm.submit(messages, params, resumed=state)
        assert tokens(again.result()) == alone


def test_a_sequence_with_a_picture_continues_after_waiting_aside(vision_bundle: Path) -> None:
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    alone = fresh_answer(vision_bundle, ask(draw(1), "What?"), long)
    with LLM(vision_bundle, **OPTIONS, num_slots=1) as llm:
        generation = llm.submit(ask(draw(1), "What?"), long, client="a")
        assert generation.take(20) is not None
        llm.generate(ask(draw(2), "Brief?"), SamplingParams(max_tokens=2), client="b")
        assert tokens(generation.result()) == alone[1:]
        assert llm.scheduler.stats().preempted >= 1


class SlowEncoder:
    """The encoder of a table, slowed down, told when to fail, and watched."""

    def __init__(self, table: PictureTable, seconds: float = 0.0) -> None:
        self._encoder = table._encoder
        table._encoder = self
        self.seconds = seconds
        self.times: list[float] = []
        self.began = threading.Event()
        self.on_tile: Callable[[], None] = lambda: None
        self.error: Exception | None = None

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        self.began.set()
        self.on_tile()
        if self.error is not None:
            raise self.error
        time.sleep(self.seconds)
        self.times.append(time.monotonic())
        return self._encoder.encode(pixels)

    def close(self) -> None:
        self._encoder.close()


def test_others_wait_for_one_tile_at_a_time(llm: LLM) -> None:
    encoder = SlowEncoder(table_of(llm))
    written: list[int] = []  # tokens of all, before each tile
    encoder.on_tile = lambda: written.append(llm.scheduler.stats().completion_tokens)
    endless = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
    messages = ask(draw(1, 64, 64), "What?")
    ids = llm.encode(messages)  # which takes longer than the other answer
    running = llm.submit(ask("Say"), endless, client="a")
    assert running.take(20) is not None
    llm.submit(messages, GREEDY, ids=ids, client="b").result()
    running.cancel()
    assert len(written) == 17
    assert min(np.diff(written)) >= 1, f"tokens written before each tile: {written}"


def test_a_request_that_is_cancelled_encodes_no_further_tile(llm: LLM) -> None:
    encoder = SlowEncoder(table_of(llm), 0.05)
    generation = llm.submit(ask(draw(1, 64, 64), "What?"), GREEDY)
    assert encoder.began.wait(20)
    generation.cancel()
    assert generation.result().finish_reason == "cancelled"
    assert len(encoder.times) < 17


def test_a_deadline_holds_while_tiles_are_encoded(llm: LLM) -> None:
    encoder = SlowEncoder(table_of(llm), 0.1)
    with pytest.raises(DeadlineError):
        llm.generate(ask(draw(1, 64, 64), "What?"), GREEDY, deadline_s=0.3)
    assert len(encoder.times) < 17


def test_an_encoder_that_fails_ends_its_own_request(llm: LLM) -> None:
    alone = tokens(llm.generate(ask("Say something"), GREEDY))
    encoder = SlowEncoder(table_of(llm))
    encoder.error = BackendError("the vision encoder failed, as it was told to")
    beside = llm.submit(ask("Say something"), GREEDY, client="a")
    with pytest.raises(BackendError, match="as it was told to"):
        llm.generate(ask(draw(1), "What?"), GREEDY, client="b")
    assert tokens(beside.result()) == alone
    encoder.error = None
    assert len(llm.generate(ask(draw(1), "What?"), GREEDY).tokens) == 24


def test_ids_alone_give_nobody_a_picture(llm: LLM) -> None:
    ids = llm.encode(ask(draw(1), "What?"))
    for use in (
        lambda: llm.generate(list(ids), GREEDY),
        lambda: llm.submit(ask("x"), GREEDY, ids=list(ids)),
        lambda: list(llm.generate_ids(list(ids), GREEDY)),
    ):
        with pytest.raises(RequestError, match="give its messages"):
            use()
    messages = ask(draw(1), "What?")
    given = llm.submit(messages, GREEDY, ids=llm.encode(messages))
    assert tokens(given.result()) == tokens(llm.generate(messages, GREEDY))


def test_a_chat_of_a_text_bundle_loads_nothing_for_pictures(tiny_bundles: Bundles) -> None:
    code = (
        "import sys; from edge import LLM\n"
        f"llm = LLM({str(tiny_bundles('qwen2'))!r}, backend='ort-cpu', kv_capacity=64)\n"
        "llm.generate([{'role': 'user', 'content': 'x'}])\n"
        "print([name for name in sys.modules if 'vision' in name or 'picturing' in name "
        "or name.startswith('PIL')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_lost_of_what_is_open(vision_bundle: Path) -> None:
    llm = LLM(vision_bundle, **OPTIONS)
    llm.close()
    with pytest.raises(EdgeError):
        llm.generate(ask(draw(1), "x"), GREEDY)
