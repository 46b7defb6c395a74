"""Defaults of a measurement: the built-in texts, and how many of their tokens are read."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
EVAL_TEXT = DATA / "eval_text.txt"
"""Held-out text written for this project; calibration never reads it."""
GATE_TEXTS = (EVAL_TEXT, DATA / "chinese.txt")
"""Texts that a new bundle must predict as well as the old one: English problems, and Chinese."""
WINDOW = 512
"""Tokens of a window of the text."""
GOLDEN_SET = DATA / "golden.jsonl"
"""Prompts written for this project; `edge_lab.measure.watch` asks them."""
MAX_TOKENS = 256
"""Most tokens of an answer to a golden prompt."""
TEXT_TOKENS = 2048
"""Most tokens of the text that a watch reads."""
