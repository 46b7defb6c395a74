"""Signatures of engines, with Debian's minisign as the judge."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge.bundle.engine_records import ENGINE_SIGNATURE
from edge.bundle.minisign import check_signature, parse_signature
from edge.errors import BundleError, IntegrityError
from edge_fleet.signing import sign_engine
from edge_make.signing import make_key_pair, open_signer
from tests.conftest import Bundles
from tests.makers.keys import make_key, minisign, need_minisign
from tests.standins.tensorrt import write_engine


@pytest.mark.live
def test_minisign_checks_the_signature_of_an_engine(tiny_bundles: Bundles, tmp_path: Path):
    need_minisign()
    bundle = shutil.copytree(tiny_bundles("qwen2"), tmp_path / "bundle")
    secret, public = tmp_path / "our.key", tmp_path / "our.pub"
    key = make_key_pair(secret, public, "")
    engine = write_engine(bundle, max_prefill=32)
    sign_engine(engine, open_signer(secret, lambda: ""), "engine:tiny")
    checked = minisign("-V", "-p", public, "-m", engine / "engine.json")
    assert checked.returncode == 0, checked.stderr
    assert "Trusted comment: engine:tiny" in checked.stdout
    made = parse_signature((engine / ENGINE_SIGNATURE).read_bytes(), "it")
    assert check_signature((engine / "engine.json").read_bytes(), made, [key]) == key


def test_an_engine_that_is_damaged_is_not_signed(tiny_bundles: Bundles, tmp_path: Path):
    bundle, key = shutil.copytree(tiny_bundles("qwen2"), tmp_path / "bundle"), make_key()
    engine = write_engine(bundle, max_prefill=32)
    (plan,) = engine.glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="is damaged"):
        sign_engine(engine, key, "engine:tiny")
    (engine / "engine.json").write_text("{")
    with pytest.raises(BundleError, match="is damaged"):
        sign_engine(engine, key, "engine:tiny")
    assert not (engine / ENGINE_SIGNATURE).exists()
