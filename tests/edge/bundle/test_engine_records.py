"""Whose engines run where keys are trusted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edge.backends.tensorrt import plugins
from edge.backends.tensorrt.engine import choose_engine
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle import engine_records, trust
from edge.bundle.engine_file import ENGINE_JSON, read_engine_bytes, read_engine_info
from edge.bundle.engine_records import (
    BUILDERS_VARIABLE,
    ENGINE_SIGNATURE,
    RECORDS_VARIABLE,
    UnvouchedError,
    record_directories,
    who_vouches,
)
from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError, IntegrityError
from edge_fleet.signing import sign_engine
from edge_make.engine_record import record_engine
from tests.conftest import RUNNABLE, Bundles
from tests.makers.keys import Key, make_key
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import emptied, install, write_engine

SIZES: dict[str, Any] = {"max_prefill": 24, "kv_capacity": 128, "kv_buckets": (16, 64, 128)}
NOT_ROOT = os.geteuid() != 0


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has built nothing, and trusts nobody yet."""
    for name in (trust.KEYS_VARIABLE, BUILDERS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "etc-keys")
    monkeypatch.setattr(engine_records, "DEFAULT_RECORDS", tmp_path / "var-records")
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "records"))
    return tmp_path / "records"


@pytest.fixture
def key() -> Key:
    return make_key()


@pytest.fixture
def keys(tmp_path: Path, key: Key) -> Path:
    path = tmp_path / "trusted-keys"
    path.write_text(key.public_text)
    path.chmod(0o644)
    return path


