"""What inspect shows of an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge.bundle import engine_records
from edge.bundle.engine_records import RECORDS_VARIABLE, built_here
from edge.bundle.trust import KEYS_VARIABLE
from edge_fleet.signing import sign_engine
from edge_lab.cli.inspect import inspect
from tests.conftest import Bundles
from tests.makers.keys import make_key
from tests.standins.tensorrt import write_engine


def test_inspect_says_who_vouches_for_the_engine(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_records, "DEFAULT_RECORDS", tmp_path / "none")
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "records"))
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    bundle = Path(shutil.copytree(tiny_bundles("qwen2"), tmp_path / "bundle"))
    engine = write_engine(bundle, max_prefill=32)
    built_here.clear()

    def shown() -> str:
        done = CliRunner().invoke(inspect, [str(engine), "--json"], catch_exceptions=False)
        assert done.exit_code == 0
        who = json.loads(done.stdout)["vouched_for_by"]
        table = CliRunner().invoke(inspect, [str(engine)], catch_exceptions=False).stdout
        assert who[:20] in " ".join(table.split())
        return str(who)

    assert shown() == "nobody is asked: no keys are trusted here"
    key, keys = make_key(), tmp_path / "trusted-keys"
    keys.write_text(key.public_text)
    keys.chmod(0o644)
    monkeypatch.setenv(KEYS_VARIABLE, str(keys))
    assert shown() == "this machine, which built it"
    shutil.rmtree(tmp_path / "records")
    assert shown().startswith(f"NOBODY: the engine {engine} is passed over")
    sign_engine(engine, key, "the operator's")
    assert shown() == f"the trusted key {key.public_key.name}"
