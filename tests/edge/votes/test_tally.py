"""When a vote ends, and who wins it."""

import random
from typing import Any

import pytest

from edge.errors import RequestError
from edge.votes.tally import Tally, VoteRule, doubt


def test_doubt_is_the_mass_below_one_half_of_two_shares_with_a_uniform_prior():
    draw = random.Random(1)
    for agreed, second in ((2, 0), (3, 1), (5, 4)):
        below = sum(draw.betavariate(agreed + 1, second + 1) < 0.5 for _ in range(40_000)) / 40_000
        assert doubt(agreed, second) == pytest.approx(below, abs=0.01)
    assert doubt(2, 0) == 1 / 8
    assert doubt(3, 3) == 1 / 2


def votes(rule: VoteRule, *answers: str | None) -> Tally:
    tally = Tally(rule)
    for answer in answers:
        tally.add(answer, 0.5)
    return tally


def test_two_that_agree_decide_and_two_that_differ_ask_for_as_many_as_could():
    rule = VoteRule(first=2, error=0.15, most=8)
    assert votes(rule).missing(0) == 2
    assert votes(rule).missing(1) == 1
    assert votes(rule, "4", "4").is_decided
    assert votes(rule, "4", "4").missing(0) == 0
    parted = votes(rule, "4", "5")
    assert not parted.is_decided
    assert parted.missing(0) == 3  # 4 to 1 leaves a doubt of 7/64, and 3 to 1 one of 6/32
    assert parted.missing(2) == 1
    assert votes(rule, "4", "5", "4", "4", "4").is_decided


def test_all_are_drawn_at_once_and_three_that_agree_decide():
    assert votes(VoteRule(most=5)).missing(0) == 5
    assert votes(VoteRule(most=5)).missing(4) == 1
    assert not votes(VoteRule(), "4", "4").is_decided
    assert votes(VoteRule(), "4", "4", "4").is_decided


def test_a_smaller_error_takes_more_samples_and_no_more_than_allowed():
    strict = VoteRule(first=2, error=0.01, most=4)
    assert votes(strict, "4", "4").missing(0) == 2
    assert votes(strict, "4", "4", "4", "4").missing(0) == 0
    assert not votes(strict, "4", "4", "4", "4").is_decided


def test_a_sample_without_an_answer_votes_for_nothing():
    tally = votes(VoteRule(first=2, error=0.15), None, None)
    assert tally.leader is None
    assert (tally.agreed, tally.is_decided) == (0, False)
    assert tally.missing(0) == 2
    assert votes(VoteRule(), "4", None).leader == "4"
    assert not votes(VoteRule(), "4", None).is_decided


def test_confidence_chooses_between_equal_votes_and_delays_a_decision_against_it():
    tally = Tally(VoteRule(error=0.4))
    tally.add("4", 0.3)
    tally.add("5", 0.9)
    assert tally.leader == "5"
    tally.add("4", 0.3)
    assert tally.leader == "5"
    assert not tally.is_decided  # two votes stand against one
    tally.add("4", 0.5)
    assert (tally.leader, tally.is_decided) == ("4", True)


def test_equal_votes_decide_nothing_whatever_the_error():
    tally = Tally(VoteRule(error=0.5))
    tally.add("1", 0.9)
    tally.add("2", 0.5)
    assert not tally.is_decided
    tally.add("1", 0.1)
    assert tally.is_decided


@pytest.mark.parametrize("error", [0.15, 0.05])
def test_the_stated_error_holds_over_questions_of_all_kinds(error: float):
    draw, rule, wrong, decided = random.Random(2), VoteRule(first=2, error=error, most=32), 0, 0
    for _ in range(4_000):
        tally, share = Tally(rule), draw.random()
        while tally.missing(0):
            tally.add("often" if draw.random() < share else "seldom", 1.0)
        decided += tally.is_decided
        wrong += tally.is_decided and tally.leader != ("often" if share > 0.5 else "seldom")
    assert decided > 3_000
    assert error / 4 < wrong / decided < error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 1}, "most must be an integer from 2 to 64, not 1"),
        ({"most": True}, "most must be"),
        ({"first": 0}, "first must be an integer from 2 to 8, not 0"),
        ({"first": 9}, "first must be an integer from 2 to 8, not 9"),
        ({"error": 0}, "error must be above 0 and at most 0.5, not 0"),
        ({"error": 0.6}, "not 0.6"),
        ({"error": float("nan")}, "error must be"),
        ({"answers": "word"}, "answers must be number, choice, boxed, json:FIELD or regex:PATTERN"),
        ({"answers": 3}, "not 3"),
    ],
)
def test_a_wrong_rule_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        VoteRule(**options)
