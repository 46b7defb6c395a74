"""``edge-llm bundle`` as it is typed; the registry is tested in tests/edge_fleet/registry."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest
from click.testing import CliRunner, Result

from edge.bundle import trust
from edge.bundle.engine_records import RECORDS_VARIABLE, built_here
from edge.cli import cli
from edge.errors import BundleError, ConfigError, IntegrityError
from edge_lab.cli.options import ask_password
from tests.conftest import Bundles
from tests.edge_fleet.registry.live import LiveRegistry, write_bundle
from tests.makers.keys import need_minisign
from tests.standins.tensorrt import write_engine

FILES = {"decoder.onnx": b"graph", "decoder.cpu.onnx": b"twin"}


@pytest.fixture(autouse=True)
def no_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(trust.KEYS_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "no-keys")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(tmp_path / "bundles"))


def run(*arguments: str | Path, text: str | None = None) -> Result:
    if arguments[0] == "keygen":
        need_minisign()
    done = CliRunner().invoke(cli, ["bundle", *map(str, arguments)], input=text)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def as_json(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.mark.live
def test_sign_push_pull_verify_diff(tmp_path: Path):
    (tmp_path / "registry").mkdir()
    live = LiveRegistry(tmp_path / "registry")
    try:
        mine = write_bundle(tmp_path / "mine" / "tiny", FILES)
        key, keys = tmp_path / "release.key", tmp_path / "release.pub"
        run("keygen", tmp_path / "release", "--no-password")
        signer = as_json("sign", mine, "--key", key, "--comment", "v1")["key"]
        place = f"{live.address}/models/tiny"
        pushed = as_json("push", mine, f"{place}:v1")
        assert pushed["signed"]
        pulled = as_json("pull", f"{place}:v1", "--trusted-keys", keys)
        assert pulled["signer"] == signer
        assert pulled["bundle"] == str(tmp_path / "bundles" / "tiny")  # by the reference's name
        found = as_json("verify", "tiny", "--trusted-keys", keys)
        assert found["trusted"]
        assert found["comment"] == "v1"
        other = write_bundle(tmp_path / "other", FILES | {"decoder.onnx": b"other"}, name="tiny")
        run("push", other, f"{place}:v2")
        diff = as_json("diff", "tiny", f"{place}:v2")
        assert diff["files"] == {
            "decoder.onnx": {"state": "changed", "num_bytes": 5, "fetched_bytes": 5}
        }
        assert diff["signature"]
        assert diff["fetched_bytes"] == 5
        assert run("diff", "tiny", f"{place}:v1").stdout == "the same\n"
        with pytest.raises(ConfigError, match="already holds a bundle"):
            run("pull", f"{place}:v2")
        with pytest.raises(BundleError, match="is not signed"):
            run("pull", f"{place}:v2", "--force", "--trusted-keys", keys)
        run("pull", pushed["reference"], "-o", tmp_path / "exact")
        assert (tmp_path / "exact" / "manifest.json").read_bytes() == (
            mine / "manifest.json"
        ).read_bytes()
    finally:
        live.kill()


@pytest.mark.live
def test_verify_says_what_it_knows(tmp_path: Path):
    mine = write_bundle(tmp_path / "tiny", FILES)
    assert run("verify", mine).stdout.endswith("not signed\n")
    run("keygen", tmp_path / "a", "--no-password")
    run("sign", mine, "--key", tmp_path / "a.key")
    assert "name --trusted-keys to check that" in run("verify", mine).stdout
    (mine / "decoder.onnx").write_bytes(b"grapf")
    with pytest.raises(IntegrityError, match="is damaged"):
        run("verify", mine)
    with pytest.raises(IntegrityError, match="is damaged"):
        run("sign", mine, "--key", tmp_path / "a.key")


@pytest.mark.live
def test_a_release_is_signed_shown_and_held_to_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "registry").mkdir()
    live = LiveRegistry(tmp_path / "registry")
    try:
        mine = write_bundle(tmp_path / "mine", FILES)
        run("keygen", tmp_path / "a", "--no-password")
        sign = ("sign", mine, "--key", tmp_path / "a.key")
        keys = tmp_path / "keys"
        keys.write_text("names: acme/*\n" + (tmp_path / "a.pub").read_text())
        trusted = ("--trusted-keys", keys)
        run(*sign)
        with pytest.raises(IntegrityError, match="signed as a bundle without a name"):
            run("verify", mine, *trusted)
        release = ("--release", "2", "--name", "acme/r1", "--expires")
        done = run(*sign, *release, "2999-01-01")
        assert "as release 2 of acme/r1, signed " in done.stdout
        assert "expires 2999-01-01 00:00 UTC" in done.stdout
        place = f"{live.address}/acme/r1:stable"
        run("push", mine, place)
        found = as_json("verify", mine, *trusted)
        assert found["trusted"]
        assert found["release"] == {
            "number": 2,
            "signed": found["release"]["signed"],
            "expires": "2999-01-01T00:00:00Z",
            "name": "acme/r1",
        }
        assert "\nsays it is release 2 of acme/r1, signed" in run("verify", mine).stdout
        assert "\nrelease 2 of acme/r1, signed" in run("verify", mine, *trusted).stdout
        run("pull", place, *trusted)
        old = write_bundle(tmp_path / "old", FILES | {"decoder.onnx": b"older"})
        run(*sign[:1], old, *sign[2:], "--release", "1", "--name", "acme/r1")
        run("push", old, place)
        with pytest.raises(BundleError, match="is release 1, and release 2 was here"):
            run("pull", place, "--force", *trusted)
        run("pull", place, "--force", "--allow-older", *trusted)
        assert as_json("verify", "r1")["release"]["number"] == 1
        keys.write_text("names: other/r1\n" + (tmp_path / "a.pub").read_text())
        with pytest.raises(IntegrityError, match=r"signed as acme/r1, .* for other/r1 only"):
            run("pull", place, "-o", tmp_path / "unbound", *trusted)
        assert not (tmp_path / "unbound").exists()
        # The vendor's clock was right, and that of this machine is.
        run(*sign, *release, "2999-01-01")
        monkeypatch.setattr("edge_fleet.registry.release.datetime", Later)
        run("push", mine, place)
        with pytest.raises(BundleError, match="expired at 2999-01-01 00:00 UTC"):
            run("pull", place, "-o", tmp_path / "late")
        run("pull", place, "-o", tmp_path / "late", "--allow-older")
    finally:
        live.kill()


class Later(datetime):
    """A clock in the year 3000."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return datetime(3000, 1, 1, tzinfo=timezone.utc)