@pytest.fixture
def bundle(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2", RUNNABLE), tmp_path / "bundle"))


@pytest.fixture
def own(bundle: Path, records: Path) -> Path:
    """An engine that this machine built, in another process."""
    return write_engine(bundle, name="own", max_batch=1, **SIZES)


@pytest.fixture
def theirs(bundle: Path, records: Path, tmp_path: Path) -> Path:
    """One of another machine, which every rule of rank puts first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RECORDS_VARIABLE, str(tmp_path / "their-records"))
        return write_engine(bundle, name="theirs", max_batch=4, created="2099-01-01", **SIZES)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    device = FakeGpu()
    install(monkeypatch, device)
    with emptied(device):
        yield device


@pytest.fixture(autouse=True)
def another_process(own: Path, theirs: Path) -> None:
    """What this process built is trusted without a record; here others built all."""
    engine_records.built_here.clear()


def chosen(bundle: Path, keys: Path | None) -> str:
    found = choose_engine(bundle, read_manifest(bundle), "8.7", num_slots=4, trusted_keys=keys)
    return found.directory.name


def record_of(records: Path, engine: Path) -> Path:
    (found,) = [path for path in records.iterdir() if ENGINE_JSON in path.read_text()]
    assert str(engine) in found.read_text()
    return found


def test_a_strangers_engine_that_ranks_first_does_not_run(
    bundle: Path, keys: Path, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    assert chosen(bundle, None) == "theirs"  # without a policy nobody is asked
    assert not caplog.text
    assert chosen(bundle, keys) == "own"
    (line,) = caplog.messages
    assert f"{bundle}/engines/theirs is passed over" in line
    assert f"edge-llm build {bundle}, or" in line
    assert f"edge-llm bundle sign {bundle} --engine theirs" in line
    with closing(TensorRTBackend(bundle, read_manifest(bundle), trusted_keys=keys)) as backend:
        assert backend.engine_dir.name == "own"


def test_the_machines_policy_counts_without_an_option(
    bundle: Path, keys: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trust.KEYS_VARIABLE, str(keys))
    assert chosen(bundle, None) == "own"
    keys.write_text("no key\n")
    with pytest.raises(ConfigError, match="is no public key"):
        chosen(bundle, None)


def test_an_engine_that_is_alone_and_vouched_for_by_nobody_is_an_error(
    bundle: Path, own: Path, keys: Path, gpu: FakeGpu
) -> None:
    shutil.rmtree(own)
    with pytest.raises(UnvouchedError, match=r"theirs is passed over: nobody vouches for it"):
        chosen(bundle, keys)
    directory, manifest = bundle / "engines" / "theirs", read_manifest(bundle)
    with pytest.raises(UnvouchedError, match="passed over"):
        choose_engine(bundle, manifest, "8.7", engine_dir=directory, trusted_keys=keys)


def test_one_that_is_signed_runs(
    bundle: Path, theirs: Path, keys: Path, key: Key, gpu: FakeGpu
) -> None:
    sign_engine(theirs, make_key(), "the stranger's")
    with pytest.raises(UnvouchedError, match="none of the trusted ones"):
        read_engine_info(theirs, keys)
    sign_engine(theirs, key, "the operator's")
    assert chosen(bundle, keys) == "theirs"
    assert who_vouches(theirs, read_engine_bytes(theirs), keys).endswith(key.public_key.name)
    text = keys.read_text()
    keys.write_text(f"names: acme/*\n{text}")
    with pytest.raises(UnvouchedError, match="signs bundles of some names only, and engines have"):
        read_engine_info(theirs, keys)
    keys.write_text(text)
    (theirs / ENGINE_SIGNATURE).write_bytes(b"looks good")
    with pytest.raises(UnvouchedError, match="is no signature of minisign"):
        read_engine_info(theirs, keys)
    (theirs / ENGINE_SIGNATURE).unlink()
    (theirs / ENGINE_SIGNATURE).mkdir()
    with pytest.raises(UnvouchedError, match="cannot be read"):
        read_engine_info(theirs, keys)


def test_a_signature_is_of_the_bytes_that_are_used(theirs: Path, keys: Path, key: Key):
    sign_engine(theirs, key, "the operator's")
    info = read_engine_info(theirs, keys)
    changed = msgspec.structs.replace(info, created="2100-01-01")
    (theirs / ENGINE_JSON).write_bytes(msgspec.json.encode(changed))
    with pytest.raises(UnvouchedError, match="is not of these bytes"):
        read_engine_info(theirs, keys)


def test_nothing_is_parsed_of_an_engine_that_nobody_vouches_for(theirs: Path, keys: Path) -> None:
    (theirs / ENGINE_JSON).write_bytes(b"[" * 100_000)
    with pytest.raises(UnvouchedError):
        read_engine_info(theirs, keys)


def test_an_own_engine_json_that_was_changed_does_not_run(own: Path, keys: Path) -> None:
    info = read_engine_info(own, keys)
    changed = msgspec.structs.replace(info, plugins="python", python_kernels=(b"code",))
    (own / ENGINE_JSON).write_bytes(msgspec.json.encode(changed))
    with pytest.raises(UnvouchedError, match=r"no record in .*it is not signed"):
        read_engine_info(own, keys)


def open_to_others(record: Path) -> str:
    record.chmod(0o666)
    return rf"{record} does not count: others \(mode 0666\) can change {record}; .*chmod go-w"


def open_to_a_group(record: Path) -> str:
    record.chmod(0o664)
    return rf"others \(mode 0664\) can change {record}"


def open_directory(record: Path) -> str:
    record.parent.chmod(0o777)
    return rf"others \(mode 0777\) can change {record.parent}"


def foreign(record: Path) -> str:
    os.chown(record, 12345, 12345)
    return f"user 12345 can change {record}"


def foreign_directory(record: Path) -> str:
    os.chown(record.parent, 12345, 12345)
    return f"user 12345 can change {record.parent}"


def damaged(record: Path) -> str:
    record.write_text("0" * 64 + record.read_text()[64:])
    return f"{record} does not count: it has another hash than its name"


def empty(record: Path) -> str:
    record.write_bytes(b"")
    return f"{record} does not count: it has another hash"


def linked(record: Path) -> str:
    record.symlink_to(record.rename(record.with_name("elsewhere")))
    return f"{record} does not count: it is a symbolic link"


def a_pipe(record: Path) -> str:
    record.unlink()
    os.mkfifo(record, 0o644)
    return f"{record} does not count: it is no plain file"


def endless(record: Path) -> str:
    with record.open("ab") as file:
        file.truncate(1 << 30)
    return f"{record} does not count: it is larger"


def gone(record: Path) -> str:
    record.unlink()
    return f"no record in {record.parent}"


@pytest.mark.parametrize(
    "spoil",
    [
        open_to_others,
        open_to_a_group,
        open_directory,
        pytest.param(foreign, marks=pytest.mark.skipif(NOT_ROOT, reason="needs root")),
        pytest.param(foreign_directory, marks=pytest.mark.skipif(NOT_ROOT, reason="needs root")),
        damaged,
        empty,
        linked,
        a_pipe,
        endless,
        gone,
    ],
)
def test_a_record_that_others_may_have_made_does_not_count(
    spoil: Callable[[Path], str], own: Path, records: Path, keys: Path
) -> None:
    read_engine_info(own, keys)
    reason = spoil(record_of(records, own))
    with pytest.raises(UnvouchedError, match=reason):
        read_engine_info(own, keys)


def test_the_next_record_counts_where_one_does_not(
    own: Path, records: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root's, where this user's own is missing or spoilt."""
    shutil.move(records, engine_records.DEFAULT_RECORDS)
    read_engine_info(own, keys)
    shutil.copytree(engine_records.DEFAULT_RECORDS, records)
    record_of(records, own).write_bytes(b"")
    read_engine_info(own, keys)


def test_where_records_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    default = engine_records.DEFAULT_RECORDS
    assert record_directories() == [tmp_path / "records", default]
    monkeypatch.delenv(RECORDS_VARIABLE)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert record_directories() == [default]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert record_directories() == [
        Path("/home/user/.local/state/edge-llm/engine-records"),
        default,
    ]
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert record_directories() == [Path("/state/edge-llm/engine-records"), default]
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME")  # a service's user has none
    assert record_directories() == [default]


@pytest.mark.skipif(NOT_ROOT, reason="needs root, to be another user")
def test_another_user_takes_roots_records_and_not_the_other_way_round(
    own: Path, records: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, sys\n"
        "from edge.bundle.engine_records import why_unrecorded\n"
        "os.setgroups([]); os.setgid(23456); os.setuid(23456)\n"
        "print(why_unrecorded(sys.stdin.buffer.read()))"
    )

    def as_another() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=read_engine_bytes(own),
            capture_output=True,
            check=True,
        )
        return done.stdout.decode().strip()

    with tempfile.TemporaryDirectory() as name:  # pytest's are closed to other users
        Path(name).chmod(0o755)
        shared = shutil.copytree(records, Path(name) / "records")
        monkeypatch.setenv(RECORDS_VARIABLE, str(shared))
        record = record_of(shared, own)
        assert as_another() == "None"
        os.chown(record, 23456, 23456)
        assert as_another() == "None"  # its own
        with pytest.raises(UnvouchedError, match="user 23456 can change"):
            read_engine_info(own, keys)
        monkeypatch.setattr("pwd.getpwnam", {"fleet": SimpleNamespace(pw_uid=23456)}.__getitem__)
        monkeypatch.setenv(BUILDERS_VARIABLE, "fleet")  # unless root says that they count
        read_engine_info(own, keys)
        os.chown(record, 23457, 23457)
        with pytest.raises(UnvouchedError, match="user 23457 can change"):
            read_engine_info(own, keys)
        monkeypatch.delenv(BUILDERS_VARIABLE)
        record.chmod(0o000)
        os.chown(record, 0, 0)
        assert f"{record} does not count: Permission denied" in as_another()


