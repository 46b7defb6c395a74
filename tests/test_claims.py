"""The answers to an article's claims, in English and Chinese: every figure against its source.

`FIGURES` says for each row of the two pages which command prints a figure, which file records it
or who published it. Each number in the text of the pages must be one of these, in this order.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge import LLM, cli
from edge.bundle import io_spec
from edge.bundle.linears import linear_layers
from edge.model.spec import ModelSpec
from edge.runtime import deepseek
from edge_lab.planner import recommend
from edge_lab.planner.models import BUILT_IN
from edge_lab.planner.published import SPEED_FIGURES
from tests.conftest import Bundles
from tests.documents import FENCE, ROOT, SPAN, blocks, rows
from tests.measured import cell, tables

ENGLISH = ROOT / "docs" / "claims.md"
CHINESE = ROOT / "docs" / "claims.zh-CN.md"
PAGES = [ENGLISH, CHINESE]

# ---- Where a figure comes from ----


@dataclass(frozen=True)
class Printed:
    """What a command prints with ``--json``.

    Attributes:
        command: the command line, without ``--json``.
        at: keys into the JSON; a list of objects is entered by a value of one of their keys.
        form: format of the number.
        scale: factor from the JSON's unit to the page's.
    """

    command: str
    at: str
    form: str = "{:.1f}"
    scale: float = 1.0

    def value(self) -> float:
        found = _run(self.command)
        for key in self.at.split("/"):
            found = _enter(found, key)
        return float(found) * self.scale

    def texts(self) -> list[str]:
        return [self.form.format(self.value())]

    def __str__(self) -> str:
        return f"{self.command} --json: {self.at}"


@dataclass(frozen=True)
class Computed:
    """Arithmetic, as ``why`` says it."""

    why: str
    formula: Callable[[], float]
    form: str = "{:.1f}"

    def texts(self) -> list[str]:
        return [self.form.format(self.formula())]

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class Recorded:
    """What a file of measurements says: the groups of a pattern, or what ``take`` makes of them."""

    path: str
    pattern: str
    take: Callable[..., list[str]] = lambda *groups: list(groups)

    def texts(self) -> list[str]:
        found = re.findall(self.pattern, (ROOT / self.path).read_text("utf-8"), re.MULTILINE)
        assert len(found) == 1, f"{self.path} has {len(found)} times {self.pattern}"
        return self.take(*(found if isinstance(found[0], str) else found[0]))

    def __str__(self) -> str:
        return f"{self.path}: {self.pattern}"


@dataclass(frozen=True)
class Measured:
    """A cell of a table in docs/measured, or what ``take`` makes of it."""

    at: tuple[str, str, str, str]
    take: Callable[[str], list[str]]
    table: int = 0

    def texts(self) -> list[str]:
        return self.take(cell(*self.at, table=self.table))

    def __str__(self) -> str:
        name, section, row, column = self.at
        return f"docs/measured/{name}.json, {section!r}: {column!r} of {row!r}"


@dataclass(frozen=True)
class Quoted:
    """Numbers that nothing here can check, and whose they are."""

    numbers: str
    source: str

    def texts(self) -> list[str]:
        return self.numbers.split()

    def __str__(self) -> str:
        return self.source


Source = Printed | Computed | Recorded | Measured | Quoted


@functools.cache
def _run(command: str) -> Any:
    _, verb, *arguments = command.split()
    result = CliRunner().invoke(cli.cli, [verb, *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _enter(found: Any, key: str) -> Any:
    if isinstance(found, dict):
        return found[key]
    [entry] = [item for item in found if set(key.split("+")) <= set(map(str, item.values()))]
    return entry


# ---- The figures ----

MODELS = ("1.5b", "7b", "8b")
AGX = "edge-llm plan deepseek-r1:{} --device agx-orin-64"


def _spec(model: str) -> ModelSpec:
    return BUILT_IN[f"deepseek-r1:{model}"].spec


def spec_field(model: str, field: str) -> Computed:
    why = f"{field} of deepseek-r1:{model} in edge_lab/planner/models.py (its config.json)"
    return Computed(why, lambda: getattr(_spec(model), field), "{:,.0f}")


def per_token_ms(quant: str, *models: str) -> list[Source]:
    return [
        Printed(AGX.format(m), f"options/{quant}/speeds/8192/tpot_s", scale=1e3) for m in models
    ]


def process_gb(quant: str, *models: str) -> list[Source]:
    at = f"options/{quant}/memory/process_bytes"
    return [Printed(AGX.format(m), at, scale=1e-9) for m in models]


def weights_gb(quant: str, model: str, form: str = "{:.1f}") -> Printed:
    return Printed(AGX.format(model), f"options/{quant}/memory/weights_bytes", form, 1e-9)


def tokens_per_s(quant: str, model: str, batch: int = 1, form: str = "{:.0f}") -> Printed:
    command = f"edge-llm plan deepseek-r1:{model} --batch {batch}"
    return Printed(command, f"options/{quant}/speeds/512/decode_tps", form)


def score(model: str, benchmark: recommend.Benchmark) -> Computed:
    name = f"deepseek-r1:{model}"
    return Computed(
        f"{benchmark} of {name} in edge_lab/planner/recommend.py (DeepSeek's README)",
        lambda: recommend.QUALITY[name][benchmark],
    )


def parameters_in_linears(model: str) -> int:
    return sum(math.prod(layer.shape) for layer in linear_layers(_spec(model)))


def reasoning_tps(model: str) -> float:
    [found] = [
        figure.value
        for figure in SPEED_FIGURES
        if figure.source.startswith("EdgeReasoning")
        and figure.model == f"R1-Distill-{model}"
        and figure.kind == "decode"
        and figure.batch == 1
    ]
    return found


def least_and_most(column: str, *, scale: float = 1.0) -> list[str]:
    values = [float(value) * scale for value in column.split(" / ")]
    return [f"{min(values):.3f}", f"{max(values):.3f}"]


def recovery(quant: str, size: int) -> Computed:
    return Computed(
        f"_RECOVERY of {quant} in edge_lab/planner/recommend.py (Neural Magic)",
        lambda: 100 * recommend._RECOVERY[quant][size],
        "{:.0f}",
    )


def lora_7b_gb() -> float:
    spec = _spec("7b")
    return 2e-9 * (parameters_in_linears("7b") + spec.vocab_size * spec.hidden_size)


ARTICLE = "the article"
USABLE = Printed(AGX.format("8b"), "usable_bytes", scale=1e-9)
ORIN_100MS = "edge-llm recommend --latency-ms 100"
CONTEXT = Printed(AGX.format("8b"), "kv_capacity", "{:,.0f}")
KV_MB = Computed(
    "512 tokens of kv_bytes_per_token in edge-llm plan deepseek-r1:7b --json",
    lambda: 512e-6 * Printed(AGX.format("7b"), "options/fp16/work/kv_bytes_per_token").value(),
    "{:.0f}",
)
STEP_MB = weights_gb("fp16", "7b")
PERPLEXITY = "Perplexity over float's"
FOUR_TEXTS = "Measured: English, code and Chinese"
ANSWERS = ("quantization", "Right answers: 1.5B")


def all_questions() -> int:
    [table] = tables(*ANSWERS)
    counts = [row[0].split()[0] for row in table["rows"]]
    return sum(int(count) for count in counts if count.isdigit())


def asked_of_int8() -> int:
    """Questions of the kinds that int8 was asked."""
    [table] = tables(*ANSWERS)
    at = table["columns"].index("`int8`")
    return sum(int(row[0].split()[0]) for row in table["rows"] if row[at].isdigit())


def won_and_lost(recipe: str) -> dict[str, int]:
    [table] = tables(*ANSWERS)
    found: dict[str, int] = table["all_questions"][recipe]
    return found


def steady_tps(streams: str) -> float:
    return float(cell("benchmarks", "Many streams", streams, "steady, tok/s"))


def interval(column: str) -> Measured:
    return Measured(
        (*ANSWERS, "lost of all that were asked, 95 % interval", column),
        lambda found: re.findall(r"[-+][\d.]+(?= to)|(?<=to )[-+][\d.]+", found),
    )


FIGURES: dict[str, list[Source]] = {
    "# An article's claims, one by one": [
        Computed("tokens of a step of the predictions", lambda: 512, "{:.0f}")
    ],
    "it speeds up the 7B by 15 %": [
        Quoted("512", ARTICLE),
        KV_MB,
        Printed(AGX.format("7b"), "options/fp16/memory/weights_bytes", "{:,.0f}", 1e-6),
        Computed(
            "cache over weights of the two figures before",
            lambda: (
                100
                * 512e-9
                * Printed(AGX.format("7b"), "options/fp16/work/kv_bytes_per_token").value()
                / STEP_MB.value()
            ),
        ),
    ],
    "4 encoder layers in the 1.5B, 12 in the 7B and 8B": [
        spec_field(model, "num_layers") for model in (*MODELS, "8b-0528")
    ],
    "context of at most 512 tokens": [
        spec_field("7b", "max_position_embeddings"),
        Computed(
            "MAX_ROPE_POSITIONS of edge/bundle/io_spec.py",
            lambda: io_spec.MAX_ROPE_POSITIONS,
            "{:,.0f}",
        ),
        CONTEXT,
    ],
    "pre-trained on several modalities, a shared encoder for images and text": [
        Quoted("400", "HTTP: bad request")
    ],
    "## Less than 2 %": [
        recovery("int8", 0),
        recovery("int4", 0),
        recovery("int8", 1),
        recovery("int4", 1),
        Quoted("2", ARTICLE),
        Measured(("quantization", "Measured: 1.5B", "`int8`", PERPLEXITY), least_and_most, table=1),
        Measured(
            ("quantization", "Measured: 1.5B", "`int4`, `awq+gptq`", PERPLEXITY),
            lambda column: [*least_and_most(column), *column.split(" / ")[2:]],
            table=1,
        ),
        Measured(("quantization", FOUR_TEXTS, "`int8`", PERPLEXITY), least_and_most),
        Measured(("quantization", FOUR_TEXTS, "`int8-w8a8`", PERPLEXITY), least_and_most),
        Computed("questions asked, docs/measured/quantization.json", all_questions, "{:.0f}"),
        Quoted("2", ARTICLE),
        Computed("those asked of int8", asked_of_int8, "{:.0f}"),
        Quoted("95", "the interval's level"),
        interval("`int8`"),
        Computed("questions asked, docs/measured/quantization.json", all_questions, "{:.0f}"),
        Computed("won by int4", lambda: won_and_lost("int4")["won"], "{:.0f}"),
        Computed("lost by int4", lambda: won_and_lost("int4")["lost"], "{:.0f}"),
        interval("`int4`"),
    ],
    "## The code": [Quoted("200", ARTICLE)],
    "12 / 45 / 52 ms of inference": [
        CONTEXT,
        *per_token_ms("int8", *MODELS),
        *per_token_ms("int4", *MODELS),
        *per_token_ms("fp16", *MODELS),
        Computed("1000 / EdgeReasoning's tok/s", lambda: 1e3 / reasoning_tps("Qwen-1.5B")),
        Computed("1000 / EdgeReasoning's tok/s", lambda: 1e3 / reasoning_tps("Llama-8B"), "{:.0f}"),
    ],
    "1.8 / 6.2 / 7.5 GB of memory": [
        CONTEXT,
        *process_gb("int4", *MODELS),
        *process_gb("int8", *MODELS),
        *process_gb("fp16", *MODELS),
    ],
    "MMLU 62.3 / 74.8 / 76.2 %": [
        Computed("MMLU_MEASURED in recommend.py", lambda: recommend.MMLU_MEASURED),
        Quoted("51.0 3,000", "EdgeReasoning, arXiv:2511.01866"),
    ],
    "the 7B keeps a fair latency at much better quality": [
        *per_token_ms("int8", "7b"),
        score("1.5b", "aime-2024"),
        score("7b", "aime-2024"),
    ],
    "the 8B is best at GSM8K and HumanEval": [
        score("7b", "math-500"),
        score("8b", "math-500"),
        score("7b", "aime-2024"),
        score("8b", "aime-2024"),
        score("8b", "livecodebench"),
        score("7b", "livecodebench"),
    ],
    "the 8B needs 15 GB in FP16": [weights_gb("fp16", "8b"), *process_gb("fp16", "8b")],
    "so an A100 with 40 GB": [USABLE, *process_gb("int4", "8b")],
    "INT4 makes the 7B 2.3 times as fast": [
        Computed(
            "tokens/s of INT4 over those of FP16",
            lambda: tokens_per_s("int4", "7b").value() / tokens_per_s("fp16", "7b").value(),
        ),
        tokens_per_s("fp16", "7b", form="{:.1f}"),
        tokens_per_s("int4", "7b", form="{:.1f}"),
    ],
    "and 2.8 GB large": [
        Computed(
            "weights of the linear layers, lm_head included",
            lambda: 1e-9 * parameters_in_linears("7b"),
            "{:.2f}",
        ),
        Computed("half a byte of each", lambda: 0.5e-9 * parameters_in_linears("7b")),
        Quoted("4", "bits of INT4"),
        weights_gb("int4", "7b"),
        *process_gb("int4", "7b"),
    ],
    "the 7B at batch 8: 120 tokens/s": [
        *(tokens_per_s(quant, "7b", 8) for quant in ("fp16", "int8", "int4")),
        Computed(
            "steady tok/s of 8 streams over those of 1, docs/measured/benchmarks.json",
            lambda: steady_tps("8") / steady_tps("1"),
        ),
    ],
    "the 1.5B reaches 8 fps on an AGX Orin": [
        *(tokens_per_s(quant, "1.5b") for quant in ("fp16", "int8", "int4")),
        Computed("EdgeReasoning's tok/s", lambda: reasoning_tps("Qwen-1.5B")),
    ],
    "the `trtexec` line with `--batch=1 --output=logits`": [
        Quoted("10.0", "release notes of TensorRT: removed with implicit batch")
    ],
    "fine-tune on an RTX 4090": [
        Computed("two bytes of each parameter of the 7B", lora_7b_gb),
        Computed("what is left of 24 GB", lambda: 24 - lora_7b_gb()),
        Quoted("24", "NVIDIA's GB of the card"),
    ],
    "the 7B needs two A100 with 80 GB, the 8B four or H100s": process_gb("fp16", "7b", "8b"),
    "the quantized 1.5B on an AGX Orin": [*process_gb("int4", "1.5b"), USABLE],
    "a persistent KV cache saves 30 % of repeated computation": [
        Recorded(
            "docs/serving-core.md",
            r"^\| (50) questions after one system prompt of 400 tokens \| ([\d.]+) %",
            lambda questions, share: [share, questions],
        ),
        Recorded(
            "docs/serving-core.md",
            r"^\| A chat of (8) turns \| ([\d.]+) %",
            lambda turns, share: [share, turns],
        ),
        Recorded(
            "docs/serving-core.md",
            r"^line in the log\..* (349) tokens of SmolLM2 \(16 MB\) load in (25) ms\n"
            r"instead of ([\d.]+) s of prefill",
        ),
    ],
    "distillation of the 8B into the 7B": [
        spec_field(model, "vocab_size") for model in ("7b", "8b")
    ],
    "little memory: the 1.5B in INT4; general: the 7B; precise: the 8B unquantized": [
        Computed(
            "TPOT of FP16 over that of INT8, edge-llm recommend",
            lambda: (
                per_token_ms("fp16", "8b")[0].value()  # type: ignore[union-attr]
                / per_token_ms("int8", "8b")[0].value()  # type: ignore[union-attr]
            ),
        ),
    ],
    "under 1 GB: the 1.5B quantized": [
        weights_gb("int4", "1.5b", "{:.2f}"),
        *process_gb("int4", "1.5b"),
    ],
    "else under 100 ms: the 7B quantized, else the 8B": [
        Printed(ORIN_100MS, f"candidates/deepseek-r1:{m}+int8-w8a8/tpot_s", scale=1e3)
        for m in ("7b", "8b-0528")
    ],
}

# ---- The pages ----

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:[.,]\d+)*|(?<=[\u3000-\uffef])\d+(?:[.,]\d+)*")
_NOT_FIGURES = re.compile(
    r"\]\([^)]*\)"  # where a link leads
    r"|arXiv:[\d.]+"
    r"|[\d.]+B(?![A-Za-z])"  # sizes in names of models
    r"|[A-Za-z]+[A-Za-z.-]*\d[\w.-]*"  # R1, INT4, SmolLM2-135M, P99
    r"|AIME 2024|RTX 4090|AGX Orin 64 GB|JetPack [\d.]+"
    r"|(?:\d+ )?(?:January|February|September) 2025|2025 年 \d+ 月(?: \d+ 日)?",
    re.ASCII,
)


def numbers(text: str) -> list[str]:
    return _NUMBER.findall(_NOT_FIGURES.sub(" ", SPAN.sub(" ", text)))


def units(path: Path) -> list[tuple[str, str]]:
    """Each row of a claim, and the prose under each heading: ``(key, text)``, in order."""
    text = FENCE.sub("", path.read_text("utf-8"))
    found = []
    for section in re.split(r"^(?=##* )", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        prose = "\n".join(line for line in body.splitlines() if not line.startswith("|"))
        found.append((heading.replace("### ", "## "), prose))
        found += [(cells[0], cells[-1]) for cells in rows(body)]
    return found


@pytest.mark.slow
def test_every_figure_is_held_against_its_source():
    english, chinese = map(units, PAGES)
    assert set(FIGURES) <= {key for key, _ in english}
    assert len(english) == len(chinese)
    for (key, text), (own_key, own_text) in zip(english, chinese, strict=True):
        sources = FIGURES.get(key, [])
        expected = [number for source in sources for number in source.texts()]
        proofs = "\n".join(f"{' '.join(source.texts())}: {source}" for source in sources)
        assert numbers(text) == expected, f"{ENGLISH.name}, {key}:\n{proofs}"
        assert numbers(own_text) == expected, f"{CHINESE.name}, {own_key}:\n{proofs}"
        assert sorted(numbers(own_key)) == sorted(numbers(key))
        assert sorted(SPAN.findall(own_text)) == sorted(SPAN.findall(text)), own_key


def test_every_claim_has_the_same_verdict_in_both_languages():
    verdicts = []
    for page in PAGES:
        known, claims = page.read_text("utf-8").split("\n## ", 1)
        order = [cells[0] for cells in rows(known)]
        found = [cells for cells in rows(claims) if len(cells) == 3 and cells[1] in order]
        assert {cells[1] for cells in found} == set(order)
        assert len(found) > 40
        verdicts.append([order.index(cells[1]) for cells in found])
        # Only the table of continual learning, the last one, has no verdicts.
        others = [cells for cells in rows(claims) if cells not in found]
        assert others == list(rows(claims.rsplit("\n## ", 1)[1]))
    assert verdicts[0] == verdicts[1]


def test_both_languages_have_the_same_code_and_links():
    assert blocks(ENGLISH, "python") == blocks(CHINESE, "python")
    assert blocks(ENGLISH, "sh") == blocks(CHINESE, "sh")
    led_to = [
        sorted(
            re.sub(r"\.zh-CN(?=\.md)|(?<=^#).*", "", target)  # each has its own headings
            for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
        )
        for page in PAGES
    ]
    assert led_to[0] == led_to[1]


@pytest.fixture
def cuda_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`DeepSeekModel` asks for a GPU and gets a CPU."""
    monkeypatch.setattr(deepseek, "LLM", lambda bundle, backend: LLM(bundle, backend="ort-cpu"))


def test_the_python_runs_as_it_is_printed(
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cuda_is_a_cpu: None,
):
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path))
    (tmp_path / "deepseek-r1-distill-qwen-7b-fp16").symlink_to(tiny_bundles("qwen2"))
    python = blocks(ENGLISH, "python")
    assert len(python) == 2
    for source in python:
        exec(compile(source, str(ENGLISH), "exec"), {})
        assert capsys.readouterr().out.strip()