@pytest.mark.live
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--expires", "2999-01-01"), "are of a release; give its number by --release"),
        (("--name", "acme/r1"), "are of a release; give its number by --release"),
        (("--release", "1", "--expires", "2020-01-01"), "is 2020-01-01 00:00 UTC, and it is"),
        (("--release", "1", "--name", "Acme/R1"), "--name Acme/R1 is no name of a repository"),
    ],
)
def test_a_release_that_nobody_would_take_is_not_signed(
    tmp_path: Path, options: tuple[str, ...], message: str
):
    mine = write_bundle(tmp_path / "mine", FILES)
    before = (mine / "manifest.json").read_bytes()
    run("keygen", tmp_path / "a", "--no-password")
    with pytest.raises(ConfigError, match=message):
        run("sign", mine, "--key", tmp_path / "a.key", *options)
    assert (mine / "manifest.json").read_bytes() == before
    assert "not signed" in run("verify", mine).stdout


@pytest.mark.live
def test_verify_names_unvouched_parts(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a code of its own: it is no damage, and nothing reads it."""
    mine = shutil.copytree(tiny_bundles("qwen2"), tmp_path / "tiny")
    run("keygen", tmp_path / "a", "--no-password")
    key, keys = tmp_path / "a.key", tmp_path / "a.pub"
    run("sign", mine, "--key", key)
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "theirs"))
    write_engine(mine, name="sm87", max_prefill=32)
    built_here.clear()
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "records"))
    done = run("verify", mine)
    assert done.exit_code == 0
    assert "engine sm87: nobody is asked who vouches for it" in done.stdout
    done = run("verify", mine, "--trusted-keys", keys)
    assert done.exit_code == 3
    assert "signed with the trusted key" in done.stdout
    assert "engine sm87: NOT VOUCHED FOR: " in done.stdout
    assert f"edge-llm bundle sign {mine} --engine sm87 --key FILE" in done.stdout
    with pytest.raises(ConfigError, match="has no engine sm80; there are sm87"):
        run("sign", mine, "--engine", "sm80", "--key", key)
    with pytest.raises(ConfigError, match="an engine, which is no release"):
        run("sign", mine, "--engine", "sm87", "--release", "1", "--key", key)
    signed = as_json("sign", mine, "--engine", "sm87", "--key", key)
    assert signed["engine"] == "sm87"
    assert signed["comment"].endswith(" engine:sm87")
    found = as_json("verify", mine, "--trusted-keys", keys)
    assert found["engines"] == {"sm87": f"the trusted key {found['key']}"}
    assert found["unvouched"] == {}
    (mine / "\x1b[2J.so").touch()
    done = run("verify", mine)
    assert done.exit_code == 3
    assert "'\\x1b[2J.so': NOT LISTED in manifest.json" in done.stdout
    (mine / "\x1b[2J.so").unlink()
    plan = next((mine / "engines" / "sm87").glob("*.plan"))
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match="is damaged"):
        run("sign", mine, "--engine", "sm87", "--key", key)


@pytest.mark.live
def test_passwords_are_asked_for_or_read_and_never_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine = write_bundle(tmp_path / "tiny", FILES)
    done = run("keygen", tmp_path / "a", text="secret words\nsecret words\n")
    assert "secret words" not in done.output
    (tmp_path / "password").write_text("secret words\n")
    run("sign", mine, "--key", tmp_path / "a.key", "--password-file", tmp_path / "password")
    run("sign", mine, "--key", tmp_path / "a.key", text="secret words\n")
    with pytest.raises(ConfigError, match="Wrong password"):
        run("sign", mine, "--key", tmp_path / "a.key", text="guess\n")
    with monkeypatch.context() as patch:
        asked = Mock(side_effect=[KeyboardInterrupt, EOFError])
        patch.setattr("click.termui.hidden_prompt_func", asked)
        with pytest.raises(click.Abort):
            ask_password(None)
        patch.setattr("sys.stdin", Mock(**{"isatty.return_value": False}))
        with pytest.raises(ConfigError, match="no terminal on which to ask"):
            ask_password(None)
    with pytest.raises(ConfigError, match="exclude each other"):
        run("keygen", tmp_path / "b", "--no-password", "--password-file", tmp_path / "password")
    with pytest.raises(ConfigError, match="is no reference to a registry"):
        run("push", mine, "tiny")


@pytest.mark.parametrize(
    "option",
    ["--model=r1", "--api-key-file=keys", "--watch-s=600", "--switch-timeout-s=900"],
)
def test_a_roll_out_without_a_server_takes_no_option_of_one(tmp_path: Path, option: str):
    flag = option.split("=")[0]
    with pytest.raises(ConfigError, match=f"{flag} belongs to --server; add it"):
        run("rollout", "127.0.0.1:1/r1:stable", "--link", tmp_path / "r1", option)


@pytest.mark.parametrize("verb", [("rollout", "127.0.0.1:1/r1:stable"), ("recover",)])
def test_a_reload_command_is_refused_with_a_staging_directory(
    tmp_path: Path, verb: tuple[str, ...]
):
    place = ("--link", tmp_path / "r1", "--staging", tmp_path / "staging")
    with pytest.raises(ConfigError, match="--reload is given to the unit edge-llm-switch@"):
        run(*verb, *place, "--reload", "true")


def test_who_may_not_move_the_link_goes_back_to_no_older_release(tmp_path: Path):
    place = ("--link", tmp_path / "r1", "--staging", tmp_path / "staging")
    with pytest.raises(ConfigError, match="--allow-older is for who moves the link"):
        run("rollout", "127.0.0.1:1/r1:stable", *place, "--allow-older")


@pytest.mark.parametrize("option", ["--watch-s", "--switch-timeout-s"])
def test_a_roll_out_is_not_watched_for_nan_seconds(tmp_path: Path, option: str):
    done = run("rollout", "127.0.0.1:1/r1:stable", "--link", tmp_path / "r1", option, "nan")
    assert (done.exit_code, "nan is not a finite number" in done.output) == (2, True)
