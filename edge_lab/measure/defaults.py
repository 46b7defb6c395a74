"""What is asked and read where nobody says otherwise: the built-in texts, and how much of them."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
EVAL_TEXT = DATA / "eval_text.txt"
"""Held-out text written for this project; calibration never reads it."""
GATE_TEXTS = (EVAL_TEXT, DATA / "chinese.txt")
"""What a new bundle has to predict as well as the old one: English problems, and Chinese."""
WINDOW = 512
"""Tokens of a window of the text."""
GOLDEN_SET = DATA / "golden.jsonl"
"""Prompts written for this project, which `edge_lab.measure.watch` asks."""
MAX_TOKENS = 256
"""Tokens of an answer to one of them."""
TEXT_TOKENS = 2048
"""Tokens of the text that a watch reads."""
