"""What lies in a bundle and nobody vouches for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge.bundle import engine_records
from edge.bundle.engine_records import RECORDS_VARIABLE, built_here
from edge.errors import ConfigError
from edge_fleet.signing import sign_bundle, sign_engine
from edge_fleet.unsigned_files import Uncovered, find_uncovered
from tests.conftest import Bundles
from tests.makers.keys import make_key
from tests.standins.tensorrt import write_engine


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_records, "DEFAULT_RECORDS", tmp_path / "none")
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "records"))


@pytest.fixture
def bundle(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2"), tmp_path / "bundle"))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "trusted-keys"
    path.write_text(make_key().public_text)
    path.chmod(0o644)
    return path


def test_what_export_sign_and_build_leave_is_covered(bundle: Path, keys: Path) -> None:
    assert find_uncovered(bundle, keys) == Uncovered({}, {}, [])
    key = make_key()
    keys.write_text(key.public_text)
    sign_bundle(bundle, key, "the vendor's")
    own = write_engine(bundle, name="own", max_prefill=32)
    (own / "build.log").touch()
    (own / "timing.cache").touch()
    (own.parent / ".lock").touch()
    elsewhere = write_engine(bundle, name="elsewhere", max_prefill=32)
    sign_engine(elsewhere, key, "the operator's")
    built_here.clear()
    for record in (keys.parent / "records").iterdir():
        if "elsewhere" in record.read_text():
            record.unlink()
    found = find_uncovered(bundle, keys)
    assert found.engines == {
        "elsewhere": f"the trusted key {key.public_key.name}",
        "own": "this machine, which built it",
    }
    assert (found.unvouched, found.unlisted) == ({}, [])


def test_a_strangers_engine_is_named_where_keys_are_trusted(bundle: Path, keys: Path) -> None:
    write_engine(bundle, name="stranger", max_prefill=32)
    shutil.rmtree(keys.parent / "records")
    built_here.clear()
    assert "no keys are trusted here" in find_uncovered(bundle, None).engines["stranger"]
    found = find_uncovered(bundle, keys)
    assert not found.engines
    assert "nobody vouches for it" in found.unvouched["stranger"]
    text = keys.read_text()
    keys.write_text("no key")
    with pytest.raises(ConfigError, match="is no public key"):
        find_uncovered(bundle, keys)
    keys.write_text(text)
    (bundle / "engines/stranger/engine.json").unlink()
    (bundle / "engines/stranger/engine.json").mkdir()
    assert "cannot read engine.json" in find_uncovered(bundle, keys).unvouched["stranger"]


def test_unlisted_files_are_named_wherever_they_are(bundle: Path, keys: Path) -> None:
    own = write_engine(bundle, name="own", max_prefill=32)
    strangers = [
        "decoder.py",
        ".hidden",
        "engines/plugin.so",
        "engines/half/timing.cache",
        "engines/own/plugin.so",
        "engines/\x1b[2J/engine.json",
        "more/decoder.onnx",
    ]
    for name in strangers:
        path = bundle / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = find_uncovered(bundle, keys)
    assert list(found.engines) == [own.name]
    assert found.unlisted == sorted(
        [
            "decoder.py",
            ".hidden",
            "engines/plugin.so",
            "engines/half",
            "engines/own/plugin.so",
            "engines/\x1b[2J",  # no name that a terminal could be shown
            "more",
        ]
    )
