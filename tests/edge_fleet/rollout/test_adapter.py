"""Adapters alone pushed, pulled and rolled out, with a real registry and a model that answers."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge import LLM, SamplingParams
from edge.adapters.library import library, stored_adapters
from edge.adapters.trust import SIGNATURE_NAME
from edge.bundle import trust
from edge.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    GateError,
    IntegrityError,
    RegistryError,
    ResourceError,
)
from edge_fleet.cli.adapter import adapter as adapter_verb
from edge_fleet.registry.client import Registry, digest_of
from edge_fleet.registry.push import push as push_bundle
from edge_fleet.registry.reference import parse_reference
from edge_fleet.rollout import adapter as roll_outs
from edge_fleet.rollout.judge import LEAST_RIGHT, Candidate, WorseError
from edge_fleet.signing import sign_bundle
from edge_lab.measure.watch import _WORDS, BundleAnswerer
from export.pipeline import ExportConfig, export_checkpoint
from tests.edge_fleet.registry.live import SMALL, LiveRegistry, write_bundle
from tests.makers.keys import make_key, minisign
from tests.makers.tiny_adapters import write_adapter
from tests.makers.tiny_models import _write_safetensors, write_checkpoint

pytestmark = pytest.mark.live

FILES = ("adapter_config.json", "adapter_model.safetensors")
LINEARS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
ENGINE = ("--backend", "ort-cpu", "--num-threads", "1")
_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trust.KEYS_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "no-keys")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRegistry]:
    registry = LiveRegistry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.kill()


@pytest.fixture
def place(live: LiveRegistry) -> str:
    """A repository that no other test uses."""
    return f"{live.address}/team/legal-{next(_numbers)}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "base", "qwen2")


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "r1"
    export_checkpoint(
        ExportConfig(source=str(base), output=output, quant="fp16", kv_capacity=128, adapters=8)
    )
    return output


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A bundle of a test's own, so that what is kept beside it is, too."""
    return shutil.copytree(exported, tmp_path / "r1")


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter: a strong one changes every answer, and a weak one none."""

    def write(name: str = "legal", seed: int = 1, *, alpha: float = 64) -> Path:
        return write_adapter(tmp_path / name, base, {**LINEARS, "lora_alpha": alpha}, seed=seed)

    return write


@pytest.fixture(scope="module")
def golden(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model answers, where that has words; these are its right answers."""
    rows: list[dict[str, str]] = []
    with LLM(exported, num_threads=1) as llm:
        for prompt in (f"question {n}" for n in range(200)):
            text = BundleAnswerer(llm).answer(prompt, 12).text
            lines = [row for row in text.splitlines() if row]
            words = _WORDS.findall(lines[-1]) if lines else []
            if words:
                rows.append({"id": prompt, "prompt": prompt, "answer": " ".join(words)})
            if len(rows) == LEAST_RIGHT + 1:
                break
    path = tmp_path_factory.mktemp("golden") / "golden.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path.parent / "text.txt").write_text("The cat sat on the mat, and the rain went on. " * 5)
    return path


