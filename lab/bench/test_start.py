"""Cold starts in turns: both programs read one prompt and choose one token."""

from __future__ import annotations

import pytest

from tests.conftest import Bundles, require_kernels

from .start import Start, measure, table


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_both_programs_choose_the_same_token(dialect: str, tiny_bundles: Bundles):
    require_kernels(dialect)
    found = measure(tiny_bundles("qwen2", dialect, "int4"), 1, 1, "the sky is blue")
    ours, theirs = (starts[0] for starts in found.values())
    assert ours.text == theirs.text != ""
    assert ours.prompt_tokens == theirs.prompt_tokens > 1
    for start in (ours, theirs):
        assert start.seconds > 0.05
        assert start.cpu_seconds > 0.05
        assert start.peak_mib >= start.resident_mib > 10


def test_ratios_are_medians_of_the_rounds_ratios():
    """Not ratios of medians: what a round shares with its neighbour cancels."""

    def starts(*seconds: float) -> list[Start]:
        return [Start("a", 3, each, 2.0, 1000.0, 900.0) for each in seconds]

    rows = table({"edge-llm": starts(1, 8, 9), "session": starts(2, 10, 6)}).splitlines()
    assert rows[2] == "| edge-llm | 8.00 | 2.00 | 1,000 | 900 | 'a' |"
    assert rows[4] == "| ratio | 0.80 | 1.00 | 1.00 | 1.00 | |"
