"""The same question has the same answer, also where the cache has most of its rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from edge import LLM, SamplingParams
from edge.errors import BundleError
from edge_lab.measure.defaults import GOLDEN_SET
from edge_lab.measure.watch import BundleAnswerer, read_golden
from export.pipeline import ExportConfig, export_checkpoint
from lab.quality.ask_twice import find_differing
from tests.conftest import Bundles, require_even_rows
from tests.edge.backends.runner import random_ids
from tools.models.smollm2 import smollm2_gguf

SIZES = (2, 3, 7, 20, 33, 45, 65)  # 33 and 65 would leave a token alone behind blocks


@pytest.fixture(autouse=True)
def even() -> None:
    require_even_rows()


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 17}, {"prefill_chunk": 3}])
@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_cached_rows_change_no_bit_of_an_answer(
    quant: str, options: dict[str, Any], tiny_bundles: Bundles
):
    """Log-probabilities tell of last bits, which a longer answer makes another token of."""
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0)
    bundle = tiny_bundles("qwen2", "native", quant=quant)
    prompts = [random_ids(size, seed=size).tolist() for size in SIZES]
    prompts += [[*prompt[:-1], 7] for prompt in prompts]  # begin as others do

    def ask(llm: LLM, ids: list[int]) -> list[float | None]:
        return [token.logprob for token in llm.generate(ids, params).tokens]

    with LLM(bundle, num_threads=1, num_slots=1, reuse_prefix=False, **options) as llm:
        fresh = [ask(llm, prompt) for prompt in prompts]
    with LLM(bundle, num_threads=1, num_slots=8, **options) as llm:
        for _ in range(2):
            assert [ask(llm, prompt) for prompt in prompts] == fresh
        assert llm.generate(prompts[3], params).stats.cached_tokens == SIZES[3] - 2
        # A chat goes on from rows that decoding wrote, also when its last turn is asked again.
        chat = [*prompts[3], *llm.generate_ids(prompts[3], params), 1, 2, 3]
        assert ask(llm, chat) == ask(llm, chat)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """SmolLM2 in integers, rounded to the nearest."""
    folder = tmp_path_factory.mktemp("served")

    def bundle(quant: Literal["int4", "int8"]) -> Path:
        try:
            source = smollm2_gguf()
        except FileNotFoundError as error:
            pytest.skip(str(error))
        method: Literal["rtn"] | None = "rtn" if quant == "int4" else None
        export_checkpoint(
            ExportConfig(source=str(source), output=folder / quant, quant=quant, method=method)
        )
        return folder / quant

    yield bundle
    shutil.rmtree(folder)  # 400 MB, and pytest keeps the folders of three runs


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_golden_prompts_have_the_same_answer_twice(quant: str, served: Any):
    items, _ = read_golden(GOLDEN_SET)
    with LLM(served(quant)) as llm:
        assert find_differing(BundleAnswerer(llm), items, 16) == []


def test_what_cannot_be_asked_is_no_answer_that_differs(tmp_path: Path):
    command = [sys.executable, "-m", "lab.quality.ask_twice", str(tmp_path / "absent")]
    asked = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (asked.returncode, asked.stdout) == (BundleError.exit_code, "")
    assert asked.stderr.startswith("error: ")