def run(*arguments: str | Path) -> Result:
    done = CliRunner().invoke(adapter_verb, [*map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def as_json(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def rollout(bundle: Path, golden: Path) -> Callable[..., Any]:
    def roll_out(reference: str, *options: str) -> Any:
        judged = ("--golden", golden, "--text", golden.parent / "text.txt", "--max-tokens", "12")
        return as_json("rollout", reference, bundle, "--name", "legal", *judged, *ENGINE, *options)

    return roll_out


def answer(bundle: Path, adapter: str | Path | None) -> list[int]:
    with LLM(bundle, num_threads=1) as llm:
        if isinstance(adapter, Path):
            adapter = llm.load_adapter(adapter, "given")
        return ids_of(llm, adapter)


def ids_of(llm: LLM, adapter: str | None) -> list[int]:
    return [token.id for token in llm.generate("hello", GREEDY, adapter=adapter).tokens]


def names(bundle: Path) -> list[str]:
    return sorted(path.name for path in library(bundle).iterdir() if path.name[0] != ".")


# ------------------------------------------------------------------------------- push and pull


def test_what_is_pulled_is_what_was_pushed(place: str, bundle: Path, make: Callable[..., Path]):
    adapter = make()
    pushed = as_json("push", adapter, f"{place}:v1")
    size = sum((adapter / name).stat().st_size for name in FILES)
    assert (pushed["num_bytes"], pushed["sent_bytes"], pushed["signed"]) == (size, size + 2, False)
    again = as_json("push", adapter / FILES[1], f"{place}:v1")
    assert again == {**pushed, "sent_bytes": 0}
    done = as_json("pull", f"{place}:v1", bundle, "--name", "legal")
    assert done["digest"] == pushed["reference"].partition("@")[2]
    stored = stored_adapters(bundle)["legal"]
    assert stored.resolve() == Path(done["path"])
    for name in FILES:
        assert (stored / name).read_bytes() == (adapter / name).read_bytes()
    assert answer(bundle, "legal") == answer(bundle, adapter) != answer(bundle, None)
    assert not as_json("pull", pushed["reference"], bundle, "--name", "legal")["changed"]


def test_other_clients_see_the_files_by_their_names(place: str, make: Callable[..., Path]):
    reference = parse_reference(f"{place}:v1")
    run("push", make(), str(reference))
    with Registry(reference) as registry:
        manifest = json.loads(registry.manifest("v1")[0])
    assert manifest["artifactType"] == "application/vnd.edge-llm.adapter.v1"
    titles = [each["annotations"]["org.opencontainers.image.title"] for each in manifest["layers"]]
    assert titles == [*FILES]


def test_the_name_is_the_repositorys_where_none_is_given(
    place: str, bundle: Path, make: Callable[..., Path]
):
    run("push", make(), f"{place}:v1")
    assert run("pull", f"{place}:v1", bundle).stdout.endswith(" (new)\n")
    assert list(stored_adapters(bundle)) == [place.rpartition("/")[2]]
    with pytest.raises(ConfigError, match="cannot be an adapter's name"):
        run("pull", f"{place}:v1", bundle, "--name", "../out")


def test_what_is_no_adapter_is_not_pushed(place: str, make: Callable[..., Path]):
    adapter = make()
    weights = (adapter / FILES[1]).read_bytes()
    (adapter / FILES[1]).write_bytes(weights[:-1])
    with pytest.raises(CheckpointError, match="its tensors end at"):
        run("push", adapter, f"{place}:v1")
    (adapter / FILES[1]).write_bytes(weights)
    config = json.loads((adapter / FILES[0]).read_text())
    (adapter / FILES[0]).write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        run("push", adapter, f"{place}:v1")
    (adapter / FILES[1]).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is pickled"):
        run("push", adapter, f"{place}:v1")
    with (
        pytest.raises(ConfigError, match="has no v1"),
        Registry(parse_reference(place)) as registry,
    ):
        registry.manifest("v1")


def test_a_bundle_is_no_adapter_and_an_adapter_no_bundle(
    place: str, bundle: Path, make: Callable[..., Path], tmp_path: Path
):
    reference = parse_reference(f"{place}:v1")
    with Registry(reference) as registry:
        push_bundle(write_bundle(tmp_path / "tiny", SMALL), reference, registry)
    with pytest.raises(CheckpointError, match=r"no adapter that edge-llm adapter push has sent"):
        run("pull", f"{place}:v1", bundle)
    assert not library(bundle).exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers[:1],
        lambda layers: [*layers, layers[0]],
        lambda layers: [*layers, {**layers[0], "annotations": {}}],
        lambda layers: [*layers, titled(layers[0], "../../evil")],
        lambda layers: [titled(layers[0], FILES[1]), titled(layers[1], FILES[0])],
    ],
    ids=["no weights", "twice", "untitled", "hostile", "swapped"],
)
def test_layers_that_make_no_adapter_are_refused(
    place: str, bundle: Path, make: Callable[..., Path], change: Callable[[Any], Any]
):
    reference = parse_reference(f"{place}:v1")
    run("push", make(), str(reference))
    with Registry(reference) as registry:
        manifest = json.loads(registry.manifest("v1")[0])
        manifest["layers"] = change(manifest["layers"])
        registry.put_manifest(json.dumps(manifest).encode(), "v1")
    with pytest.raises(CheckpointError, match="layers that do not make an adapter"):
        run("pull", f"{place}:v1", bundle, "--name", "legal")
    assert not library(bundle).exists()


def titled(layer: dict[str, Any], title: str) -> dict[str, Any]:
    return {**layer, "annotations": {"org.opencontainers.image.title": title}}


def test_what_arrives_damaged_is_not_put_in_place(
    live: LiveRegistry, place: str, bundle: Path, make: Callable[..., Path]
):
    run("push", make(seed=1), f"{place}:v1")
    run("pull", f"{place}:v1", bundle, "--name", "legal")
    before = names(bundle), answer(bundle, "legal")
    adapter = make("other", seed=99)  # whose blob no other test pushes
    run("push", adapter, f"{place}:v2")
    blob = live.blob(digest_of((adapter / FILES[1]).read_bytes()))
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises((IntegrityError, RegistryError)):
        run("pull", f"{place}:v2", bundle, "--name", "legal")
    assert (names(bundle), answer(bundle, "legal")) == before


def test_an_adapter_that_does_not_fit_the_bundle_leaves_nothing(
    place: str, bundle: Path, base: Path, tmp_path: Path
):
    high = write_adapter(tmp_path / "high", base, {**LINEARS, "r": 16})
    run("push", high, f"{place}:v1")
    with pytest.raises(CheckpointError, match="rank 16"):
        run("pull", f"{place}:v1", bundle, "--name", "legal")
    assert names(bundle) == []


def test_a_bundle_that_takes_none_says_so(
    place: str, tiny_bundles: Any, make: Callable[..., Path], tmp_path: Path
):
    run("push", make(), f"{place}:v1")
    plain = shutil.copytree(tiny_bundles("qwen2"), tmp_path / "plain")
    with pytest.raises(ConfigError, match="takes no adapters"):
        run("pull", f"{place}:v1", plain, "--name", "legal")


def test_a_signature_of_minisign_is_asked_for_where_keys_are_trusted(
    place: str, bundle: Path, make: Callable[..., Path], tmp_path: Path
):
    secret, public = tmp_path / "a.key", tmp_path / "a.pub"
    assert minisign("-G", "-W", "-s", secret, "-p", public).returncode == 0
    public.chmod(0o644)
    trusted = ("--name", "legal", "--trusted-keys", str(public))
    adapter = make()
    run("push", adapter, f"{place}:v1")
    with pytest.raises(CheckpointError, match="it is not signed"):
        run("pull", f"{place}:v1", bundle, *trusted)
    assert names(bundle) == []
    hashes = [hashlib.sha256((adapter / name).read_bytes()).hexdigest() for name in FILES]
    sums = adapter / "SHA256SUMS"
    sums.write_text("".join(f"{h}  {name}\n" for h, name in zip(hashes, FILES, strict=True)))
    assert minisign("-S", "-s", secret, "-m", sums).returncode == 0
    assert as_json("push", adapter, f"{place}:v1")["signed"]
    run("pull", f"{place}:v1", bundle, *trusted)
    assert (stored_adapters(bundle)["legal"] / SIGNATURE_NAME).is_file()
    other = make("other", seed=2)
    shutil.copyfile(adapter / SIGNATURE_NAME, other / SIGNATURE_NAME)
    run("push", other, f"{place}:v2")
    before = names(bundle)
    with pytest.raises(CheckpointError, match="is not of these bytes"):
        run("pull", f"{place}:v2", bundle, *trusted)
    assert names(bundle) == before


# ------------------------------------------------------------------------------- in its place


def test_one_that_adapter_add_copied_is_replaced_and_comes_back(
    place: str, bundle: Path, make: Callable[..., Path]
):
    old, new = make("old", seed=1), make("new", seed=2)
    run("add", old, bundle, "--name", "legal")
    run("push", new, f"{place}:v2")
    with LLM(bundle, num_threads=1) as llm:
        was = ids_of(llm, "legal")
        run("pull", f"{place}:v2", bundle, "--name", "legal")
        assert ids_of(llm, "legal") == answer(bundle, new) != was
        assert run("rollback", "legal", bundle).stdout == "legal: legal@added again\n"
        assert ids_of(llm, "legal") == was
    with pytest.raises(ConfigError, match="has had no other version since it was last rolled back"):
        run("rollback", "legal", bundle)
    run("rm", "legal", bundle)
    assert names(bundle) == []


def test_there_is_no_moment_without_the_adapter_and_none_with_halves_of_two(
    place: str, bundle: Path, make: Callable[..., Path]
):
    """The two differ in their scale, which is in the config, and in their weights."""
    versions = [make("one", seed=1, alpha=64), make("two", seed=2, alpha=16)]
    for number, version in enumerate(versions):
        run("push", version, f"{place}:v{number}")
    run("add", versions[0], bundle, "--name", "legal")
    digests: set[str] = set()
    is_over = threading.Event()

    def look(llm: LLM) -> None:
        while not is_over.is_set():
            digests.add(llm.adapters.find("legal").digest)

    with LLM(bundle, num_threads=1) as llm, ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look, llm)
        try:
            for number in (1, 0, 1, 0):
                run("pull", f"{place}:v{number}", bundle, "--name", "legal")
        finally:
            is_over.set()
        looking.result()
        own = {llm.adapters.read(version, "own").digest for version in versions}
    assert digests <= own


