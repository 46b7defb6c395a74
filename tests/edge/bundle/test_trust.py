"""The policy: which bundles are opened where trusted keys are named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import edge
from edge.bundle import trust
from edge.bundle.manifest import read_manifest
from edge.bundle.trust import KEYS_VARIABLE, open_manifest
from edge.engine_config import EngineConfig
from edge.errors import BundleError, ConfigError, IntegrityError
from edge.runtime.draft_model import read_draft
from edge_fleet.signing import sign_bundle
from edge_make.atomic_swap import update_manifest
from tests.makers.keys import Key, make_key
from tests.packages import PACKAGES


@pytest.fixture(autouse=True)
def no_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "etc-keys")


@pytest.fixture
def key() -> Key:
    return make_key()


@pytest.fixture
def keys(tmp_path: Path, key: Key) -> Path:
    path = tmp_path / "trusted-keys"
    path.write_text(key.public_text)
    return path


@pytest.fixture
def bundle(tiny_bundles: Any, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundles("qwen2"), tmp_path / "tiny")


def test_unsigned_and_foreign_are_refused_and_signed_is_opened(bundle: Path, keys: Path, key: Key):
    with pytest.raises(BundleError, match=r"is not signed, and .* demands it"):
        edge.LLM(bundle, trusted_keys=keys)
    sign_bundle(bundle, make_key(), "foreign")
    with pytest.raises(IntegrityError, match="none of the trusted ones"):
        edge.LLM(bundle, trusted_keys=keys)
    sign_bundle(bundle, key, "ours")
    with edge.LLM(bundle, trusted_keys=keys, backend="ort-cpu") as llm:
        assert llm.manifest == read_manifest(bundle)
    keys.write_text(make_key().public_text)  # the key is taken out
    with pytest.raises(IntegrityError, match="none of the trusted ones"):
        edge.LLM(bundle, trusted_keys=keys)


def test_the_machines_policy_holds_without_an_option(
    bundle: Path, keys: Path, key: Key, monkeypatch: pytest.MonkeyPatch
):
    open_manifest(bundle)  # none is set
    monkeypatch.setattr(trust, "DEFAULT_KEYS", keys)
    with pytest.raises(BundleError, match="is not signed"):
        open_manifest(bundle)
    foreign = keys.with_name("other")
    foreign.write_text(make_key().public_text)
    sign_bundle(bundle, key, "ours")
    open_manifest(bundle)
    monkeypatch.setenv(KEYS_VARIABLE, str(foreign))
    with pytest.raises(IntegrityError, match="none of the trusted ones"):
        open_manifest(bundle)
    open_manifest(bundle, keys)


def test_a_policy_that_cannot_be_read_opens_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match="cannot read public keys"):
        open_manifest(bundle, tmp_path / "missing")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "missing")
    monkeypatch.setattr(trust, "DEFAULT_KEYS", dangling)
    with pytest.raises(ConfigError, match="cannot read public keys"):
        open_manifest(bundle)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_policy_that_others_can_change_opens_nothing(
    bundle: Path, keys: Path, key: Key, mode: int
):
    sign_bundle(bundle, key, "ours")
    open_manifest(bundle, keys)
    keys.chmod(mode)
    with pytest.raises(ConfigError, match=f"others \\(mode 0{mode:o}\\) can change {keys}"):
        open_manifest(bundle, keys)


def test_keys_in_a_directory_that_others_can_change_open_nothing(
    bundle: Path, keys: Path, key: Key
):
    sign_bundle(bundle, key, "ours")
    shared = keys.parent / "shared"
    shared.mkdir()
    link = keys.parent / "link"
    link.symlink_to(keys.rename(shared / "keys"))  # where the link leads counts
    open_manifest(bundle, link)
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match=f"others \\(mode 0777\\) can change {shared}"):
        open_manifest(bundle, link)
    shared.chmod(0o1777)  # as /tmp, where each changes what is his own
    open_manifest(bundle, link)


def test_keys_of_another_user_open_nothing(
    bundle: Path, keys: Path, key: Key, monkeypatch: pytest.MonkeyPatch
):
    sign_bundle(bundle, key, "ours")
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        os.chown(keys, 12345, 0)
    with pytest.raises(ConfigError, match=r"user \d+ can change .*root and this user alone"):
        open_manifest(bundle, keys)


def test_a_manifest_that_changes_after_it_was_signed_is_refused(bundle: Path, keys: Path, key: Key):
    sign_bundle(bundle, key, "ours")
    open_manifest(bundle, keys)
    changed = read_manifest(bundle)
    update_manifest(bundle, type(changed)(**{**vars_of(changed), "name": "renamed"}))
    with pytest.raises(IntegrityError, match="is not of these bytes"):
        open_manifest(bundle, keys)


def vars_of(manifest: Any) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__struct_fields__}


def test_a_bundle_that_drafts_is_held_to_the_policy_too(bundle: Path, keys: Path, key: Key):
    target = shutil.copytree(bundle, bundle.with_name("target"))
    sign_bundle(target, key, "ours")
    config = EngineConfig(draft=bundle, trusted_keys=keys, backend="ort-cpu")
    with pytest.raises(BundleError, match="is not signed"):
        edge.LLM(target, config)
    sign_bundle(bundle, key, "ours")
    assert read_draft(bundle, target, 1, keys).manifest == read_manifest(bundle)


def test_a_signature_that_is_no_signature_is_refused(bundle: Path, keys: Path):
    (bundle / trust.SIGNATURE_NAME).write_text("looks good to me\n")
    with pytest.raises(IntegrityError, match="is no signature of minisign"):
        open_manifest(bundle, keys)
    (bundle / trust.SIGNATURE_NAME).unlink()
    (bundle / trust.SIGNATURE_NAME).mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        open_manifest(bundle, keys)


def test_every_room_that_opens_a_bundle_comes_through_the_one_door():
    """`read_manifest` asks nobody who signed; these modules look at bundles and open none."""
    root = Path(edge.__file__).parent.parent
    looks = {
        "edge/bundle/trust.py",
        "edge/bundle/manifest.py",
        "edge/bundle/library.py",
        "edge_make/atomic_swap.py",
        "edge_lab/cli/adapter.py",
        "edge_lab/cli/bench.py",
        "edge_fleet/cli/bundle.py",
        "edge_fleet/cli/pull.py",
        "edge_lab/cli/evaluation.py",
        "edge_lab/cli/cache.py",
        "edge_lab/cli/inspect.py",
        "edge_lab/cli/inspect_engine.py",
        "edge_lab/cli/library.py",
        "edge_lab/cli/strategies.py",
        "edge_lab/doctor/software.py",
        "edge_lab/planner/models.py",
        "edge_fleet/registry/pull.py",
        "edge_fleet/registry/push.py",
        "edge_fleet/registry/release.py",
        "edge_fleet/rollout/adapter.py",
        "edge_fleet/rollout/judge.py",
        "edge_fleet/rollout/steps.py",
        "edge_fleet/signing.py",
        "edge_serve/models/limits.py",
        "edge_serve/models/loader.py",
        "edge_serve/models/switch.py",
        "edge_serve/run.py",
        "engines/cli.py",
        "engines/rules/bundle.py",
        "engines/trtexec/explain.py",
        "export/pipeline.py",
    }
    found = {
        str(path.relative_to(root))
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
        if "read_manifest(" in path.read_text("utf-8").replace("def read_manifest(", "")
    }
    assert found <= looks
