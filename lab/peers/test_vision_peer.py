"""`python3 -m lab vision-peer`: what is read from llama.cpp's log."""

from __future__ import annotations

import pytest

from edge.errors import EdgeError

from .vision_peer import TILES, medians, read_llama

TILE = "0.07.713.059 I mtmd batch encoding done in 3{at}00 ms\n"
PROMPT = (
    "0.17.317.273 I llama_perf_context_print: prompt eval time =   16411.18 ms /   347 tokens "
    "(   47.29 ms per token,    21.14 tokens per second)\n"
)


def log(tiles: int, prompt: str = PROMPT) -> str:
    return "".join(TILE.format(at=at) for at in range(tiles)) + prompt


def test_the_log_of_llama_cpp_is_read():
    found = read_llama(log(TILES))
    assert found == {"ttft_s": 16.41118, "vision_s": 16.0, "prompt_tokens": 347}


@pytest.mark.parametrize("said", [log(TILES - 1), log(TILES + 1), log(TILES, ""), ""])
def test_another_number_of_tiles_is_no_figure(said: str):
    with pytest.raises(EdgeError, match=r"llama\.cpp encoded \d tiles, not 5"):
        read_llama(said)


def test_of_several_runs_the_median_counts():
    runs = [{"ttft_s": value, "vision_s": 1.0} for value in (9.0, 1.0, 2.0)]
    assert medians(runs) == {"ttft_s": 2.0, "vision_s": 1.0}