def test_builders_are_users_of_this_machine(
    own: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUILDERS_VARIABLE, " root  root ")
    read_engine_info(own, keys)
    monkeypatch.setenv(BUILDERS_VARIABLE, "root no-such-user")
    with pytest.raises(ConfigError, match=r"is 'root no-such-user', and .*no-such-user.*; name"):
        read_engine_info(own, keys)


def test_kernels_are_registered_only_once_the_plan_has_its_hash(
    bundle: Path, own: Path, theirs: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(plugins, "register_kernels", lambda *_: seen.append("kernels"))
    for other in (own, theirs):
        shutil.rmtree(other)
    own = write_engine(bundle, name="kernels", plugins="python", max_batch=1, **SIZES)
    engine_records.built_here.clear()
    plan = own / read_engine_info(own).plan
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="is damaged"):
        TensorRTBackend(bundle, read_manifest(bundle))
    assert not seen
    assert "deserialize_cuda_engine" not in gpu.calls
    plan.write_bytes(whole)
    with closing(TensorRTBackend(bundle, read_manifest(bundle))):
        assert seen == ["kernels"]


def test_a_record_is_a_line_of_sha256sum(own: Path, records: Path) -> None:
    assert shutil.which("sha256sum") is not None
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", *records.iterdir()], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (own / ENGINE_JSON).write_bytes(b"another")
    done = subprocess.run(["sha256sum", "-c", *records.iterdir()], capture_output=True, check=False)
    assert done.returncode == 1


def test_a_recorded_copy_of_a_bundle_runs_too(bundle: Path, keys: Path, tmp_path: Path) -> None:
    moved = bundle.rename(tmp_path / "moved")
    read_engine_info(moved / "engines" / "own", keys)
    record_engine(moved / "engines" / "own" / ENGINE_JSON, b"anything")
    read_engine_info(moved / "engines" / "own", keys)
