"""Files of API keys: who may read them, what a line may be, and keys that are only hashes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge.errors import ConfigError
from edge_make.key_file import MAX_FILE_BYTES, hashed_line, make_key, read_key_file
from edge_serve.cli.key import key as verb
from tests.conftest import write_secret

KEY = "sk-a-key-of-the-tests"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_lines_of_every_form(path: Path):
    text = "# who\n\nalice:sk-1234567890abc\n a:b:sk-after-colons-x \nclé:sk-of-a-name-in-UTF-8\r\n"
    write_secret(path, f"{text}hash:sha256:{DIGEST}\n")
    entries = read_key_file(path)
    assert [(entry.name, entry.key) for entry in entries] == [
        ("alice", "sk-1234567890abc"),
        ("a:b", "sk-after-colons-x"),
        ("clé", "sk-of-a-name-in-UTF-8"),
        ("hash", None),
    ]
    assert entries[0].digest == hashlib.sha256(b"sk-1234567890abc").digest()
    assert entries[3].digest.hex() == DIGEST
    assert not any("sk-" in repr(entry) for entry in entries)


def test_two_keys_of_one_name_are_both_good(path: Path):
    """So that a client can change from the old to the new one."""
    write_secret(path, f"alice:sk-1234567890abc\n{hashed_line('alice', KEY)}\n")
    assert [entry.name for entry in read_key_file(path)] == ["alice", "alice"]


@pytest.mark.parametrize(
    "text",
    [
        "a:tiny",
        "a:sk-1234567890ab",  # fifteen
        "a:sk-1234567890abc\nb:sk-1234567890abc",
        f"a:{KEY}\nb:sha256:{DIGEST}",
        "a:une-clé-très-secrète",
        f"a:sha256:{DIGEST[:-1]}",
        f"a:sha256:{DIGEST.upper()}",
        f"a:SHA256:{DIGEST}",
        f"a:sha256:{DIGEST}0",
    ],
    ids=["short", "one short", "twice", "key and hash", "no ASCII", "cut", "upper", "name", "long"],
)
def test_a_wrong_line_is_named_and_not_shown(path: Path, text: str):
    write_secret(path, f"# comment\n{text}\n")
    with pytest.raises(ConfigError, match=r"line [23] of .* has no new key") as caught:
        read_key_file(path)
    assert not any(line.rpartition(":")[2] in str(caught.value) for line in text.split("\n"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("garbage without colon", "a blank"),  # what was once a key, and locked all others out
        ("garbage-without-colon", "no name"),
        (f":{KEY}", "no name"),
        (f"sha256:{DIGEST}", "no name"),
        (f":sha256:{DIGEST}", "no name"),
        (f"a b:{KEY}", "a blank"),
        (f"a:{KEY} {KEY}", "a blank"),
        (f"a: {KEY}", "a blank"),
        (f"a :sha256:{DIGEST}", "a blank"),
        (f"a\t{KEY}", "a blank"),
        (f"a\x1b[2J:{KEY}", "a blank or a control character"),
        (f"a\u00a0b:{KEY}", "a blank"),
    ],
)
def test_a_line_with_a_blank_or_without_a_name_is_no_key(path: Path, text: str, why: str):
    write_secret(path, f"alice:{KEY[::-1]}\n{text}\n")
    with pytest.raises(ConfigError, match=rf"line 2 of .* has {why}.*write NAME:KEY") as caught:
        read_key_file(path)
    assert KEY not in str(caught.value)
    assert "garbage" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_a_file_without_keys(path: Path, text: str):
    write_secret(path, text)
    with pytest.raises(ConfigError, match="has no API key"):
        read_key_file(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666, 0o610])
def test_a_file_that_others_can_use_is_refused(path: Path, mode: int):
    write_secret(path, f"me:{KEY}\n")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"\(mode 0{mode:o}\); run: chmod 600 {path}$"):
        read_key_file(path)
    link = path.with_name("link")
    link.symlink_to(path)  # counts as what it leads to
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key_file(link)
    for good in (0o600, 0o400):
        path.chmod(good)
        assert len(read_key_file(link)) == 1


def test_credentials_of_systemd_are_exempt_wherever_the_link_to_them_is(path: Path):
    credentials = path.with_name("credentials")
    credentials.mkdir()
    inside = write_secret(credentials / "api-keys", f"me:{KEY}\n")
    inside.chmod(0o440)  # as the access list shows
    path.symlink_to(inside)
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    for way in (inside, path, credentials / ".." / "credentials" / "api-keys"):
        assert len(read_key_file(way, environ)) == 1
        with pytest.raises(ConfigError, match="chmod 600"):
            read_key_file(way, {})
    outside = write_secret(path.with_name("outside"), f"me:{KEY}\n")
    outside.chmod(0o440)
    (credentials / "link").symlink_to(outside)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key_file(credentials / "link", environ)


def test_files_that_are_none(path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the API keys of .*No such file"):
        read_key_file(path)
    os.mkfifo(path, 0o600)
    with pytest.raises(ConfigError, match="it is no plain file"):
        read_key_file(path)
    path.unlink()
    path.touch(0o600)
    path.write_bytes(b"me:\xff\xff\xff\xff\xff\xff\xff\xff\xff")
    with pytest.raises(ConfigError, match="cannot read"):
        read_key_file(path)
    os.truncate(path, MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        read_key_file(path)


def test_made_keys_differ_and_are_long():
    made = {make_key() for _ in range(100)}
    assert len(made) == 100
    assert {len(one) for one in made} == {43}  # 256 bits


def test_the_verb_makes_a_key_and_the_line_for_its_hash(path: Path):
    done = CliRunner().invoke(verb, ["alice"])
    made = done.stderr.rpartition(": ")[2].strip()
    assert made not in done.stdout
    write_secret(path, done.stdout)
    [entry] = read_key_file(path)
    assert (entry.name, entry.key) == ("alice", None)
    assert entry.digest == hashlib.sha256(made.encode()).digest()


def test_the_verb_hashes_a_key_that_is_there(path: Path):
    done = CliRunner().invoke(verb, ["alice", "--stdin"], input=f"{KEY}\n")
    assert done.stdout == f"alice:sha256:{DIGEST}\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "given", "says"),
    [
        (["a:b"], "", "the name 'a:b'"),
        (["#a"], "", "the name '#a'"),
        (["a b"], "", "the name 'a b'"),
        (["a", "--stdin"], "", "no key of one line"),
        (["a", "--stdin"], "x" * 5000, "no key of one line"),
        (["a", "--stdin"], "short\n", "at least 16 ASCII"),
        (["a", "--stdin"], "two-of-them\nin-two-lines\n", "at least 16 ASCII"),
        (["a", "--stdin"], " a-space-before\n", "at least 16 ASCII"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_the_verb_refuses_bad_options(arguments: list[str], given: str, says: str):
    done = subprocess.run(
        [sys.executable, "-m", "edge.cli", "key", *arguments],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert says in done.stderr
    assert done.stdout == ""
