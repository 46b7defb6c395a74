"""Signatures in minisign's format, with Debian's minisign as the judge of both directions."""

from __future__ import annotations

import base64
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bundle.minisign import (
    PublicKey,
    Signature,
    check_signature,
    parse_public_keys,
    parse_signature,
    read_public_keys,
)
from edge.errors import ConfigError, EdgeError, IntegrityError
from edge_lab import signing
from edge_lab.signing import encode_signature, make_key, read_secret_key, write_key_pair

DATA = b'{"schema_version": 6}\n' * 100


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("minisign") is None:
        pytest.skip("needs Debian's package minisign")
    return subprocess.run(
        ["minisign", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def no_password() -> str:
    raise AssertionError("the key is not encrypted")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.json"
    path.write_bytes(DATA)
    return path


def test_minisign_takes_our_key_and_our_signature(file: Path, tmp_path: Path):
    secret, public = tmp_path / "our.key", tmp_path / "our.pub"
    key = make_key()
    write_key_pair(secret, public, key, "")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    signature = file.with_name("manifest.json.minisig")
    signature.write_bytes(encode_signature(key.sign(DATA, "bundle:tiny")))
    checked = run("-V", "-p", public, "-m", file)
    assert checked.returncode == 0, checked.stderr
    assert "Trusted comment: bundle:tiny" in checked.stdout
    assert run("-V", "-P", key.public_key.line, "-m", file).returncode == 0
    file.write_bytes(DATA + b" ")
    assert run("-V", "-p", public, "-m", file).returncode != 0
    file.write_bytes(DATA)
    assert run("-S", "-s", secret, "-m", file).returncode == 0  # with our secret key
    made = parse_signature(signature.read_bytes(), "it")
    assert check_signature(DATA, made, [key.public_key]) == key.public_key


@pytest.mark.parametrize("legacy", [[], ["-l"]])
def test_we_take_minisigns_key_and_signature(file: Path, tmp_path: Path, legacy: list[str]):
    secret, public = tmp_path / "their.key", tmp_path / "their.pub"
    assert run("-G", "-W", "-p", public, "-s", secret).returncode == 0
    assert run("-S", *legacy, "-s", secret, "-m", file, "-t", "theirs").returncode == 0
    signature = parse_signature(file.with_name("manifest.json.minisig").read_bytes(), "it")
    assert signature.comment == "theirs"
    assert signature.prehashed == (not legacy)
    (key,) = read_public_keys(public)
    assert check_signature(DATA, signature, [make_key().public_key, key]).name in key.comment
    with pytest.raises(IntegrityError, match="is not of these bytes"):
        check_signature(DATA + b" ", signature, [key])
    again = read_secret_key(secret, no_password)
    assert again.public_key.line == key.line
    file.with_name("manifest.json.minisig").write_bytes(encode_signature(again.sign(DATA, "ours")))
    assert run("-V", "-p", public, "-m", file).returncode == 0


def test_a_password_opens_what_it_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # minisign's own costs take 1 GiB; the way from limits to costs is the same for lower ones.
    monkeypatch.setattr(signing, "_OPS_LIMIT", 1 << 16)
    monkeypatch.setattr(signing, "_MEMORY_LIMIT", 1 << 22)
    key = make_key()
    write_key_pair(tmp_path / "a.key", tmp_path / "a.pub", key, "correct horse")
    assert key.seed not in base64.b64decode((tmp_path / "a.key").read_text().splitlines()[1])
    assert read_secret_key(tmp_path / "a.key", lambda: "correct horse") == key
    with pytest.raises(ConfigError, match="the password is wrong"):
        read_secret_key(tmp_path / "a.key", lambda: "battery")
    assert key.seed.hex() not in repr(key)
    with pytest.raises(ConfigError, match="cannot write"):
        write_key_pair(tmp_path / "a.key", tmp_path / "b.pub", key, "")
    monkeypatch.setattr(signing, "_MEMORY_LIMIT", 1 << 21)
    with pytest.raises(ConfigError, match="more work than any key"):
        read_secret_key(tmp_path / "a.key", lambda: "correct horse")


@pytest.mark.parametrize(
    ("ops", "memory", "cost", "lanes"),
    [  # computed with libsodium's pickparams
        (1 << 25, 1 << 30, 1 << 20, 1),
        (524288, 1 << 24, 1 << 14, 1),
        (32768, 1 << 26, 1 << 10, 1),
        (1 << 25, 1 << 24, 1 << 14, 64),
    ],
)
def test_costs_are_those_of_libsodium(
    ops: int, memory: int, cost: int, lanes: int, monkeypatch: pytest.MonkeyPatch
):
    seen = {}

    class Scrypt:
        def __init__(self, **costs: object) -> None:
            seen.update(costs)

        def derive(self, _: bytes) -> bytes:
            return bytes(104)

    monkeypatch.setattr("cryptography.hazmat.primitives.kdf.scrypt.Scrypt", Scrypt)
    signing._stretch("", bytes(32), ops, memory)
    assert (seen["n"], seen["r"], seen["p"]) == (cost, 8, lanes)


def test_every_bit_of_a_signature_counts():
    key = make_key()
    good = encode_signature(key.sign(DATA, "bundle:tiny"))
    lines = good.split(b"\n")
    for number in (1, 3):
        raw = bytearray(base64.b64decode(lines[number]))
        for at in range(2, len(raw), 7):  # the algorithm is looked at by the parser
            raw[at] ^= 1
            bad = [*lines[:number], base64.b64encode(raw), *lines[number + 1 :]]
            raw[at] ^= 1
            with pytest.raises(IntegrityError):
                check_signature(DATA, parse_signature(b"\n".join(bad), "it"), [key.public_key])
    forged = good.replace(b"bundle:tiny", b"bundle:evil")
    with pytest.raises(IntegrityError):
        check_signature(DATA, parse_signature(forged, "it"), [key.public_key])
    # Another key under the same id.
    other = PublicKey(key.id, make_key().public)
    with pytest.raises(IntegrityError, match="is not of these bytes"):
        check_signature(DATA, parse_signature(good, "it"), [other])


def test_files_of_keys_are_public_keys_one_after_the_other():
    keys = [make_key().public_key for _ in range(3)]
    text = "# the release team\n\n" + "\n".join(key.encode() for key in keys)
    assert parse_public_keys(text, "it") == keys
    assert [key.key for key in parse_public_keys("\n".join(key.line for key in keys), "it")] == [
        key.key for key in keys
    ]
    with pytest.raises(ConfigError, match=r"has the key \w+ again"):
        parse_public_keys(keys[0].line + "\n" + keys[0].line, "it")
    with pytest.raises(ConfigError, match="line 2 of it is no public key"):
        parse_public_keys("# x\n" + keys[0].line[:-4], "it")
    with pytest.raises(ConfigError, match="has no public key"):
        parse_public_keys("# none\n", "it")


@given(st.binary(max_size=400))
def test_whatever_is_read_as_a_signature_is_one_or_an_error(data: bytes):
    try:
        parsed = parse_signature(data, "it")
    except EdgeError:
        return
    assert parse_signature(encode_signature(parsed), "it") == parsed


_NEAR = st.lists(
    st.sampled_from(
        ["untrusted comment: x", "trusted comment: y", make_key().public_key.line, "RWQ=", "é", ""]
    )
    | st.text(max_size=20),
    max_size=6,
).map("\n".join)


@given(_NEAR)
def test_whatever_is_read_as_keys_is_keys_or_an_error(text: str):
    try:
        keys = parse_public_keys(text, "it")
    except ConfigError:
        return
    again = parse_public_keys("".join(key.encode() for key in keys), "it")
    assert [(key.id, key.key) for key in again] == [(key.id, key.key) for key in keys]


@given(
    st.binary(max_size=300),
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=80),
)
def test_what_is_signed_is_checked(data: bytes, comment: str):
    key = make_key()
    if not comment.isprintable():
        with pytest.raises(ConfigError):
            key.sign(data, comment)
        return
    signature = parse_signature(encode_signature(key.sign(data, comment)), "it")
    assert signature.comment == comment
    assert check_signature(data, signature, [key.public_key]) == key.public_key
    with pytest.raises(IntegrityError):
        check_signature(data + b"x", signature, [key.public_key])


# Of libsodium's `ge25519_has_small_order`: the eight points, and what else decodes to them.
SMALL_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
]


