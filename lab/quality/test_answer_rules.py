"""Rules of stopping and voting, computed from pools of answers that are known."""

from __future__ import annotations

import json
import lzma
import random
import sys
from typing import Any

import pytest

from edge.errors import ConfigError

from . import answer_rules
from .answer_rules import Rule, Stop, Vote

SURE, UNSURE = [-0.01, -0.01], [-0.5, -0.01]


def trial(at: int, answer: str | None, logprobs: list[float] = SURE) -> dict[str, Any]:
    return {"at": at, "answer": answer, "right": None, "tokens": 3, "logprobs": logprobs}


def answer(text: str | None, tokens: int, *trials: dict[str, Any], logprob: float = -0.1) -> Any:
    figures = {"logprob": logprob, "margin": 1.0, "weakest": -0.2}
    return {"tokens": tokens, "answer": text, "trials": list(trials), **figures}


def problem(*answers: dict[str, Any], expected: str = "12") -> dict[str, Any]:
    return {
        "size": "0.5b",
        "prompt_tokens": 11,
        "expected": expected,
        "answers": list(answers),
        "greedy": answers[0],
    }


@pytest.mark.parametrize(
    ("trials", "stop", "tokens", "rows"),
    [
        # Stopped at 100: 4 more tokens while the trial runs, 8 that begin the answer, 4 of its own.
        ([trial(40, "12"), trial(100, "12")], Stop(0.9, 2), 116, 36),
        ([trial(40, "12"), trial(100, "12")], Stop(0.9, 1), 56, 18),
        ([trial(40, "12"), trial(100, "12")], Stop(0.99, 1), 200, 36),
        ([trial(40, "7"), trial(100, "12")], Stop(0.9, 2), 200, 36),
        ([trial(40, "12"), trial(80, None), trial(120, "12")], Stop(0.9, 2), 200, 54),
        ([trial(40, "12"), trial(80, "12", UNSURE), trial(120, "12")], Stop(0.9, 2), 200, 54),
        # Too dear: 18 rows are 1.8 steps, and 5 % of 35 are 1.75.
        ([trial(35, "12"), trial(100, "12")], Stop(0.9, 2), 200, 18),
        # The thought has ended before the trial has.
        ([trial(40, "7"), trial(197, "7")], Stop(0.9, 2), 200, 36),
        ([trial(40, "12"), trial(100, "12")], None, 200, 0),
    ],
)
def test_a_thought_is_stopped_where_its_trials_agree(trials, stop, tokens, rows):
    found = answer_rules.stopped(answer("12.0", 200, *trials), stop)
    assert (found.answer, found.tokens, found.trial_rows) == ("12", tokens, rows)


@pytest.mark.parametrize(
    ("final", "trials", "tokens"),
    [
        ("12", [trial(40, "7"), trial(80, "12"), trial(120, "12", UNSURE)], 92),
        ("12", [trial(40, "12"), trial(80, "7")], 52),  # that it changes its mind is known, too
        ("12", [trial(40, "7"), trial(80, "7")], 200),
        ("12", [trial(198, "12")], 200),
        (None, [trial(40, None)], 200),
    ],
)
def test_no_rule_stops_before_the_trials_give_what_the_answer_ends_with(final, trials, tokens):
    cut = answer_rules.settled(answer(final, 200, *trials))
    assert (cut["answer"], cut["tokens"], cut["trials"]) == (final, tokens, [])


def samples(*pairs: tuple[str | None, int], logprob: float = 0.0) -> list[answer_rules.Sample]:
    return [answer_rules.stopped(answer(text, n, logprob=logprob), None) for text, n in pairs]


def test_a_vote_ends_with_the_sample_that_decides_it():
    vote = Vote(first=2, most=8, error=0.15)
    text, tokens, steps = answer_rules.voted(samples(("12", 100), ("12", 60), ("7", 10)), vote)
    assert (text, tokens) == ("12", 160)
    assert steps == pytest.approx(60 * 1.1 + 40)  # 60 of two rows, 40 of one
    vote = Vote(first=3, most=3, error=0.15)
    # The third is cancelled after 100 tokens.
    text, tokens, steps = answer_rules.voted(samples(("12", 100), ("12", 60), ("7", 500)), vote)
    assert (text, tokens) == ("12", 260)
    assert steps == pytest.approx(60 * 1.2 + 40 * 1.1)


def test_an_open_vote_draws_more_up_to_the_most():
    drawn = samples(("1", 10), ("2", 10), ("3", 10), ("4", 10), ("5", 10))
    _, tokens, steps = answer_rules.voted(drawn, Vote(first=2, most=4, error=0.15))
    assert tokens == 40
    assert 2 * 10 * 1.1 <= steps <= 40


