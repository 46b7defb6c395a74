"""Signatures in minisign's format, with Debian's minisign as the judge of both directions."""

from __future__ import annotations

import base64
import stat
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
from edge.errors import ConfigError, DependencyError, EdgeError, IntegrityError
from edge_make.signing import make_key_pair, open_signer, write_signature
from tests.makers.keys import encode_public_key, encode_signature, make_key, minisign, need_minisign

DATA = b'{"schema_version": 6}\n' * 100


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.json"
    path.write_bytes(DATA)
    return path


def ask_nothing() -> str:
    raise AssertionError("the key is not encrypted")


@pytest.mark.live
def test_minisign_takes_what_it_signed_for_us(file: Path, tmp_path: Path):
    need_minisign()
    secret, public = tmp_path / "our.key", tmp_path / "our.pub"
    key = make_key_pair(secret, public, "")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert read_public_keys(public) == [key]
    signer = open_signer(secret, ask_nothing)
    assert signer.public_key.key == key.key
    signature = file.with_name("manifest.json.minisig")
    write_signature(signature, signer.sign(DATA, "bundle:tiny"))
    assert signature.read_text().startswith("untrusted comment: signature of edge-llm\n")
    checked = minisign("-V", "-p", public, "-m", file)
    assert checked.returncode == 0, checked.stderr
    assert "Trusted comment: bundle:tiny" in checked.stdout
    made = parse_signature(signature.read_bytes(), "it")
    assert check_signature(DATA, made, [key]) == key
    file.write_bytes(DATA + b" ")
    assert minisign("-V", "-p", public, "-m", file).returncode != 0


@pytest.mark.live
@pytest.mark.parametrize("legacy", [[], ["-l"]])
def test_keys_and_signatures_of_minisign_are_accepted(
    file: Path, tmp_path: Path, legacy: list[str]
):
    secret, public = tmp_path / "their.key", tmp_path / "their.pub"
    assert minisign("-G", "-W", "-p", public, "-s", secret).returncode == 0
    assert minisign("-S", *legacy, "-s", secret, "-m", file, "-t", "theirs").returncode == 0
    signature = parse_signature(file.with_name("manifest.json.minisig").read_bytes(), "it")
    assert signature.comment == "theirs"
    assert signature.prehashed == (not legacy)
    (key,) = read_public_keys(public)
    assert check_signature(DATA, signature, [make_key().public_key, key]).name in key.comment
    with pytest.raises(IntegrityError, match="is not of these bytes"):
        check_signature(DATA + b" ", signature, [key])


@pytest.mark.live
def test_minisign_takes_the_signatures_of_these_tests(file: Path):
    key = make_key()
    file.with_name("manifest.json.minisig").write_bytes(key.sign(DATA, "tests"))
    assert minisign("-V", "-P", key.public_line, "-m", file).returncode == 0


@pytest.mark.live
def test_a_key_that_edge_llm_wrote_itself_signs_as_before():
    need_minisign()
    old = Path(__file__).parent.parent / "data" / "keys"
    (key,) = parse_public_keys((old / "old.pub").read_text(), "old.pub")
    signature = parse_signature((old / "signed.minisig").read_bytes(), "signed.minisig")
    assert check_signature(DATA, signature, [key]) == key
    for name, ask in (("old.key", ask_nothing), ("old-password.key", lambda: "correct horse")):
        signer = open_signer(old / name, ask)
        made = parse_signature(signer.sign(DATA, "again"), "it")
        assert check_signature(DATA, made, [key]) == key


@pytest.mark.live
def test_a_password_opens_what_it_encrypted(tmp_path: Path):
    need_minisign()
    secret = tmp_path / "a.key"
    key = make_key_pair(secret, tmp_path / "a.pub", "correct horse")
    signer = open_signer(secret, lambda: "correct horse")
    assert signer.public_key.key == key.key
    assert "correct horse" not in repr(signer)
    assert check_signature(DATA, parse_signature(signer.sign(DATA, "c"), "it"), [key]) == key
    with pytest.raises(ConfigError, match="minisign says: Wrong password for that key"):
        open_signer(secret, lambda: "battery")
    with pytest.raises(ConfigError, match=r"a\.key: it is there already; choose another name"):
        make_key_pair(secret, tmp_path / "b.pub", "")
    assert not (tmp_path / "b.pub").exists()


