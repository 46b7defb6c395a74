from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.manifest import Tokens
from edge.errors import BundleError, RequestError
from edge.text import tokenizer as module
from edge.text.streamed_text import Detokenizer
from edge.text.tokenizer import Tokenizer
from edge_make.read_tokenizer import read_tokenizer
from tests.makers.tiny_models import BOS, BOS_ID, CONTROL, CONTROL_IDS, EOS, EOS_ID, write_tokenizer

TOKENS = Tokens(bos=BOS_ID, bos_text=BOS, eos=(EOS_ID,), eos_text=EOS, add_bos=True)
NO_BOS = Tokens(bos=None, bos_text="", eos=(), eos_text="", add_bos=False)
quick = settings(deadline=None, max_examples=150)

characters = st.characters(exclude_categories=["Cs"])
fragments = st.one_of(
    st.sampled_from(CONTROL),
    st.sampled_from([" ", "  ", "\n", "\t\n ", "<", "<think", "think>", "|>", "<|User|>", "｜"]),
    st.sampled_from(
        ["hello world", "äöü e\u0301", "你好，世界", "مرحبا", "👩‍👩‍👧", "\u200b", "\x00", "1234"]
    ),
    st.text(characters, max_size=5),
)
texts = st.lists(fragments, max_size=12).map("".join)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(path) -> Tokenizer:
    return read_tokenizer(path, TOKENS)


@pytest.fixture(scope="module")
def reference(path) -> Any:
    return tokenizers.Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def without_control(path) -> Any:
    """The library on a file that knows no control tokens: what plain text has to become."""
    return tokenizers.Tokenizer.from_str(changed(path, added_tokens=[]).decode())


def changed(path: Path, **changes: object) -> bytes:
    return json.dumps(json.loads(path.read_bytes()) | changes).encode()


def added(token_id: int, content: str, **flags: bool) -> dict[str, object]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token_id, "content": content} | {name: flags.get(name, False) for name in names}


# --- encode ---------------------------------------------------------------------------------


@quick
@given(texts)
def test_with_control_tokens_it_is_the_library(tokenizer, reference, text):
    expected = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, control=True) == expected


@quick
@given(texts)
def test_plain_text_never_becomes_a_control_token(tokenizer, without_control, text):
    ids = tokenizer.encode(text)
    assert ids == without_control.encode(text, add_special_tokens=False).ids
    assert not set(ids) & set(CONTROL_IDS.values())
    assert tokenizer.decode(ids) == without_control.normalizer.normalize_str(text)


def test_typed_control_tokens_of_r1(tokenizer):
    # Of these only two are "special" in R1's tokenizer.json, and all seven steer the model.
    for text, token_id in CONTROL_IDS.items():
        assert tokenizer.encode(text, control=True) == [token_id]
        assert len(tokenizer.encode(text)) > 1
        assert tokenizer.id_of(text) == token_id
    assert tokenizer.control_tokens == CONTROL_IDS
    assert tokenizer.id_of("no such token") is None


def test_bos_is_added_once_and_only_on_request(tokenizer, path):
    # The post-processor of the file adds bos too; it must not.
    assert BOS_ID not in tokenizer.encode("hello", control=True)
    assert tokenizer.encode("hello", add_bos=True) == [BOS_ID, *tokenizer.encode("hello")]
    without = Tokenizer.from_bytes(path.read_bytes(), NO_BOS)
    with pytest.raises(RequestError, match="no bos"):
        without.encode("hello", add_bos=True)


@quick
@given(st.lists(st.sampled_from([" ", "  ", "a", "a b", "\n", "LL", "RR", "WW", "Ωé", "ΩÉ", "ωÉ"])))
def test_flags_of_added_tokens_are_honoured(path, pieces):
    tokens = [
        added(304, "LL", lstrip=True),
        added(305, "RR", rstrip=True, special=True),
        added(306, "WW", single_word=True),
        added(307, "ΩÉ", normalized=True),
        added(308, "a b", normalized=True, special=True),
    ]
    data = changed(path, added_tokens=tokens, normalizer={"type": "Lowercase"})
    ours = Tokenizer.from_bytes(data, NO_BOS)
    library = tokenizers.Tokenizer.from_str(data.decode())
    text = "".join(pieces)
    expected = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, control=True) == expected
    assert max(ours.encode(text), default=0) < 304


def test_control_token_inside_the_vocabulary(path):
    # "hello" is an ordinary entry that merges build; declared a control token, it may not appear.
    hello = json.loads(path.read_bytes())["model"]["vocab"]["hello"]
    data = changed(path, added_tokens=[added(hello, "hello", special=True)])
    tokenizer = Tokenizer.from_bytes(data, NO_BOS)
    assert tokenizer.encode("hello", control=True) == [hello]
    plain = tokenizer.encode("say hello")
    assert hello not in plain
    assert tokenizer.decode(plain) == "say hello"


