"""Whose adapters a machine takes where it names trusted keys."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge import LLM
from edge.adapters.library import library
from edge.adapters.trust import SIGNATURE_NAME
from edge.bundle import trust
from edge.errors import CheckpointError, ConfigError
from edge_fleet.signing import sign_bundle
from edge_lab.cli.adapter import adapter as adapter_verb
from edge_make.adapter_library import add_adapter
from export.pipeline import ExportConfig, export_checkpoint
from tests.edge.adapters.test_peft_file import change_config
from tests.makers.keys import Key, make_key, minisign
from tests.makers.tiny_adapters import write_adapter
from tests.makers.tiny_models import write_checkpoint

FILES = ("adapter_config.json", "adapter_model.safetensors")


def sums(adapter: Path) -> str:
    """What ``sha256sum`` prints of both files."""
    hashes = [hashlib.sha256((adapter / name).read_bytes()).hexdigest() for name in FILES]
    return "".join(f"{h}  {name}\n" for h, name in zip(hashes, FILES, strict=True))


def sign(adapter: Path, key: Key) -> None:
    (adapter / SIGNATURE_NAME).write_bytes(key.sign(sums(adapter).encode(), "of a test"))


@pytest.fixture(autouse=True)
def no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trust.KEYS_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "etc-keys")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "base", "qwen2")


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "bundle"
    export_checkpoint(
        ExportConfig(source=str(base), output=output, quant="fp16", kv_capacity=32, adapters=8)
    )
    return output


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
def bundle(exported: Path, tmp_path: Path, key: Key) -> Path:
    """A bundle that the key has signed."""
    shutil.copytree(exported, tmp_path / "bundle")
    sign_bundle(tmp_path / "bundle", key, "of a test", None)
    return tmp_path / "bundle"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "legal", base, {"target_modules": ["q_proj", "down_proj"]})


def flip_a_weight(adapter: Path) -> None:
    path = adapter / FILES[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_signed_one_is_taken_and_no_other(bundle: Path, adapter: Path, keys: Path, key: Key):
    with LLM(bundle, num_threads=1, trusted_keys=keys) as llm:
        with pytest.raises(CheckpointError, match=r"legal is refused.*it is not signed; sign it"):
            llm.load_adapter(adapter)
        with pytest.raises(CheckpointError, match="is refused"):
            llm.adapters.take(str(adapter))
        add_adapter(bundle, adapter, "unsigned")
        with pytest.raises(CheckpointError, match="is refused"):
            llm.generate("hello", adapter="unsigned")
        sign(adapter, key)
        assert llm.load_adapter(adapter) == "legal"
        add_adapter(bundle, adapter, "signed")
        assert llm.generate("hello", adapter="signed").tokens
    with LLM(bundle, num_threads=1) as llm:
        assert llm.generate("hello", adapter="unsigned").tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_weight, "is not of these bytes"),
        (lambda adapter: change_config(adapter, lora_alpha=16), "is not of these bytes"),
        (lambda adapter: sign(adapter, make_key()), "which is none of the trusted ones"),
        (lambda adapter: (adapter / SIGNATURE_NAME).write_text("x"), "is no signature of minisign"),
        (lambda adapter: (adapter / SIGNATURE_NAME).unlink(), "it is not signed"),
    ],
    ids=["weights", "config", "foreign", "damaged", "missing"],
)
def test_a_file_that_differs_from_the_signed_one_is_refused(
    bundle: Path,
    adapter: Path,
    keys: Path,
    key: Key,
    change: Callable[[Path], Any],
    message: str,
):
    sign(adapter, key)
    change(adapter)
    with (
        LLM(bundle, num_threads=1, trusted_keys=keys) as llm,
        pytest.raises(CheckpointError, match=message),
    ):
        llm.load_adapter(adapter)


def test_no_weights_are_parsed_that_nobody_signed(bundle: Path, adapter: Path, keys: Path):
    (adapter / FILES[1]).write_bytes(b"{")
    with (
        LLM(bundle, num_threads=1, trusted_keys=keys) as llm,
        pytest.raises(CheckpointError, match="it is not signed"),
    ):
        llm.load_adapter(adapter)


def test_a_key_of_some_names_signs_no_adapters(
    exported: Path, adapter: Path, keys: Path, key: Key, monkeypatch: pytest.MonkeyPatch
):
    keys.write_text(f"names: acme/*\n{key.public_text}")
    sign(adapter, key)
    monkeypatch.setenv(trust.KEYS_VARIABLE, str(keys))
    with pytest.raises(CheckpointError, match=r"signs bundles of some names only, and adapters"):
        add(adapter, exported)


def test_a_file_of_keys_that_cannot_be_used_opens_no_door(
    exported: Path, adapter: Path, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sign(adapter, key)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "keys")
    (tmp_path / "keys").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot read public keys"):
        add(adapter, exported)


@pytest.mark.live
def test_the_commands_of_the_message_make_a_valid_signature(
    bundle: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the programs sha256sum and minisign, as the machine's own policy has it."""
    made = minisign("-G", "-W", "-s", tmp_path / "a.key", "-p", tmp_path / "a.pub")
    assert made.returncode == 0, made.stderr
    (tmp_path / "a.pub").chmod(0o644)
    monkeypatch.setenv(trust.KEYS_VARIABLE, str(tmp_path / "a.pub"))
    with pytest.raises(CheckpointError) as refused:
        add(adapter, bundle)
    assert not library(bundle).exists()
    command = str(refused.value).partition("sign it there with: ")[2]
    assert command == f"sha256sum {' '.join(FILES)} > SHA256SUMS && minisign -Sm SHA256SUMS"
    (adapter / "SHA256SUMS").write_text(sums(adapter))
    signed = minisign("-S", "-s", tmp_path / "a.key", "-m", adapter / "SHA256SUMS")
    assert signed.returncode == 0, signed.stderr
    add(adapter, bundle)
    assert (library(bundle) / "legal" / SIGNATURE_NAME).is_file()


def add(adapter: Path, bundle: Path) -> None:
    arguments = ["add", str(adapter), str(bundle)]
    result = CliRunner().invoke(adapter_verb, arguments, catch_exceptions=False)
    assert result.exit_code == 0
