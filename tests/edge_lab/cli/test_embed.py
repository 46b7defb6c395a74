"""``edge-llm embed``, and what other verbs do with a bundle that embeds."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from edge.errors import RequestError
from tests.command_line import Result, error_line
from tests.conftest import PoolingBundles
from tests.makers.goldens import PoolingGolden, assert_close
from tests.makers.tiny_pooling import TEXTS


def test_embed_prints_a_vector_of_each_text(
    edge_llm: Callable[..., Result], pooling_bundles: PoolingBundles
):
    bundle = pooling_bundles("embed")
    result = edge_llm("embed", bundle, *TEXTS[:2], "--dimensions", 16, "--num-threads", 1)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["text"] for line in lines] == list(TEXTS[:2])
    cut = PoolingGolden.load().vectors[:2, :16]
    cut = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    found = np.array([line["embedding"] for line in lines], np.float32)
    assert_close(found, cut, atol=1e-5, what="vectors")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_embed_prints_a_vector_of_each_line(
    end: str, edge_llm: Callable[..., Result], pooling_bundles: PoolingBundles
):
    lines = ["hello", "a form\x0cfeed", "\u2028the sea\x85"]
    given = (end or "\n").join(lines) + end
    words = ["embed", pooling_bundles("embed"), "--prompt-name", "query", "--num-threads", 1]
    piped = edge_llm(*words, stdin=given)
    assert [json.loads(line)["text"] for line in piped.out.split("\n")[:-1]] == lines
    empty = edge_llm(*words, stdin="hello\n\nthe sea\n")
    assert "line 2 of standard input is empty" in error_line(empty, RequestError.exit_code)


def test_a_text_that_is_no_utf8_is_named_so(
    edge_llm: Callable[..., Result], pooling_bundles: PoolingBundles
):
    result = edge_llm("embed", pooling_bundles("embed"), "caf\udce9")
    assert "the text is not UTF-8: byte 0xe9" in error_line(result, RequestError.exit_code)


@pytest.mark.parametrize("verb", ["run", "chat", "bench", "eval", "cache"])
def test_verbs_that_generate_refuse_an_embedder(
    verb: str, edge_llm: Callable[..., Result], pooling_bundles: PoolingBundles
):
    bundle = pooling_bundles("embed")
    words = {
        "run": ["run", bundle, "hello"],
        "bench": ["bench", bundle, "--prompt-tokens", 8, "--output-tokens", 8],
        "cache": ["cache", "build", bundle, "x", "--text", __file__],
    }.get(verb, [verb, bundle])
    result = edge_llm(*words)
    assert "cannot generate; use a bundle" in error_line(result, RequestError.exit_code)


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_verify_compares_vectors(
    task: str, edge_llm: Callable[..., Result], pooling_bundles: PoolingBundles
):
    bundle = pooling_bundles(task, quant="int8")  # type: ignore[arg-type]
    result = edge_llm("verify", bundle, "--decode-steps", 2, "--num-threads", 1, "--json")
    assert json.loads(result.out)["passed"], result.out