NORMALIZERS = [
    None,
    {"type": "NFC"},
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@quick
@given(text=texts, times=st.integers(1, 30))
def test_a_text_has_at_least_the_least_tokens(path, normalizer, text, times):
    tokenizer = Tokenizer.from_bytes(changed(path, normalizer=normalizer), TOKENS)
    # The second is what NFC shortens most.
    for repeated in (text * times, "\u1fbe\u0308\u0301" * times):
        assert tokenizer.least_tokens(repeated) <= len(tokenizer.encode(repeated))


def test_the_least_tokens_of_a_text_that_nfc_makes_shorter(path):
    """Seven bytes become a token of two; a bound that forgets NFC would refuse what fits."""
    file = json.loads(path.read_bytes())
    vocab = {token: id_ for token, id_ in file["model"]["vocab"].items() if len(token) == 1}
    word = tokenizers.pre_tokenizers.ByteLevel(False).pre_tokenize_str("\u0390")[0][0]
    model = file["model"] | {"vocab": vocab | {word: 400}, "merges": [[*word]]}
    data = changed(path, model=model, normalizer={"type": "NFC"}, added_tokens=[])
    tokenizer = Tokenizer.from_bytes(data, NO_BOS)
    text = "\u1fbe\u0308\u0301" * 8
    assert tokenizer.encode(text) == [400] * 8
    assert 0 < tokenizer.least_tokens(text) <= 8


def test_the_least_tokens_know_which_bytes_long_tokens_have(path):
    """A vocabulary with long runs of one character says little about texts of others."""
    file = json.loads(path.read_bytes())
    model = file["model"] | {"vocab": file["model"]["vocab"] | {"=" * 128: 400}}
    data = changed(path, model=model, normalizer={"type": "NFC"}, added_tokens=[])
    tokenizer = Tokenizer.from_bytes(data, NO_BOS)
    assert tokenizer.longest_token == 128
    assert tokenizer.least_tokens("=" * 12_800) == 100
    assert tokenizer.least_tokens("hello" * 1000) >= 800
    assert tokenizer.least_tokens("hello" * 1000 + "é") >= 800


def test_the_least_tokens_are_near_where_tokens_are_longest(path):
    longest = max(json.loads(path.read_bytes())["model"]["vocab"], key=len)
    text = longest.replace("Ġ", " ") * 50
    tokenizer = Tokenizer.from_bytes(changed(path, normalizer=None), TOKENS)
    assert tokenizer.least_tokens(text) == 50
    assert tokenizer.least_tokens("\ud800" * 3) <= 9  # refused when it is encoded
    for unbounded in (
        {"normalizer": {"type": "Replace", "pattern": {"String": "xx"}, "content": "x"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"String": " "},
                        "behavior": "Removed",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                ],
            }
        },
    ):
        assert Tokenizer.from_bytes(changed(path, **unbounded), TOKENS).least_tokens(text) == 0


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("control", [False, True])
def test_a_long_text_gets_the_same_ids_and_lets_others_run(
    tokenizer, reference, without_control, control
):
    text = "".join([*CONTROL, " hello world äöü 你好 1234\n"]) * 8_000
    library = reference if control else without_control
    ticks: list[float] = []
    ended = threading.Event()

    def tick() -> None:
        while not ended.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = time.perf_counter()
    ids = tokenizer.encode(text, control=control)
    took_s = time.perf_counter() - began
    ended.set()
    ticker.join()
    assert ids == library.encode_batch([text], add_special_tokens=False)[0].ids
    gaps = [b - a for a, b in itertools.pairwise(t for t in ticks if began < t < began + took_s)]
    assert len(gaps) > 5
    assert max(gaps) < took_s / 2


def byte_level(use_regex: bool) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
            "use_regex": use_regex}  # fmt: skip


def words(pattern: str) -> dict[str, object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}


DIGITS = {"type": "Digits", "individual_digits": True}
PRES = [
    *map(words, sorted(module._WORDS)),
    byte_level(True),
    {"type": "Sequence", "pretokenizers": [DIGITS, byte_level(True)]},
]


