"""Layers, origins, and nothing accepted and ignored."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge.cli.settings_options import attribute_texts, settings_options
from edge.errors import ConfigError, DependencyError
from edge.layered_settings import Resolved
from edge.settings_fields import Section
from edge_serve.config_file import ENV_PREFIX, load_settings


@dataclass(frozen=True, kw_only=True)
class Base:
    """What every shop has.

    Attributes:
        opens_at: hour.
    """

    opens_at: int = 8

    SECTIONS: ClassVar[dict[Section, tuple[str, ...]]] = {"Limits": ("opens_at",)}


@dataclass(frozen=True, kw_only=True)
class Shop(Base):
    """A shop.

    Attributes:
        name: over the door,
            in large letters.
        price: of a bun; None is free.
        is_open: now.
        kind: of goods.
        ledger: file of sales.
        shelves: what lies where.
        till: with no option of its own.
    """

    name: str = "corner"
    price: float | None = None
    is_open: bool = False
    kind: Literal["bread", "cake"] = "bread"
    ledger: Path | None = None
    shelves: dict[str, Path] = field(default_factory=dict)
    till: str = "drawer"

    SECTIONS: ClassVar[dict[Section, tuple[str, ...]]] = {
        "Models": ("name", "price", "is_open", "kind"),
        "Expert": ("ledger", "shelves"),
    }

    def __post_init__(self) -> None:
        if not 0 <= self.opens_at < 24:
            raise ConfigError(f"opens_at {self.opens_at} is no hour")


def toml(tmp_path: Path, text: str) -> Path:
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli", reason="Python 3.10 reads no TOML without it")
    path = tmp_path / "shop.toml"
    path.write_text(text, encoding="utf-8")
    return path


def env(**values: str) -> dict[str, str]:
    return {f"{ENV_PREFIX}{name.upper()}": value for name, value in values.items()}


def test_defaults_alone():
    resolved = load_settings(Shop)
    assert resolved.settings == Shop()
    assert set(resolved.origins.values()) == {"default"}
    assert set(resolved.origins) == {item.name for item in fields(Shop)}


def test_each_layer_overrides_the_one_before(tmp_path: Path):
    path = toml(tmp_path, 'name = "file"\nopens_at = 6\nprice = 1.5\n')
    resolved = load_settings(
        Shop,
        file=path,
        environ=env(name="environment", opens_at="7") | {"PATH": "/bin"},
        flags={"name": "flag", "price": None, "shelves": ()},
    )
    assert resolved.settings == Shop(name="flag", opens_at=7, price=1.5)
    assert resolved.origins == {
        "opens_at": f"environment {ENV_PREFIX}OPENS_AT",
        "name": "flag --name",
        "price": f"file {path}",
        "is_open": "default",
        "kind": "default",
        "ledger": "default",
        "shelves": "default",
        "till": "default",
    }


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False)]
)
def test_text_is_converted_to_the_fields_type(text: str, value: bool):
    assert load_settings(Shop, environ=env(is_open=text)).settings.is_open is value
    assert load_settings(Shop, flags={"is_open": value}).settings.is_open is value


def test_tables(tmp_path: Path):
    path = toml(tmp_path, '[shelves]\nbuns = "a/b"\nrye = "/c"\n')
    assert load_settings(Shop, file=path).settings.shelves == {
        "buns": tmp_path / "a/b",
        "rye": Path("/c"),
    }
    expected = {"x": Path("1"), "y": Path("/2=3")}
    from_environment = load_settings(Shop, file=path, environ=env(shelves="x=1, y=/2=3"))
    assert from_environment.settings.shelves == expected  # as a whole, not key by key
    assert load_settings(Shop, flags={"shelves": ("x=1", "y=/2=3")}).settings.shelves == expected


def test_a_relative_path_is_relative_to_where_it_is_written(tmp_path: Path):
    path = toml(tmp_path, 'ledger = "sales.csv"\n')
    assert load_settings(Shop, file=path).settings.ledger == tmp_path / "sales.csv"
    assert load_settings(Shop, flags={"ledger": "sales.csv"}).settings.ledger == Path("sales.csv")


def test_an_empty_variable_is_not_set():
    assert load_settings(Shop, environ=env(price="", name="")).settings == Shop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("opens_att = 3", "unknown key 'opens_att'; the nearest known one is 'opens_at'"),
        ("opens_at = '3'", "opens_at is '3': Expected `int`, got `str`"),
        ("opens_at = true", "Expected `int`"),
        ("opens_at = 99", "opens_at 99 is no hour"),
        ("kind = 'fish'", "kind is 'fish': use bread, cake"),
        ("ledger = 3", "a path is needed, got 3"),
        ("ledger = ''", "a path is needed, got ''"),
        ("shelves = 3", "Expected `object`"),
        ("shelves = {a = 1}", "a path is needed, got 1"),
        ("opens_at = ", "is not valid TOML"),
        ("[opens_at]\nx = 1", "Expected `int`, got `object`"),
        ("name = 1979-05-27", "Expected `str`"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, message: str, tmp_path: Path):
    path = toml(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings(Shop, file=path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or "is no hour" in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (env(opens_att="3"), f"unknown environment variable {ENV_PREFIX}OPENS_ATT; the nearest"),
        (env(opens_at="early"), f"environment {ENV_PREFIX}OPENS_AT: opens_at is 'early'"),
        (env(opens_at="3.5"), "Expected `int`"),
        (env(is_open="perhaps"), "Expected `bool`"),
        (env(shelves="bread"), "shelves needs NAME=VALUE, found 'bread'"),
        (env(shelves="a=1,a=2"), "shelves names 'a' twice"),
        (env(shelves="=x"), "shelves needs NAME=VALUE"),
        (env(ledger="~nouser/x"), "this system knows no such home directory"),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(environ: dict[str, str], message: str):
    with pytest.raises(ConfigError) as caught:
        load_settings(Shop, environ=environ)
    assert message in str(caught.value)


def test_files_that_are_none(tmp_path: Path):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        load_settings(Shop, file=tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_settings(Shop, file=binary)
    huge = tmp_path / "huge.toml"
    huge.write_text("#" * (1 << 21))
    with pytest.raises(ConfigError, match="larger than"):
        load_settings(Shop, file=huge)


def test_python_310_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "shop.toml"
    path.write_text("")
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(DependencyError, match=r"install .*-e .*\[serve\]"):
        load_settings(Shop, file=path)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        st.from_regex(r"/[a-z=/.]{1,12}", fullmatch=True),
        min_size=1,
    ),
    st.floats(0, 1e6),
)
def test_any_value_survives_the_environment(shelves: dict[str, str], price: float):
    text = ",".join(f"{name}={value}" for name, value in shelves.items())
    found = load_settings(Shop, environ=env(shelves=text, price=repr(price))).settings
    assert found.price == price
    assert found.shelves == {name: Path(value) for name, value in shelves.items()}


# --------------------------------------------------------------------------- flags


def run_flags(*arguments: str) -> Resolved[Shop]:
    found: list[Resolved[Shop]] = []

    @click.command()
    @settings_options(Shop)
    def command(**flags: object) -> None:
        found.append(load_settings(Shop, flags=flags))

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def test_every_field_of_a_section_is_a_flag():
    assert run_flags().settings == Shop()
    resolved = run_flags(
        *("--name", "x", "--opens-at", "5", "--price", "2.5", "--is-open", "--kind", "cake"),
        *("--ledger", "l", "--shelves", "a=b", "--shelves", "c=d"),
    )
    assert resolved.settings == Shop(
        name="x",
        opens_at=5,
        price=2.5,
        is_open=True,
        kind="cake",
        ledger=Path("l"),
        shelves={"a": Path("b"), "c": Path("d")},
    )
    assert resolved.origins == {
        item.name: "default" if item.name == "till" else f"flag --{item.name.replace('_', '-')}"
        for item in fields(Shop)
    }
    with pytest.raises(click.NoSuchOption):
        click.command()(settings_options(Shop)(lambda: None)).make_context("x", ["--till", "box"])
    assert run_flags("--no-is-open").origins["is_open"] == "flag --is-open"


def test_help_is_the_docstrings():
    assert attribute_texts(Shop) == {
        "opens_at": "hour.",
        "name": "over the door, in large letters.",
        "price": "of a bun; None is free.",
        "is_open": "now.",
        "kind": "of goods.",
        "ledger": "file of sales.",
        "shelves": "what lies where.",
        "till": "with no option of its own.",
    }


def test_every_setting_of_the_server_is_described():
    from edge_serve.settings import ServerSettings

    texts = attribute_texts(ServerSettings)
    assert [item.name for item in fields(ServerSettings) if not texts.get(item.name)] == []