@pytest.mark.live
def test_wrong_keys_and_comments_are_refused(tmp_path: Path):
    need_minisign()
    path = tmp_path / "a.key"
    path.write_text("not a key\n")
    with pytest.raises(ConfigError, match=r"the secret key .*a\.key cannot be used; minisign says"):
        open_signer(path, ask_nothing)
    make_key_pair(tmp_path / "b.key", tmp_path / "b.pub", "")
    signer = open_signer(tmp_path / "b.key", ask_nothing)
    for comment in ("", "two\nlines", "x" * 1025):
        with pytest.raises(ConfigError, match="is not one line of at most 1024 bytes"):
            signer.sign(DATA, comment)


@pytest.mark.live
def test_without_minisign_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyError, match="apt-get install minisign"):
        make_key_pair(tmp_path / "a.key", tmp_path / "a.pub", "")


def test_every_bit_of_a_signature_counts():
    key = make_key()
    good = key.sign(DATA, "bundle:tiny")
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
    other = PublicKey(key.public_key.id, make_key().public_key.key)
    with pytest.raises(IntegrityError, match="is not of these bytes"):
        check_signature(DATA, parse_signature(good, "it"), [other])


def test_files_of_keys_are_public_keys_one_after_the_other():
    made = [make_key() for _ in range(3)]
    keys = [key.public_key for key in made]
    text = "# the release team\n\n" + "\n".join(key.public_text for key in made)
    assert parse_public_keys(text, "it") == keys
    bare = parse_public_keys("\n".join(key.public_line for key in made), "it")
    assert [key.key for key in bare] == [key.key for key in keys]
    with pytest.raises(ConfigError, match=r"has the key \w+ again"):
        parse_public_keys(made[0].public_line + "\n" + made[0].public_line, "it")
    with pytest.raises(ConfigError, match="line 2 of it is no public key"):
        parse_public_keys("# x\n" + made[0].public_line[:-4], "it")
    with pytest.raises(ConfigError, match="has no public key"):
        parse_public_keys("# none\n", "it")


@given(st.binary(max_size=400))
def test_any_bytes_read_as_a_signature_are_one_or_an_error(data: bytes):
    try:
        parsed = parse_signature(data, "it")
    except EdgeError:
        return
    assert parse_signature(encode_signature(parsed), "it") == parsed


_NEAR = st.lists(
    st.sampled_from(
        ["untrusted comment: x", "trusted comment: y", make_key().public_line, "RWQ=", "é", ""]
    )
    | st.text(max_size=20),
    max_size=6,
).map("\n".join)


@given(_NEAR)
def test_any_text_read_as_keys_is_keys_or_an_error(text: str):
    try:
        keys = parse_public_keys(text, "it")
    except ConfigError:
        return
    again = parse_public_keys("".join(map(encode_public_key, keys)), "it")
    assert [(key.id, key.key) for key in again] == [(key.id, key.key) for key in keys]


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
    both = make_key().public_text + encode_public_key(key)
    with pytest.raises(ConfigError, match="line 4 of it is a key of small order"):
        parse_public_keys(both, "it")


def test_the_forgery_that_a_key_of_small_order_lets_through():
    """With the neutral element as key, every message has this signature, and OpenSSL takes it."""
    neutral = (1).to_bytes(32, "little")
    forged = Signature(b"12345678", True, neutral + bytes(32), "mine", neutral + bytes(32))
    key = PublicKey(b"12345678", neutral)
    assert check_signature(b"whatever", forged, [key]) == key
    with pytest.raises(ConfigError, match="small order"):
        parse_public_keys(encode_public_key(key), "it")


def test_a_line_of_names_binds_the_key_after_it():
    bound, free = make_key(), make_key()
    text = f"names: acme/* acme/team/r1-?b\n{bound.public_text}{free.public_text}"
    first, second = parse_public_keys(text, "it")
    assert (first.key, first.names) == (bound.public_key.key, ("acme/*", "acme/team/r1-?b"))
    between = f"{bound.public_text.splitlines()[0]}\nnames: a\n{bound.public_line}"
    assert parse_public_keys(between, "it")[0].names == ("a",)
    assert second == free.public_key
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
        parse_public_keys(text.format(key=make_key().public_text), "it")