def test_the_one_before_is_kept_and_those_before_it_go(
    place: str, bundle: Path, make: Callable[..., Path]
):
    found = []
    for number in (1, 2, 3):
        run("push", make(f"v{number}", seed=number), f"{place}:v{number}")
        done = as_json("pull", f"{place}:v{number}", bundle, "--name", "legal")
        found.append(Path(done["path"]).name)
    run("pull", f"{place}:v1", bundle, "--name", "legal-eu")  # of which nothing is removed
    assert {"legal", *found[1:]} <= set(names(bundle))
    assert found[0] not in names(bundle)
    run("pull", f"{place}:v3", bundle, "--name", "legal")
    assert answer(bundle, "legal-eu") != answer(bundle, "legal")


def test_a_refused_way_back_leaves_what_rollback_goes_to(
    place: str,
    bundle: Path,
    make: Callable[..., Path],
    rollout: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
):
    for number in (1, 2):
        run("push", make(f"v{number}", seed=number), f"{place}:v{number}")
        run("pull", f"{place}:v{number}", bundle, "--name", "legal")
    before = names(bundle)

    def refuse(*_: object) -> None:
        raise WorseError("worse")

    monkeypatch.setattr(roll_outs, "_judge", refuse)
    with pytest.raises(GateError, match=r"is rejected, and the old one stays in use: worse"):
        rollout(f"{place}:v1")
    assert names(bundle) == before
    run("rollback", "legal", bundle)
    assert answer(bundle, "legal") == answer(bundle, make("v1"))


