"""Options of the verbs that ask a golden set: which prompts, and which engine answers."""

from __future__ import annotations

import click

from edge.cli.options import FILE
from edge.cli.sections import option
from edge_lab.measure.defaults import GOLDEN_SET, MAX_TOKENS

GOLDEN_ENGINE = ("backend", "kv_capacity", "num_threads", "int8_activations")
golden_option = option(
    "Task",
    "--golden",
    type=FILE,
    default=GOLDEN_SET,
    help='JSONL of {"id", "prompt", "answer"}; default: the 62 prompts that come with edge-llm.',
)
max_tokens_option = option(
    "Task",
    "--max-tokens",
    type=click.IntRange(1),
    default=MAX_TOKENS,
    show_default=True,
    help="Most tokens of each answer.",
)
