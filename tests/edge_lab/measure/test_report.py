from __future__ import annotations

import html.parser
import re

from edge_lab.measure.report import html_report

VOID = {"meta", "br"}


class Checker(html.parser.HTMLParser):
    """Every tag is closed in order and nothing points out of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "a")
        assert not {name for name, _ in attrs} & {"src", "href", "xlink:href", "srcset"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_html(page: str) -> list[str]:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    named = re.sub(r' xmlns(:xlink)?="[^"]*"', "", page)  # names, which nobody fetches
    assert not re.search(r"https?:|url\(|@import| id=", named)
    return checker.seen


def make_result(**changes):
    figures = ("perplexity", "perplexity_reference", "perplexity_ratio", "kl_mean", "kl_p99")
    return {
        "bundle": "/models/int4",
        "name": "tiny <b>",
        "quantization": "int4",
        "reference": {"name": "tiny", "quantization": "fp16"},
        **dict.fromkeys(figures, 0.5),
        "top1_agreement": 0.9,
        "cosine_mean": 0.9,
        "bits_per_weight": 4.5,
        "tokens": 100,
        "num_bytes": 1000,
        "confidence": {"kl_mean": (0.4, 0.6)},
        "layers": [{"layer": 0, "key_error": 0.1, "value_error": None}],
        "kl_by_position": [{"position": 1.0, "kl_mean": 0.1}],
        "text": {"name": "text", "sha256": "00"},
        "window": 8,
        "seed": 0,
        "engine": "ort-cpu",
        "int8_activations": False,
        **changes,
    }


def test_the_page_is_sound_and_escapes():
    missed = {"name": "int4", "missed": ["kl_mean 0.5 is above 0.1"]}
    page = html_report([make_result(gate=missed), make_result(bundle="b<i>", kl_mean=0.0)])
    assert check_html(page).count("svg") == 3
    assert "<b>" not in page.split("<svg")[0]
    assert "kl_mean 0.5 is above 0.1" in page
    assert "0.4 to 0.6" in page


def test_without_a_reference_there_is_nothing_to_plot():
    nothing = dict.fromkeys(
        ("reference", "kl_mean", "kl_p99", "top1_agreement", "cosine_mean",
         "perplexity_reference", "perplexity_ratio")
    )  # fmt: skip
    assert "svg" not in check_html(html_report([make_result(**nothing, layers=[])]))


def test_values_have_a_chart_of_their_own():
    layers = [{"layer": i, "key_error": 0.1 + i, "value_error": 0.2} for i in range(3)]
    page = html_report([make_result(layers=layers), make_result(bundle="other", layers=layers)])
    assert check_html(page).count("svg") == 4
    assert page.count(">other</text>") == 4


def test_zeros_are_named_where_they_cannot_be_drawn():
    zero = {"kl_mean": 0.0, "kl_by_position": [{"position": 1.0, "kl_mean": 0.0}]}
    page = html_report([make_result(**zero)])
    assert page.count("Zeros have no place on the logarithmic axis: int4.") == 2
    assert check_html(page).count("svg") == 1  # the keys