def test_votes_weigh_what_the_rule_says():
    item = problem(*[answer("7", 10, logprob=-3)] * 2, answer("12", 10, logprob=-0.01))
    heavy, plain = (Rule(vote=Vote(3, 3, 0.05, weights)) for weights in ("confidence", "none"))
    assert answer_rules.outcome(item, heavy).right == 1
    assert answer_rules.outcome(item, plain).right == 0


def test_steps_have_the_prompt_and_the_trials():
    item = problem(answer("12", 200, trial(40, "12")), answer("7", 100))
    one = answer_rules.outcome(item, Rule())
    assert (one.right, one.tokens, one.steps) == (0.5, 150, 2 + 150)
    stop = answer_rules.outcome(item, Rule(Stop(0.9, 1)))
    assert stop.tokens == 78
    assert stop.steps == pytest.approx(2 + 78 + 0.9)


def pool(problems: int, right: float, stopped_right: float, seed: int = 1) -> list[dict[str, Any]]:
    """Answers that are right, and trials that say the right thing, as often as this."""
    draw = random.Random(seed)
    items = []
    for _ in range(problems):
        wrong_trial = draw.random() >= stopped_right
        answers = []
        for _ in range(16):
            text = "12" if draw.random() < right else str(draw.randrange(100, 999))
            said = "5" if wrong_trial else text
            answers.append(answer(text, 200, trial(40, said), trial(80, said)))
        items.append(problem(*answers))
    return items


def judged(items: list[dict[str, Any]], *rules: Rule) -> list[dict[str, Any]]:
    return answer_rules.compute(items, rules)[2:]


def test_the_bars():
    stop, vote = Rule(Stop(0.9, 2)), Rule(vote=Vote(2, 8, 0.15))
    both = Rule(stop.stop, vote.vote)
    good, voted, joined = judged(pool(60, 0.6, 1.0), stop, vote, both)
    assert good["tokens_saved"] == pytest.approx(1 - 96 / 200)
    assert good["gain"] == 0
    assert good["meets_bar"] is True
    assert voted["gain_interval"][0] > 0
    assert voted["meets_bar"] is (voted["steps_ratio"] <= 2)
    assert joined["steps_ratio"] < voted["steps_ratio"]
    (bad,) = judged(pool(60, 0.6, 0.8), stop)
    assert bad["tokens_saved"] == good["tokens_saved"]
    assert bad["gain_interval"][0] < -0.04
    assert bad["meets_bar"] is False
    (easy,) = judged(pool(60, 1.0, 1.0), vote)
    assert easy["meets_bar"] is False  # nothing to gain
    assert easy["steps_ratio"] == pytest.approx((2 + 200 * 1.1) / 202)
    assert judged(pool(5, 0.6, 1.0), stop)[0]["meets_bar"] is None


def test_both_must_be_no_worse_in_either_and_better_in_one():
    def figures(gain: float, low: float, steps: float, high: float) -> dict[str, Any]:
        return {
            "gain": gain,
            "gain_interval": [low, 1],
            "steps_ratio": steps,
            "steps_ratio_interval": [0, high],
            "tokens_saved": 0.0,
        }

    assert answer_rules.meets_bar("both", figures(0.1, 0.01, 0.9, 1.1))
    assert answer_rules.meets_bar("both", figures(0.0, -0.1, 0.9, 0.95))
    assert not answer_rules.meets_bar("both", figures(0.1, 0.01, 1.1, 1.2))
    assert not answer_rules.meets_bar("both", figures(-0.01, -0.1, 0.5, 0.6))
    assert not answer_rules.meets_bar("both", figures(0.1, -0.1, 0.9, 1.1))


def test_the_script_reads_a_packed_pool(tmp_path, monkeypatch, capsys):
    packed, output = tmp_path / "pool.xz", tmp_path / "rules.json"
    lines = "".join(json.dumps(item) + "\n" for item in pool(2, 0.6, 1.0))
    packed.write_bytes(lzma.compress(lines.encode()))
    monkeypatch.setattr(sys, "argv", ["answer_rules", str(packed), "--json", str(output)])
    answer_rules.main()
    rules = json.loads(output.read_text())["rules"]
    assert {row["way"] for row in rules} == {"greedy", "settled", "one", "stop", "vote", "both"}
    assert "no rule is judged: 30 problems are needed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no problem of this model"):
        answer_rules.compute([], [Rule()])