@pytest.mark.parametrize("pre", PRES)
@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
@settings(deadline=None, max_examples=80)
@given(
    parts=st.lists(
        st.one_of(
            fragments,
            st.sampled_from(
                [" hello", " what", "!", "'s", " 's", " s", "12345", " 1", "你好，", "！"]
            ),
            st.sampled_from(["\n the", "e\u0301", " \u0301a", "\x1c a", "\u200b a", "e \u0301"]),
        ),
        min_size=6,
        max_size=30,
    ),
    control=st.booleans(),
)
def test_cuts_do_not_show(path, pre, normalizer, parts, control):
    tokenizer = Tokenizer.from_bytes(
        changed(path, pre_tokenizer=pre, normalizer=normalizer), TOKENS
    )
    text = "".join(parts)
    assert tokenizer._cuts
    whole = tokenizer.encode(text, control=control)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARS", 4)
        assert "".join(tokenizer._pieces(text)) == text
        assert tokenizer.encode(text, control=control) == whole


def test_a_long_text_is_encoded_in_pieces_and_may_be_given_up(tokenizer):
    text = "hello world " * 40_000
    seen = 0

    def on_piece() -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        tokenizer.encode(text, on_piece=on_piece)
    sizes = [len(piece) for piece in tokenizer._pieces(text)]
    assert len(sizes) > 10
    assert max(sizes) < module._PIECE_CHARS + 20


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": words(r"\w+|\W+")},
        {"pre_tokenizer": None},
        {"pre_tokenizer": byte_level(False)},
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": [added(304, "a b")]},
        {"added_tokens": [added(304, "LL", lstrip=True)]},
    ],
)
def test_unknown_pretokenizers_are_not_cut(path, changes):
    tokenizer = Tokenizer.from_bytes(changed(path, **changes), NO_BOS)
    assert len(list(tokenizer._pieces("hello world " * 40_000))) == 1


def test_nobody_waits_for_a_whole_text_of_the_other_setting(tokenizer):
    """Typed control tokens need the other setting; the line is first come, first served."""
    long = ("hello " + CONTROL[1] + " world ") * 20_000
    ended: list[str] = []
    began = threading.Event()

    def encode_long() -> None:
        tokenizer.encode(long, on_piece=began.set)
        ended.append("long")

    thread = threading.Thread(target=encode_long)
    thread.start()
    began.wait(10)
    for _ in range(3):
        tokenizer.encode("hello", control=True)
    ended.append("short")
    thread.join()
    assert ended == ["short", "long"]


def test_lone_surrogates(tokenizer):
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud83d")


class SlowSwitch:
    """The library, with time for another thread to come in between setting and use."""

    def __init__(self, library: Any) -> None:
        object.__setattr__(self, "library", library)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.library, name, value)
        time.sleep(1e-4)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)


def test_threads_do_not_mix_plain_text_and_templates(path, monkeypatch):
    text = "".join(CONTROL)
    tokenizer = read_tokenizer(path, TOKENS)
    expected = {control: tokenizer.encode(text, control=control) for control in (False, True)}
    slow = SlowSwitch(tokenizer._library)
    monkeypatch.setattr(tokenizer, "_library", slow)
    monkeypatch.setattr(tokenizer, "_switch", module._ControlSwitch(slow))

    def count_wrong(control: bool) -> int:
        results = [tokenizer.encode(text, control=control) for _ in range(25)]
        return sum(result != expected[control] for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(count_wrong, [False, True] * 2)) == [0] * 4


def test_an_interrupt_while_waiting_lets_the_next_one_in():
    switch = module._ControlSwitch(SimpleNamespace())
    with switch.held(plain=True):
        with (
            patch.object(switch._changed, "wait", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
            switch.held(plain=False),
        ):
            pytest.fail("held while another setting was")
        with switch.held(plain=True):  # would wait for the place of the one that is gone
            pass


@given(texts)
@quick
def test_split_control_loses_nothing(tokenizer, text):
    pieces = tokenizer.split_control(text)
    assert "".join(piece for piece, _ in pieces) == text
    assert [CONTROL_IDS[piece] for piece, is_control in pieces if is_control] == [
        id_ for id_ in tokenizer.encode(text, control=True) if id_ in CONTROL_IDS.values()
    ]


# --- decode ---------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, BOS_ID + 3), max_size=30))
def test_decode_is_the_library(tokenizer, reference, ids):
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@quick
@given(st.lists(st.integers(0, 600), max_size=30), st.sets(st.integers(0, 320), max_size=20))
def test_detokenizer_joined_is_decode(tokenizer, ids, skip):
    detokenizer = Detokenizer(tokenizer, skip)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert streamed == tokenizer.decode(id_ for id_ in ids if id_ not in skip)


def test_detokenizer_waits_for_whole_characters(tokenizer):
    detokenizer = Detokenizer(tokenizer, skip=(EOS_ID,))
    pushed = [detokenizer.push(id_) for id_ in [*tokenizer.encode("a👍"), EOS_ID]]
    assert pushed == ["a", "", "", "", "👍", ""]
    ids = tokenizer.encode("👍")[:2]
    assert [detokenizer.push(id_) for id_ in ids] == ["", ""]
    assert detokenizer.flush() == "�"


def test_ids_outside_the_tokenizer(tokenizer):
    assert tokenizer.vocab_size == 1 + max(CONTROL_IDS.values())
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""  # a padded row of the model
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("a")]) == "a"
    for bad in (-1, 2**31):
        with pytest.raises(RequestError, match=f"token id {bad}"):
            tokenizer.decode([bad])


