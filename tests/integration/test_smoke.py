"""One export and one answer, as a user types them: what must work on every Python and library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import edge
from edge.runtime.sampling_params import SamplingParams
from tests.conftest import RUNNABLE, Checkpoints
from tests.makers.goldens import Golden

LENGTH = 8


def edge_llm(*arguments: str) -> str:
    """What a verb prints on stdout in a process of its own."""
    command = [sys.executable, "-m", "edge.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_checkpoint_is_exported_and_answers(tiny_checkpoints: Checkpoints, tmp_path: Path):
    bundle = tmp_path / "bundle"
    made = ("-o", str(bundle), "--quant", "fp16", "--dialect", RUNNABLE)
    edge_llm("export", str(tiny_checkpoints("qwen2")), *made)
    options = ("--temperature", "0", "--max-tokens", str(LENGTH), "--backend", "ort-cpu")
    answer = json.loads(edge_llm("run", str(bundle), "The cat", "--raw", "--json", *options))
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["completion_tokens"] == LENGTH

    golden = Golden.load("qwen2")  # transformers' own
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    with edge.LLM(bundle, backend="ort-cpu") as llm:
        ids = list(llm.generate_ids(golden.prompt.tolist(), params))
    assert ids == golden.continuation[:LENGTH].tolist()