@pytest.mark.parametrize("sign", [0, 0x80])
@pytest.mark.parametrize("point", SMALL_ORDER)
def test_a_key_whose_signatures_anybody_can_forge_is_refused(point: str, sign: int):
    raw = bytearray(bytes.fromhex(point))
    raw[31] |= sign
    key = PublicKey(b"12345678", bytes(raw))
    good = make_key().public_key
    with pytest.raises(ConfigError, match="line 4 of it is a key of small order"):
        parse_public_keys(good.encode() + key.encode(), "it")


def test_the_forgery_that_a_key_of_small_order_lets_through():
    """With the neutral element as key, every message has this signature, and OpenSSL takes it."""
    neutral = (1).to_bytes(32, "little")
    forged = Signature(b"12345678", True, neutral + bytes(32), "mine", neutral + bytes(32))
    key = PublicKey(b"12345678", neutral)
    assert check_signature(b"whatever", forged, [key]) == key
    with pytest.raises(ConfigError, match="small order"):
        parse_public_keys(key.encode(), "it")


def test_a_line_of_names_binds_the_key_after_it():
    bound, free = make_key().public_key, make_key().public_key
    text = f"names: acme/* acme/team/r1-?b\n{bound.encode()}{free.encode()}"
    first, second = parse_public_keys(text, "it")
    assert (first.key, first.names) == (bound.key, ("acme/*", "acme/team/r1-?b"))
    assert parse_public_keys(f"{bound.encode().splitlines()[0]}\nnames: a\n{bound.line}", "it")[
        0
    ].names == ("a",)
    assert second == free
    assert [
        name
        for name in ("acme/r1", "acme/team/r1-7b", "acme", "acme/team/x", "other/r1", "acme/r/1")
        if first.covers(name)
    ] == ["acme/r1", "acme/team/r1-7b"]
    assert second.covers("whatever/it/is")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names:\n{key}", "line 1 of it does not bind the key after it"),
        ("names: Acme/*\n{key}", "line 1 of it does not bind the key after it"),
        ("names: /acme\n{key}", "line 1 of it does not bind the key after it"),
        ("names: a\nnames: b\n{key}", "line 2 of it does not bind the key after it"),
        ("{key}names: a\n", "has no public key after names:"),
    ],
)
def test_names_that_bind_nothing_are_an_error(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_public_keys(text.format(key=make_key().public_key.encode()), "it")