def test_what_an_ended_pull_left_is_neither_listed_nor_used(
    place: str, bundle: Path, make: Callable[..., Path]
):
    digest = as_json("push", make(), f"{place}:v1")["reference"].partition("@sha256:")[2]
    half = library(bundle) / f"legal@{digest[:12]}"
    half.mkdir(parents=True)
    (half / FILES[1]).write_bytes(b"half")
    assert not stored_adapters(bundle)
    run("pull", f"{place}:v1", bundle, "--name", "legal")
    assert answer(bundle, "legal")


def test_a_directory_that_nobody_may_write_is_said(
    place: str, bundle: Path, make: Callable[..., Path]
):
    run("push", make(), f"{place}:v1")
    library(bundle).mkdir()
    (library(bundle) / ".legal.edge-llm-rollout").write_text("in the way")
    with pytest.raises(ResourceError, match=r"cannot write .*: File exists; free disk space"):
        run("pull", f"{place}:v1", bundle, "--name", "legal")


# ------------------------------------------------------------------------------- judged


def spoil(adapter: Path) -> Path:
    """Give an adapter a B of large random numbers."""
    random = np.random.default_rng(0)
    path = adapter / FILES[1]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    weights = {
        name: random.normal(0, 30, entry["shape"]).astype(np.float16).astype(np.float32)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _write_safetensors(path, weights, "fp16")
    return adapter


def test_a_good_one_is_taken_and_a_bad_one_refused_while_the_good_one_serves(
    place: str, bundle: Path, rollout: Callable[..., Any], make: Callable[..., Path]
):
    run("push", make("good", alpha=2**-8), f"{place}:v1")
    assert rollout(f"{place}:v1")["changed"]
    assert not rollout(f"{place}:v1")["changed"]
    run("push", make("better", seed=2, alpha=2**-8), f"{place}:v2")
    second = rollout(f"{place}:v2")
    before = names(bundle)
    run("push", spoil(make("bad", seed=3)), f"{place}:stable")
    with pytest.raises(
        GateError, match=r"is rejected, and the old one stays in use: golden set: wrong_rate 1"
    ):
        rollout(f"{place}:stable")
    assert GateError.exit_code == 3
    with pytest.raises(GateError, match=r"was rejected before, .*; --retry tries it again"):
        rollout(f"{place}:stable")
    with pytest.raises(GateError, match="is rejected"):
        rollout(f"{place}:stable", "--retry")
    assert names(bundle) == before
    assert stored_adapters(bundle)["legal"].resolve() == Path(second["path"])
    run("rollback", "legal", bundle)  # the refused one is not what there was before
    with pytest.raises(GateError, match="it was rolled back"):
        rollout(f"{place}:v2")
    run("pull", f"{place}:stable", bundle, "--name", "legal")  # as who pulls it wants it


def test_the_golden_set_refuses_what_the_texts_let_pass(
    place: str, bundle: Path, rollout: Callable[..., Any], make: Callable[..., Path]
):
    run("push", make("bad", alpha=64), f"{place}:v1")
    with pytest.raises(GateError, match=r"golden set: .* with r1"):
        rollout(f"{place}:v1", "--perplexity-ratio", "1000")
    assert not stored_adapters(bundle)
    with pytest.raises(GateError, match="was rejected before"):
        rollout(f"{place}:v1", "--gate", "perplexity", "--perplexity-ratio", "1000")
    done = rollout(f"{place}:v1", "--gate", "perplexity", "--perplexity-ratio", "1000", "--retry")
    assert done["changed"]


def test_what_each_loses_a_little_of_is_held_to_the_first(
    place: str,
    bundle: Path,
    rollout: Callable[..., Any],
    make: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    nats: dict[str | None, float] = {}

    def read(who: Candidate, *_: object) -> list[tuple[float, int]]:
        return [(nats[who.adapter.name if who.adapter else None], 100)]

    monkeypatch.setattr(Candidate, "read", read)
    nats[None] = 500.0
    for number, found in enumerate((490.0, 496.0, 502.0), 1):  # each e^0.06 times the one before
        digest = as_json("push", make(f"v{number}", seed=number), f"{place}:v{number}")
        nats[f"legal@{digest['reference'].partition('@sha256:')[2][:12]}"] = found
    texts = ("--gate", "perplexity")
    first = rollout(f"{place}:v1", *texts)
    rollout(f"{place}:v2", *texts)
    with pytest.raises(GateError, match=rf"times that of r1:{Path(first['path']).name} on"):
        rollout(f"{place}:v3", *texts)


def test_the_candidate_is_measured_with_its_adapter(
    bundle: Path, make: Callable[..., Path], golden: Path
):
    """A text's likelihood is what the answers' own scores say, with the adapter and without."""
    from edge.engine_config import EngineConfig
    from edge_fleet.rollout.judge import Gate, Judge
    from edge_make.progress import silent

    judge = Judge(Gate((golden.parent / "text.txt",), golden=golden, max_tokens=12), silent)
    who = Candidate(bundle, EngineConfig(backend="ort-cpu", num_threads=1), None)
    plain, tuned = judge.read(None, who), judge.read(None, replace(who, adapter=make()))
    empty = judge.read(None, replace(who, adapter=make("weak", alpha=0)))
    assert empty.nats == plain.nats != tuned.nats
    asked = [
        judge.ask(each, replace(who, adapter=path)).golden
        for each, path in ((plain, None), (tuned, make()), (empty, make("weak", alpha=0)))
    ]
    right = [[item.correct for item in each.items] for each in asked if each is not None]
    assert right[0] == right[2] != right[1]
    assert all(right[0])


def test_where_memory_holds_no_judge_nothing_is_judged(
    place: str,
    rollout: Callable[..., Any],
    make: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    run("push", make(alpha=0.25), f"{place}:v1")
    monkeypatch.setattr(roll_outs, "has_room", lambda *_: False)
    with pytest.raises(ResourceError, match=r"memory does not hold a second r1.*adapter pull"):
        rollout(f"{place}:v1")


def test_a_judge_opens_no_bundle_that_nobody_signed(
    place: str,
    bundle: Path,
    rollout: Callable[..., Any],
    make: Callable[..., Path],
    tmp_path: Path,
):
    key = make_key()
    keys = tmp_path / "keys"
    keys.write_text(key.public_text)
    keys.chmod(0o644)
    adapter = make(alpha=0.25)
    hashes = [hashlib.sha256((adapter / name).read_bytes()).hexdigest() for name in FILES]
    sums = "".join(f"{h}  {name}\n" for h, name in zip(hashes, FILES, strict=True))
    (adapter / SIGNATURE_NAME).write_bytes(key.sign(sums.encode(), "of a test"))
    run("push", adapter, f"{place}:v1")
    with pytest.raises(BundleError, match=r"r1 is not signed"):
        rollout(f"{place}:v1", "--trusted-keys", str(keys))
    sign_bundle(bundle, key, "of a test", None)
    assert rollout(f"{place}:v1", "--trusted-keys", str(keys))["changed"]
