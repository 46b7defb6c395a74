"""A head that drafts for a model whose cache is in 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.bundle.manifest import head_manifest, read_manifest
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from tests.conftest import TINY_KV_CAPACITY, Checkpoints, require_int8_cache
from tests.makers.tiny_heads import make_head

QUESTION = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_a_head_drafts_beside_an_8_bit_cache(
    dialect: str, tiny_checkpoints: Checkpoints, tmp_path: Path
):
    """The head's own cache stays in floats, and the answers are those without it."""
    require_int8_cache(dialect)
    config = ExportConfig(
        source=str(tiny_checkpoints("qwen2")),
        output=tmp_path / "bundle",
        quant="fp16",
        dialect=dialect,  # type: ignore[arg-type]
        kv_cache="int8",
        kv_capacity=TINY_KV_CAPACITY,
        eagle3=make_head().write(tmp_path / "head"),
    )
    export_checkpoint(config)
    manifest = read_manifest(config.output)
    own = head_manifest(manifest)
    assert own is not None
    assert manifest.int8_layers
    assert own.int8_layers == ()
    answers = []
    for draft in (None, "eagle3"):
        with LLM(config.output, backend="ort-cpu", num_threads=1, draft=draft) as llm:
            answers.append(
                [
                    llm.generate(
                        QUESTION, SamplingParams(temperature=t, seed=1, max_tokens=24)
                    ).text
                    for t in (0.0, 0.8)
                ]
            )
    assert answers[0] == answers[1]
