"""What a build vouches for, and what it takes for its own."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.bundle import engine_records, trust
from edge.bundle.engine_file import find_engines, read_engine_info
from edge.bundle.engine_records import ENGINE_SIGNATURE, RECORDS_VARIABLE, UnvouchedError
from edge.bundle.manifest import read_manifest
from edge.device.gpu import Gpu
from edge.errors import ConfigError
from edge_fleet.signing import sign_bundle, sign_engine
from engines.build_plan import plan_build
from engines.builder import by_trtexec, fallbacks
from engines.builder.build import BuildResult, build_engine
from engines.builder.store import TIMING_CACHE, EngineStore
from engines.builder.target import Target
from engines.compiler import compat
from engines.compiler.compat import TensorRT
from engines.config import BuildConfig
from engines.trtexec.command import TrtexecResult
from tests.makers.keys import Key, make_key
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import fake_plan, make_module


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(trust.KEYS_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "etc-keys")
    monkeypatch.setattr(engine_records, "DEFAULT_RECORDS", tmp_path / "none")
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "records"))
    return tmp_path / "records"


@pytest.fixture
def key() -> Key:
    return make_key()


@pytest.fixture
def keys(tmp_path: Path, key: Key, bundle: Path) -> Path:
    """Keys that this machine trusts once `trust_keys` says so; one has signed the bundle."""
    path = tmp_path / "trusted-keys"
    path.write_text(key.public_text)
    path.chmod(0o644)
    sign_bundle(bundle, key, "the vendor's")
    return path


@pytest.fixture
def target(gpu: FakeGpu) -> Target:
    return Target(TensorRT(make_module(gpu), "tensorrt", "10.16.2.10"), Gpu("Orin", "8.7"), "8.7")


def build(bundle: Path, target: Target, **options: Any) -> BuildResult:
    """As by a process of its own."""
    engine_records.built_here.clear()
    done = build_engine(BuildConfig(bundle, max_prefill=32, **options), target=target)
    engine_records.built_here.clear()
    return done


def recorded(records: Path) -> set[str]:
    return {path.name for path in records.iterdir()} if records.exists() else set()


def hashes(directory: Path) -> set[str]:
    return {
        hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("engine.json", TIMING_CACHE)
    }


def test_a_build_is_recorded_whether_keys_are_trusted_or_not(
    bundle: Path, target: Target, records: Path, keys: Path
) -> None:
    """So that a policy can be turned on later; what is replaced is vouched for no longer."""
    done = build(bundle, target)
    assert recorded(records) == hashes(done.directory)
    assert read_engine_info(done.directory, keys) == done.info
    done = build(bundle, target, opt_level=1)
    assert recorded(records) == hashes(done.directory)
    assert read_engine_info(done.directory, keys) == done.info
    assert {stat.S_IMODE(path.stat().st_mode) for path in records.iterdir()} == {0o644}


def test_an_untrusted_engine_is_not_up_to_date(
    bundle: Path,
    target: Target,
    records: Path,
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Anybody can compute the key of a build, and have its layers asked for."""
    first = build(bundle, target)
    planted = msgspec.structs.replace(first.info, compiled=(), created="2099-01-01")
    (first.directory / "engine.json").write_bytes(msgspec.json.encode(planted))
    timings = recorded(records)
    asked: list[object] = []
    inspect = compat.inspect_plan

    def asks(*args: Any) -> Any:
        asked.append(args)
        return inspect(*args)

    monkeypatch.setattr(compat, "inspect_plan", asks)
    found = build(bundle, target)
    assert (found.built, found.info, asked) == (False, planted, [])
    assert recorded(records) == timings  # nobody vouches for it now either
    monkeypatch.setenv(trust.KEYS_VARIABLE, str(keys))
    again = build(bundle, target)
    assert again.built
    assert again.info.created != "2099-01-01"
    assert "nobody vouches for it" in caplog.text
    assert not build(bundle, target).built


def test_timings_that_came_with_the_bundle_are_not_given_to_tensorrt(
    bundle: Path, target: Target, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = build(bundle, target).directory
    store = EngineStore(bundle, directory.name)
    own = (directory / TIMING_CACHE).read_bytes()
    planted = own.replace(b"1", b"7")
    assert planted != own
    (directory / TIMING_CACHE).write_bytes(planted)
    assert store.read_timings() == planted
    monkeypatch.setenv(trust.KEYS_VARIABLE, str(keys))
    assert store.read_timings() is None
    (directory / TIMING_CACHE).write_bytes(own)
    assert store.read_timings() == own
    named = bundle.parent / "timings"
    named.write_bytes(planted)
    chosen = EngineStore(bundle, directory.name, named)
    assert chosen.read_timings() == planted  # the user said so


def test_a_build_that_cannot_be_recorded_is_refused_early(
    bundle: Path,
    target: Target,
    records: Path,
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    records.mkdir()
    records.chmod(0o777)
    reason = rf"others \(mode 0777\) can change {records}"
    done = build(bundle, target)
    assert done.built
    (line,) = [each for each in caplog.messages if "record" in each]
    assert line.startswith("the engine will not run once this machine trusts keys: no record")
    with pytest.raises(UnvouchedError):
        read_engine_info(done.directory, keys)
    monkeypatch.setenv(trust.KEYS_VARIABLE, str(keys))
    with monkeypatch.context() as patch:
        patch.setattr(fallbacks, "compile_bundle", None)
        with pytest.raises(ConfigError, match=reason):
            build(bundle, target)
    records.chmod(0o755)
    assert build(bundle, target).built
    read_engine_info(done.directory, keys)


def test_a_signature_is_removed_with_its_engine(bundle: Path, target: Target, key: Key) -> None:
    directory = build(bundle, target).directory
    sign_engine(directory, key, "the operator's")
    assert not build(bundle, target).built
    assert (directory / ENGINE_SIGNATURE).exists()
    build(bundle, target, opt_level=1)
    assert not (directory / ENGINE_SIGNATURE).exists()


def test_an_engine_by_trtexec_is_recorded_too(
    bundle: Path, target: Target, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(argv: list[str], _keep: Any) -> TrtexecResult:
        options = dict(word.partition("=")[::2] for word in argv)
        Path(options["--saveEngine"]).write_bytes(plan)
        return TrtexecResult(1.0, "10.16.2.10", None, None)

    config = BuildConfig(bundle, max_prefill=32)
    plan = bytes(fake_plan(plan_build(config, read_manifest(bundle))))
    monkeypatch.setattr(by_trtexec, "run_trtexec", runs)
    monkeypatch.setenv(trust.KEYS_VARIABLE, str(keys))
    engine_records.built_here.clear()
    done = build_engine(config, target=target, via="trtexec")
    engine_records.built_here.clear()
    assert done.info.builder == "trtexec"
    assert read_engine_info(done.directory, keys) == done.info


def test_trial_variants_leave_no_record(
    bundle: Path, target: Target, records: Path, keys: Path
) -> None:
    done = build(bundle, target)
    before = recorded(records)
    plan = (done.directory / done.info.plan).read_bytes()
    store = EngineStore(bundle, ".tune-0")
    store.commit(plan, lambda *_: msgspec.structs.replace(done.info, key=".tune-"))
    assert recorded(records) == before
    read_engine_info(store.directory, keys)  # this process made it
    engine_records.built_here.clear()
    with pytest.raises(UnvouchedError):
        read_engine_info(store.directory, keys)
    assert find_engines(bundle) == [done.directory]
