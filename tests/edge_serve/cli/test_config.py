"""``edge-llm config show``: what ``serve`` would run with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from edge.errors import ConfigError, EdgeError
from edge_serve.cli.config import config
from edge_serve.cli.serve import serve
from edge_serve.config_file import load_settings
from edge_serve.settings import ServerSettings, keys_without_option
from tests.conftest import write_secret


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "edge_serve.cli.config_option.DEFAULT_FILE", Path("/nonexistent/config.toml")
    )


def show(*arguments: str, **environ: str) -> Result:
    result = CliRunner(env=dict(environ)).invoke(config, ["show", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write(tmp_path: Path) -> Path:
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    path = tmp_path / "edge.toml"
    path.write_text('port = 1234\n[model]\nr1 = "bundles/r1"\n')
    return path


def test_values_and_origins(tmp_path: Path):
    path = write(tmp_path)
    result = show(
        *("--config", str(path), "--origin", "--json", "--num-slots", "2"),
        EDGE_LLM_SERVE_QUEUE_CAPACITY="9",
    )
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["settings"]["port"] == 1234
    assert found["settings"]["model"] == {"r1": str(tmp_path / "bundles/r1")}
    assert found["settings"]["queue_capacity"] == 9
    assert found["settings"]["num_slots"] == 2
    assert found["origin"]["port"] == f"file {path}"
    assert found["origin"]["queue_capacity"] == "environment EDGE_LLM_SERVE_QUEUE_CAPACITY"
    assert found["origin"]["num_slots"] == "flag --num-slots"
    assert found["origin"]["host"] == "default"


@pytest.mark.parametrize(
    ("name", "text", "value", "flag"),
    [
        ("prefill_chunk", "64", 64, ("--prefill-chunk", "64")),
        ("int8_activations", "false", False, ("--no-int8-activations",)),
    ],
)
def test_every_layer_can_set_a_value(
    tmp_path: Path, name: str, text: str, value: object, flag: Any
):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    path = tmp_path / "edge.toml"
    path.write_text(f"{name} = {text}\n")
    variable = f"EDGE_LLM_SERVE_{name.upper()}"
    shown = ("--origin", "--json", "--model", "/srv/r1")
    for result, origin in (
        (show("--config", str(path), *shown), f"file {path}"),
        (show(*shown, **{variable: text}), f"environment {variable}"),
        (show(*shown, *flag), f"flag --{name.replace('_', '-')}"),
    ):
        found = json.loads(result.stdout)
        assert (found["settings"][name], found["origin"][name]) == (value, origin)


def test_its_output_is_a_configuration(tmp_path: Path):
    """What it prints can be saved as a file that means the same."""
    path = write(tmp_path)
    text = show("--config", str(path), "--request-timeout-s", "5").stdout
    again = tmp_path / "again.toml"
    again.write_text(text)
    before = load_settings(ServerSettings, file=path, flags={"request_timeout_s": "5"}).settings
    assert load_settings(ServerSettings, file=again).settings == before


def test_lines_name_the_origin(tmp_path: Path):
    path = write(tmp_path)
    lines = show("--config", str(path), "--origin").stdout.splitlines()
    (port,) = [line for line in lines if line.startswith("port ")]
    assert port.split("#")[0].split() == ["port", "=", "1234"]
    assert port.endswith(f"# file {path}")


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--port", "70000"], {}, "port is '70000'"),
        ([], {"EDGE_LLM_SERVE_PROT": "1"}, "the nearest known one is 'EDGE_LLM_SERVE_PORT'"),
        (["--host", "0.0.0.0"], {}, "no API key is set"),
        ([], {"EDGE_LLM_SERVE_HOT_CELSIUS": "nan"}, "hot_celsius is 'nan': Expected `float` > 0"),
        ([], {"EDGE_LLM_SERVE_HOT_CELSIUS": "-5"}, "hot_celsius is '-5': Expected `float` > 0"),
        (["--memory-budget-mb", "-3"], {}, "memory_budget_mb is '-3': Expected `int` >= 0"),
    ],
)
def test_it_refuses_what_serve_would_refuse(
    arguments: list[str], environ: dict[str, str], message: str
):
    with pytest.raises(ConfigError, match=message):
        show(*arguments, **environ)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "no model to serve"),
        ({"model": "/srv/r1", "default_model": "nope"}, "the default model 'nope'"),
        ({"model": "/srv/r1", "api_key_file": "/nonexistent"}, "cannot read the API keys"),
        ({"model": "/srv/r1", "split": "x=garbage"}, "split: cannot read 'garbage'"),
        ({"model": "/srv/r1", "auto": "r2=always"}, "'r2' is not one of the models"),
        ({"model": "/srv/r1", "drift_baseline": "/nonexistent"}, "cannot read /nonexistent"),
        ({"model": "/srv/r1", "drift_window": "1"}, "a window of 1 requests is too small"),
    ],
)
def test_what_the_service_refuses_before_it_opens_a_bundle_is_refused_too(
    flags: dict[str, str], message: str
):
    """Once the settings are shown: they may be all that was asked for."""
    for needed in ("uvicorn", "starlette", "prometheus_client"):
        pytest.importorskip(needed)
    from edge_serve.run import Service

    environ = {f"EDGE_LLM_SERVE_{name.upper()}": value for name, value in flags.items()}
    result = CliRunner(env=environ).invoke(config, ["show", "--json"])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert json.loads(result.stdout)["port"] == 8000
    settings = load_settings(ServerSettings, environ={}, flags=flags).settings
    with pytest.raises(ConfigError, match=message):
        Service(settings, lambda _: pytest.fail("nothing is opened"))


@pytest.mark.parametrize("command", [serve, *config.commands.values()])
def test_a_flag_that_is_gone_names_the_key_that_is_left(command: click.Command):
    for flag, arguments in (
        ("--max-header-bytes", ["--max-header-bytes=5"]),
        ("--stall-s", ["--stall-s", "5"]),
    ):
        key = flag.removeprefix("--").replace("-", "_")
        with pytest.raises(click.UsageError) as caught:
            command.make_context("x", arguments)
        assert str(caught.value) == (
            f"{flag} is no option any more; write {key} in the file of --config, or set "
            f"EDGE_LLM_SERVE_{key.upper()}"
        )
    with pytest.raises(click.NoSuchOption):
        command.make_context("x", ["--stall-minutes", "5"])


def test_every_setting_without_a_flag_is_a_key_and_a_variable(tmp_path: Path):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    keys = keys_without_option()
    assert "max_header_bytes" in keys
    path = tmp_path / "edge.toml"
    others = {
        "max_inflight_body_bytes": 2**30,
        "trusted_proxies": ["10.0.0.2", "fd00::/8"],
        "admin_keys": ["ann"],
        "adapter_dir": Path("/srv/adapters"),
        "key_adapters": {"ann": "legal"},
    }
    path.write_text(
        "".join(f"{key} = 77\n" for key in keys if key not in others)
        + 'adapter_dir = "/srv/adapters"\nkey_adapters = { ann = "legal" }\n'
    )
    environ = {
        "EDGE_LLM_SERVE_MAX_INFLIGHT_BODY_BYTES": str(2**30),
        "EDGE_LLM_SERVE_TRUSTED_PROXIES": "10.0.0.2, fd00::/8",
        "EDGE_LLM_SERVE_ADMIN_KEYS": "ann",
        "EDGE_LLM_SERVE_API_KEY_FILE": "/srv/keys",
    }
    found = load_settings(ServerSettings, file=path, environ=environ)
    for key in keys:
        assert found.origins[key] != "default"
        assert getattr(found.settings, key) == others.get(key, 77)


def test_no_secret_is_printed(tmp_path: Path):
    keys = write_secret(tmp_path / "keys", "me:very-secret-key-of-mine\n")
    shown = show("--model", "/srv/r1", "--api-key-file", str(keys), "--origin").stdout
    assert str(keys) in shown
    assert "very-secret" not in shown


# --------------------------------------------------------------------------- bundles by name


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two bundles that have names."""
    root = tmp_path / "kept"
    for name in ("big-7b-int4", "small-1.5b-int4"):
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").touch()
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(root))
    return root


