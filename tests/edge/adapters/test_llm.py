"""An open bundle with adapters as peft writes them: logits, answers, and what comes and goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from edge import LLM, SamplingParams
from edge.adapters import loaded
from edge.adapters.library import check_name, library
from edge.adapters.loaded import Adapters
from edge.bundle.manifest import read_manifest
from edge.cli.run import run as run_verb
from edge.errors import CheckpointError, ConfigError, RequestError
from edge.runtime.ask import Ask
from edge.runtime.scheduler import Request
from edge.runtime.scheduler.pooling import NEUTRAL
from edge.runtime.stream import OutputStream, submit
from edge_lab.cli.adapter import adapter as adapter_verb
from edge_make.adapter_library import add_adapter
from export.pipeline import ExportConfig, export_checkpoint
from tests.makers.goldens import assert_close
from tests.makers.tiny_adapters import GOLDEN, golden_ids, write_adapter, write_case
from tests.makers.tiny_models import write_checkpoint

RANK = 8
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FP32_ATOL = 1e-4
OPTIONS: Any = {"num_threads": 1, "int8_activations": False}


def export(checkpoint: Path, output: Path, adapters: int | None = RANK, **options: Any) -> Path:
    config = ExportConfig(
        source=str(checkpoint),
        output=output,
        quant="fp16",
        kv_capacity=128,
        adapters=adapters,
        **options,
    )
    export_checkpoint(config)
    return output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "base", "qwen2")


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(base, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(root / f"a{n}", base, {"target_modules": LINEARS, "lora_alpha": 64}, seed=n)
        for n in range(5)
    ]


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A bundle of a test's own, so that what is kept beside it is, too."""
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


def logits_of(llm: LLM, ids: NDArray[np.int64], adapter: str | None) -> NDArray[np.float32]:
    """Logits of every place of a prompt, as the scheduler computes them."""
    found: list[NDArray[np.float32]] = []
    request = Request(
        ids=tuple(ids.tolist()),
        params=NEUTRAL,
        end_ids=frozenset(),
        adapter=llm.adapter_of(Ask("", adapter=adapter)),
        on_logits=lambda _, logits: found.append(logits.copy()),
    )
    (generation,) = submit(llm.scheduler, [request], [OutputStream()])
    generation.result()
    return np.concatenate(found)


def ids_of(llm: LLM, prompt: str, adapter: str | None) -> list[int]:
    return [token.id for token in llm.generate(prompt, GREEDY, adapter=adapter).tokens]


# ------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("dialect", ["portable", "native"])
@pytest.mark.parametrize("name", ["qwen2 all linears", "qwen2 patterns", "llama rslora, one layer"])
def test_logits_are_pefts_and_those_without_are_the_plain_bundles(
    name: str, dialect: Any, tmp_path: Path
):
    model, adapter = write_case(tmp_path, name)
    ids = golden_ids()
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    with LLM(export(model, tmp_path / "plain", None, dialect=dialect), **OPTIONS) as llm:
        plain = logits_of(llm, ids, None)
    with LLM(export(model, tmp_path / "bundle", dialect=dialect), **OPTIONS) as llm:
        assert llm.load_adapter(adapter) == "tuned"
        assert_close(logits_of(llm, ids, "tuned"), expected, atol=FP32_ATOL, what="logits")
        np.testing.assert_array_equal(logits_of(llm, ids, None), plain)
    assert np.abs(plain - expected).max() > 100 * FP32_ATOL