# --- sentencepiece-like vocabularies ----------------------------------------------------------


def sentencepiece(*, strip: bool = True, byte_tokens: bool = True, **model: object) -> bytes:
    words = ["▁", "a", "b", "▁a", "é", "é▁"]
    vocab = {"<unk>": 0, "<s>": 1}
    for name in [*(f"<0x{byte:02X}>" for byte in range(256) if byte_tokens), *words]:
        vocab[name] = len(vocab)
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    merges = [["▁", "a"], ["é", "▁"]]
    return json.dumps(
        {
            "added_tokens": [added(0, "<unk>", special=True), added(1, "<s>", special=True)],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"}
            | {"fuse_unk": True, "byte_fallback": byte_tokens}
            | model,
        }
    ).encode()


@quick
@given(st.lists(st.sampled_from([" ", "a", "b", "é", "<s>", "<", "s>", "你", "👍"])), st.booleans())
def test_sentencepiece_is_the_library(pieces, strip):
    data = sentencepiece(strip=strip)
    ours = Tokenizer.from_bytes(data, NO_BOS)
    library = tokenizers.Tokenizer.from_str(data.decode())
    text = "".join(pieces)
    ids = ours.encode(text, control=True)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
    detokenizer = Detokenizer(ours)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == ours.decode(ids)
    assert not {0, 1} & set(ours.encode(text))


def test_a_first_token_without_text_does_not_keep_the_first_space():
    tokenizer = Tokenizer.from_bytes(sentencepiece(), NO_BOS)
    ids = [9999, *tokenizer.encode("a b")]  # the first is of a padded vocabulary
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ids)) == tokenizer.decode(ids) == "a b"


@quick
@given(st.text("ab é ", max_size=8), st.text("ab é ", max_size=8))
def test_continued_text_keeps_its_first_space_both_ways(first, second):
    tokenizer = Tokenizer.from_bytes(sentencepiece(), NO_BOS)
    ids = tokenizer.encode(second, goes_on=True)
    assert tokenizer.decode(tokenizer.encode(first + "b") + ids) == first + "b" + second
    detokenizer = Detokenizer(tokenizer, goes_on=True)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == second


def test_text_that_only_the_unknown_token_could_stand_for():
    tokenizer = Tokenizer.from_bytes(sentencepiece(byte_tokens=False), NO_BOS)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(RequestError, match="no plain tokens"):
        tokenizer.encode("a x")


# --- files that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "BPE", "vocab": []}}, "refused by tokenizers"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "'WordPiece'"),
        ({"model": None}, "not a tokenizer.json"),
        ({"decoder": None}, "has the decoder None"),
        ({"decoder": {"type": "WordPiece"}}, "'WordPiece'"),
        ({"decoder": {"type": "Sequence", "decoders": "ByteLevel"}}, "has the decoder"),
        ({"decoder": {"type": "Sequence"}}, "has the decoder"),
        ({"added_tokens": [added(7, "x\ty")]}, "has the id 7"),
        ({"added_tokens": [added(304, "")]}, "has no text"),
        ({"added_tokens": [{"id": "7", "content": "x"}]}, "not a tokenizer.json"),
    ],
)
def test_unusable_files_say_why(path, changes, message):
    with pytest.raises(BundleError, match=message):
        Tokenizer.from_bytes(changed(path, **changes), NO_BOS)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b'{"model": {"type": "\xff"}}'])
def test_broken_json_is_a_bundle_error(data):
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_bytes(data, NO_BOS)


def test_missing_file_and_contradicting_manifest(path):
    with pytest.raises(BundleError, match="cannot read"):
        read_tokenizer(path.with_name("missing.json"), TOKENS)
    # The trap of the R1 distills: bos_token_id in config.json is the id of eos.
    wrong = Tokens(bos=EOS_ID, bos_text=BOS, eos=(EOS_ID,), eos_text=EOS, add_bos=True)
    with pytest.raises(BundleError, match=f"with id {EOS_ID}.* has the id {BOS_ID}"):
        read_tokenizer(path, wrong)


def test_import_is_cheap():
    code = (
        "import sys, edge.text.tokenizer, edge.text.chat_template; "
        "print({'tokenizers', 'minijinja'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