def test_a_file_of_settings_names_bundles(kept: Path, tmp_path: Path):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    path = tmp_path / "edge.toml"
    path.write_text('draft = "1.5b"\n[model]\nr1 = "7b"\nother = "kept/small-1.5b-int4"\n')
    settings = json.loads(show("--config", str(path), "--json").stdout)
    assert settings["draft"] == str(kept / "small-1.5b-int4")
    assert settings["model"] == {
        "r1": str(kept / "big-7b-int4"),
        "other": str(kept / "small-1.5b-int4"),
    }
    path.write_text('draft = "eagle3"\n')
    found = load_settings(ServerSettings, file=path).settings
    assert found.drafts_with_head


@pytest.mark.parametrize("given", ["flags", "environment"])
def test_a_bundle_alone_is_served_under_its_name(kept: Path, given: str):
    environ = {"EDGE_LLM_SERVE_MODEL": "7b, fast=1.5b", "EDGE_LLM_SERVE_DRAFT": "small"}
    flags = ("--model", "7b", "--model", "fast=1.5b", "--draft", "small")
    result = show("--json", *flags) if given == "flags" else show("--json", **environ)
    settings = json.loads(result.stdout)
    small = str(kept / "small-1.5b-int4")
    assert settings["model"] == {"big-7b-int4": str(kept / "big-7b-int4"), "fast": small}
    assert settings["draft"] == small


@pytest.mark.parametrize(
    ("written", "name", "path"),
    [
        ("{}/a=b/tiny", "tiny", "{}/a=b/tiny"),
        ("./a=b/tiny", "tiny", "a=b/tiny"),
        ("r1={}/a=b/tiny", "r1", "{}/a=b/tiny"),
        ("owner/r1={}/tiny", "owner/r1", "{}/tiny"),
    ],
)
def test_a_path_may_have_an_equals_sign(written: str, name: str, path: str, tmp_path: Path):
    flags = {"model": (written.format(tmp_path),)}
    found = load_settings(ServerSettings, flags=flags).settings.model
    assert found == {name: Path(path.format(tmp_path))}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "a=int4"), ["flag --model", "'int4' fits 2 bundles", "big-7b", "small-1.5b"]),
        (
            ("--draft", "gemma"),
            ["flag --draft", "draft is 'gemma'", "which has big-7b-int4, small"],
        ),
        (("--model", "8b"), ["model is '8b'", "edge-llm pull deepseek-r1:8b"]),
        (("--model", "7b", "--model", "big"), ["names 'big-7b-int4' twice"]),
    ],
)
def test_a_name_that_finds_no_bundle_is_refused(kept: Path, flags: tuple[str, ...], words: Any):
    with pytest.raises(EdgeError) as caught:
        show(*flags)
    for word in words:
        assert word in str(caught.value)