def test_eight_answers_with_five_adapters_are_each_as_alone(bundle: Path, adapters: list[Path]):
    names = ["a0", None, "a1", "a2", "a0", "a3", None, "a4"]
    prompts = [f"tell me {index % 3}" for index in range(8)]
    with LLM(bundle, num_slots=8, **OPTIONS) as llm:
        for path in adapters:
            llm.load_adapter(path)
        alone = [ids_of(llm, prompt, name) for prompt, name in zip(prompts, names, strict=True)]
        coming = [
            llm.submit(prompt, GREEDY, adapter=name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        together = [[token.id for token in each.result().tokens] for each in coming]
        assert llm.scheduler.stats().cached_tokens
    assert together == alone
    assert len({tuple(ids) for ids in alone[:4]}) == 4, "adapters that change nothing prove nothing"


def test_drafts_change_no_answer_with_an_adapter(bundle: Path, adapters: list[Path]):
    names = ["a0", None, "a1", "a0"]

    def answers(**options: Any) -> tuple[list[list[int]], int]:
        with LLM(bundle, num_slots=4, **OPTIONS, **options) as llm:
            for path in adapters[:2]:
                llm.load_adapter(path)
            coming = [llm.submit("again and again", LONG, adapter=name) for name in names]
            found = [[token.id for token in each.result().tokens] for each in coming]
            return found, llm.scheduler.stats().accepted_tokens

    plain, _ = answers()
    drafted, accepted = answers(speculative=3)
    assert drafted == plain
    assert accepted, "drafts that are never right prove nothing"
    assert plain[0] == plain[3] != plain[2]


def test_an_adapter_that_is_taken_away_ends_its_answers_as_they_began(
    bundle: Path, adapters: list[Path]
):
    with LLM(bundle, num_slots=2, **OPTIONS) as llm:
        llm.load_adapter(adapters[0], "mine")
        whole = ids_of(llm, "go on", "mine")
        other = ids_of(llm, "go on", None)
        stream = llm.stream("go on", GREEDY, adapter="mine")
        first = next(stream)
        llm.unload_adapter("mine")
        llm.load_adapter(adapters[1], "mine")  # another one of its name does not matter either
        rest = [token.id for chunk in stream for token in chunk.tokens]
        assert [token.id for token in first.tokens] + rest == whole != other
        assert ids_of(llm, "go on", "mine") not in (whole, other)
        llm.unload_adapter("mine")
        with pytest.raises(RequestError, match="there is no adapter 'mine'; there are: none"):
            llm.generate("go on", adapter="mine")
        with pytest.raises(RequestError, match="no adapter 'mine' was loaded"):
            llm.unload_adapter("mine")


def test_a_bundle_exported_without_adapters_takes_none(
    base: Path, adapters: list[Path], tmp_path: Path
):
    with LLM(export(base, tmp_path / "plain", None), **OPTIONS) as llm:
        with pytest.raises(ConfigError, match="takes no adapters; export it with --adapters RANK"):
            llm.load_adapter(adapters[0])
        with pytest.raises(RequestError, match="there is no adapter 'x'"):
            llm.generate("a", adapter="x")


# ------------------------------------------------------------------------------- beside the bundle


def test_add_list_run_and_rm(bundle: Path, adapters: list[Path]):
    def verb(*arguments: object) -> str:
        result = CliRunner().invoke(adapter_verb, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    weights = adapters[1] / "adapter_model.safetensors"
    assert "added one (rank 4)" in verb("add", adapters[0], bundle, "--name", "one")
    assert "added a1 (rank 4)" in verb("add", weights, bundle)
    listed = json.loads(verb("list", bundle, "--json"))["adapters"]
    assert [each["name"] for each in listed] == ["a1", "one"]
    assert listed[0]["num_bytes"] > weights.stat().st_size
    with pytest.raises(ConfigError, match="has an adapter 'one' already"):
        verb("add", adapters[2], bundle, "--name", "one")
    answers = set()
    for chosen in ([], ["--adapter", "one"], ["--adapter", str(adapters[0])], ["--adapter", "a1"]):
        result = CliRunner().invoke(
            run_verb,
            [str(bundle), "hello", "--raw", "--temperature", "0", "--max-tokens", "12", *chosen],
            catch_exceptions=False,
        )
        assert result.exit_code == 0, result.output
        answers.add(result.stdout)
    assert len(answers) == 3, "by its name and by its path it is the same one"
    verb("rm", "one", bundle)
    with pytest.raises(RequestError, match="no adapter 'one'; there are: a1"):
        verb("rm", "one", bundle)
    assert library(bundle).name == "bundle.adapters"
    read_manifest(bundle)


def test_an_adapter_that_does_not_fit_is_not_added(bundle: Path, base: Path, tmp_path: Path):
    wide = write_adapter(tmp_path / "wide", base, {"target_modules": ["q_proj"], "r": 16})
    with pytest.raises(CheckpointError, match=r"has rank 16.* rank 8 at most"):
        CliRunner().invoke(adapter_verb, ["add", str(wide), str(bundle)], catch_exceptions=False)
    assert not library(bundle).exists()


def test_a_change_on_disk_counts_from_the_next_answer(bundle: Path, adapters: list[Path]):
    with LLM(bundle, **OPTIONS) as llm:
        add_adapter(bundle, adapters[0], "mine")
        first = ids_of(llm, "go", "mine")
        assert llm.adapters.names == ["mine"]
        shutil.rmtree(library(bundle) / "mine")
        with pytest.raises(RequestError, match="no adapter 'mine'"):
            ids_of(llm, "go", "mine")
        add_adapter(bundle, adapters[1], "mine")
        assert ids_of(llm, "go", "mine") != first


def test_of_those_beside_the_bundle_the_last_used_stay_in_memory(
    bundle: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
):
    for number in range(3):
        add_adapter(bundle, adapters[number], f"a{number}")
    opened = Adapters(bundle, read_manifest(bundle))
    first = opened.find("a0")
    monkeypatch.setattr(loaded, "MOST_BYTES", 2 * first.num_bytes)
    second = opened.find("a1")
    assert opened.find("a0") is first
    opened.find("a2")  # for which a1 goes, whose last use is the longest ago
    assert opened.find("a0") is first
    again = opened.find("a1")
    assert again is not second
    assert again.digest == second.digest
    monkeypatch.setattr(loaded, "MOST_BYTES", 0)
    assert opened.find("a1") is opened.find("a1"), "one stays, however large"
    assert opened.find("a2") is opened.find("a2")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", ".a", "-a", "a b", "ä", "a\n", "a" * 65]
)
def test_hostile_names_are_refused(bundle: Path, adapters: list[Path], name: str):
    with pytest.raises(ConfigError, match="cannot be an adapter's name"):
        check_name(name)
    with pytest.raises(ConfigError, match="cannot be an adapter's name"):
        add_adapter(bundle, adapters[0], name)
    with pytest.raises(RequestError, match="there is no adapter"):
        Adapters(bundle, read_manifest(bundle)).find(name)
    assert not library(bundle).exists()
