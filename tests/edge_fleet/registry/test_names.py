"""Which reference of a team's registry a model's bundle has."""

from __future__ import annotations

import pytest

from edge.bundle.library import CATALOGUE
from edge.bundle.manifest import Adapter, ReducedVocabulary, Source
from edge.errors import ConfigError
from edge_fleet.registry.names import TENSORRT, TeamRegistry, suffixes, takes, team_registry
from edge_make.published import PUBLISHED
from export.targets import TARGETS
from tests.makers.manifests import make_manifest

TEAM = TeamRegistry("registry.example:5000/models", None)


def test_each_jetpack_has_the_tensorrt_that_an_export_is_held_to():
    """The fleet knows no exporter, so the table is there twice."""
    jetpacks = {name: t.versions for name, t in TARGETS.items() if name.startswith("jetpack")}
    assert {name: (version,) for name, version in TENSORRT.items()} == jetpacks


@pytest.mark.parametrize(
    ("hub_id", "quantization", "reference"),
    [
        (CATALOGUE["deepseek-r1:1.5b"], "int8", "deepseek-r1:1.5b-int8"),
        (CATALOGUE["deepseek-r1:8b-0528"].lower(), "int8", "deepseek-r1:8b-0528-int8"),
        (PUBLISHED[CATALOGUE["deepseek-r1:7b"]], "source", "deepseek-r1:7b-source"),
        ("Qwen/Qwen3-8B", "int8", "qwen3:8b-int8"),
        ("meta-llama/Llama-3.2-3B-Instruct", "source", "llama3.2:3b-source"),
        ("Qwen/Qwen3-8B-Base", "int8", "qwen/qwen3-8b-base:int8"),
        ("a__b/c.d_e", "int8", "a__b/c.d_e:int8"),
    ],
)
def test_a_model_has_one_name(hub_id: str, quantization: str, reference: str):
    assert str(TEAM.reference(hub_id, quantization)) == f"{TEAM.place}/{reference}"


@pytest.mark.parametrize("own", PUBLISHED)
def test_a_model_and_what_others_quantized_share_no_name(own: str):
    """Or whoever pulls one by its hub id gets the other."""
    theirs = PUBLISHED[own]
    for quantization in ("int4", "source"):
        assert TEAM.reference(own, quantization) != TEAM.reference(theirs, quantization)


ADAPTER = Adapter("pirate", "0" * 64)
FEWER = ReducedVocabulary(100, 64, "words.txt", "0" * 64)


@pytest.mark.parametrize(
    ("adapter", "vocabulary", "why"),
    [
        (ADAPTER, None, "was made with the adapter pirate, so"),
        (None, FEWER, "was made with a reduced vocabulary, so"),
    ],
)
def test_a_changed_model_does_not_take_the_name_of_its_base(
    adapter: Adapter | None, vocabulary: ReducedVocabulary | None, why: str
):
    source = Source(kind="hub", location=CATALOGUE["deepseek-r1:1.5b"], adapter=adapter)
    manifest = make_manifest(source=source, vocabulary=vocabulary)
    with pytest.raises(ConfigError, match=f"{why} no short name means it; give a REFERENCE"):
        TEAM.reference_of(manifest)


def test_a_hub_id_that_no_registry_takes_is_refused():
    with pytest.raises(ConfigError, match="is no reference"):
        TEAM.reference("owner/-name", "int8")


@pytest.mark.parametrize(
    ("dialect", "versions", "suffix", "machines"),
    [
        ("native", ("10.16", "11.1"), "", ["jetpack7", None]),
        ("portable", ("10.3", "10.16"), "", ["jetpack6", "jetpack7", None]),
        ("portable", ("10.3",), "-jetpack6", ["jetpack6", None]),
        ("portable", ("10.16",), "-jetpack7", ["jetpack7", None]),
        ("portable", (), "", [None]),
    ],
)
def test_what_is_pushed_is_looked_for_by_the_machines_that_take_it(
    dialect: str, versions: tuple[str, ...], suffix: str, machines: list[str | None]
):
    source = Source(kind="hub", location=f"modelscope:{CATALOGUE['deepseek-r1:1.5b']}")
    manifest = make_manifest(dialect=dialect, tensorrt=versions, source=source)
    assert TEAM.reference_of(manifest).tag == f"1.5b-int4{suffix}"
    assert [m for m in ("jetpack6", "jetpack7", None) if takes(manifest, m)] == machines
    for machine in machines:
        assert suffix in suffixes(machine)


@pytest.mark.parametrize(
    ("text", "place", "plain"),
    [
        ("registry.example", "registry.example", None),
        ("registry.example:5000/a/b/", "registry.example:5000/a/b", None),
        ("http://registry.lan/a", "registry.lan/a", True),
        ("https://localhost:5000", "localhost:5000", False),
    ],
)
def test_the_variable_says_how_to_speak(
    monkeypatch: pytest.MonkeyPatch, text: str, place: str, plain: bool | None
):
    monkeypatch.setenv("EDGE_LLM_REGISTRY", text)
    assert team_registry() == TeamRegistry(place, plain)
    monkeypatch.setenv("EDGE_LLM_REGISTRY", "")
    assert team_registry() is None
