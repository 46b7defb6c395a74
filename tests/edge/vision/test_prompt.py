"""Messages with pictures: placeholders where pictures are, and nowhere else."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge import LLM
from edge.bundle.embeddings import PICTURE_IDS
from edge.errors import BundleError, ConfigError, ContextLengthError, RequestError
from edge.vision import prompt as vision_prompt
from edge.vision.layout import plan_layout
from edge.vision.prompt import PictureReader, PicturesLengthError
from edge.vision.section import read_vision
from tests.conftest import Bundles
from tests.makers import tiny_vision as tiny
from tests.makers.manifests import replace_file

Message = dict[str, Any]


def draw(seed: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)


def ask(*parts: Any) -> list[Message]:
    """A question of texts and pictures."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def llm(vision_bundle: Path) -> Iterator[LLM]:
    with LLM(vision_bundle, backend="ort-cpu", num_threads=1, image_tiles=16) as llm:
        yield llm


def expected(llm: LLM, text: str) -> list[int]:
    """Ids of a prompt that nobody but this test has written."""
    return llm.tokenizer.encode(text, control=True)


def placeholders(llm: LLM, width: int, height: int, tiles: int = 16) -> str:
    section = read_vision(llm.manifest)
    assert section is not None
    return plan_layout(width, height, section, tiles).placeholder_text(section)


def as_tokens(ids: list[int]) -> list[int]:
    """Ids with the image token in place of rows."""
    return [tiny.CONTROL_IDS[tiny.IMAGE] if id_ >= PICTURE_IDS else id_ for id_ in ids]


def test_a_picture_is_the_text_of_the_family_s_processor(llm: LLM) -> None:
    found = llm.encode(ask(draw(1), "What is it?"))
    text = placeholders(llm, 64, 48)
    assert text.count("<image>") == 17 * tiny.ROWS_PER_TILE - 16  # 4 x 3 tiles and the whole
    whole = f"<|im_start|>User:{text}What is it?<end_of_utterance>\nAssistant:"
    assert as_tokens(found) == expected(llm, whole)
    rows = [id_ for id_ in found if id_ >= PICTURE_IDS]
    assert rows == list(range(rows[0], rows[0] + 13 * tiny.ROWS_PER_TILE))


def test_pictures_and_texts_keep_their_order(llm: LLM) -> None:
    a, b = draw(1, 40, 40), draw(2, 100, 20)
    messages = [
        *ask("First", a, "then", b, "and", "again", a),
        {"role": "assistant", "content": "Yes"},
        *ask(b),
    ]
    found = llm.encode(messages)
    one, two = placeholders(llm, 40, 40), placeholders(llm, 100, 20)
    assert as_tokens(found) == expected(
        llm,
        f"<|im_start|>User: First{one}then{two}and\nagain{one}<end_of_utterance>\n"
        f"Assistant: Yes<end_of_utterance>\nUser:{two}<end_of_utterance>\nAssistant:",
    )
    rows = [id_ for id_ in found if id_ >= PICTURE_IDS]
    of_a, of_b = one.count("<image>"), two.count("<image>")
    assert len(rows) == 2 * (of_a + of_b)
    assert rows[: of_a + of_b] == rows[of_a + of_b :], "the same picture has the same rows"
    assert len(set(rows)) == of_a + of_b


def test_a_text_alone_reaches_a_template_that_reads_parts(llm: LLM) -> None:
    wanted = expected(llm, "<|im_start|>User: Hello<end_of_utterance>\nAssistant:")
    assert llm.encode([{"role": "user", "content": "Hello"}]) == wanted
    assert llm.encode(ask("Hello")) == wanted


@pytest.mark.parametrize("token", [tiny.IMAGE, tiny.AROUND, tiny.WHOLE, "<row_1_col_1>", tiny.EOS])
@pytest.mark.parametrize("pictures", [0, 1])
def test_a_placeholder_in_a_text_is_text(llm: LLM, token: str, pictures: int) -> None:
    given = [draw(1, 32, 32)] * pictures
    found = llm.encode(ask(*given, f"What is {token} here?"))
    clean = llm.encode(ask(*given, "What is here?"))
    control = set(tiny.CONTROL_IDS.values())
    assert [id_ for id_ in found if id_ in control or id_ >= PICTURE_IDS] == [
        id_ for id_ in clean if id_ in control or id_ >= PICTURE_IDS
    ]
    assert token in llm.tokenizer.decode(id_ for id_ in found if id_ < PICTURE_IDS)
    for role in ("system", "assistant"):
        said = [{"role": role, "content": token}, *ask(*given, "x")]
        ids = llm.encode(said)
        assert sum(id_ >= PICTURE_IDS for id_ in ids) == sum(id_ >= PICTURE_IDS for id_ in clean)
        assert tiny.CONTROL_IDS[tiny.IMAGE] not in ids


def test_a_mark_in_a_text_is_text(llm: LLM) -> None:
    marks = "".join(map(chr, range(0xF0000, 0xF0004)))
    found = llm.encode(ask(marks, draw(1, 32, 32), "x"))
    assert sum(id_ >= PICTURE_IDS for id_ in found) == placeholders(llm, 32, 32).count("<image>")
    assert marks in llm.tokenizer.decode(id_ for id_ in found if id_ < PICTURE_IDS)


@pytest.fixture(scope="module")
def string_llm(vision_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The bundle with a template that takes contents as texts."""
    bundle = tmp_path_factory.mktemp("strings") / "bundle"
    shutil.copytree(vision_bundle, bundle)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "<end_of_utterance>\n{% endfor %}<|im_start|>assistant"
    )
    replace_file(bundle, "chat_template.jinja", template.encode())
    with LLM(bundle, backend="ort-cpu", num_threads=1, image_tiles=0) as llm:
        yield llm


def test_a_template_that_reads_texts_gets_its_pictures_too(string_llm: LLM) -> None:
    found = string_llm.encode(ask("See", draw(1), "<image>?"))
    text = placeholders(string_llm, 64, 48, 0)
    head, tail = f"<|im_start|>user\nSee{text}", "?<end_of_utterance>\n<|im_start|>assistant"
    wanted = [
        *expected(string_llm, head),
        *string_llm.tokenizer.encode("<image>?"),
        *expected(string_llm, tail.removeprefix("?")),
    ]
    assert as_tokens(found) == wanted


def test_a_begun_answer_about_a_picture_continues(llm: LLM) -> None:
    said = [*ask(draw(1, 32, 32), "x"), {"role": "assistant", "content": "A cat"}]
    found = llm.encode(said, continue_final_message=True)
    text = placeholders(llm, 32, 32)
    whole = f"<|im_start|>User:{text}x<end_of_utterance>\nAssistant:A cat"
    assert as_tokens(found) == expected(llm, whole)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "system", "content": [{"type": "image", "image": b"x"}]}], "of the user"),
        ([{"role": "tool", "content": [{"type": "image", "image": b"x"}]}], "of the user"),
        ([{"role": "user", "content": [{"type": "image"}]}], r'content\[0\]: must be {"type": "im'),
        (
            [{"role": "user", "content": [{"type": "image", "image": b"x", "detail": "low"}]}],
            r"content\[0\]: must be",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": draw(1)}, {"type": "text"}]}],
            r"content\[1\]: must be .* or a picture",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": draw(1)}, "x"]}],
            r"content\[1\]: must be .* or a picture",
        ),
        (ask(b"GIF"), "no known format"),
        (ask(7), "int"),
        (ask(Path("missing.png")), "missing.png"),
    ],
)
def test_a_wrong_part_is_refused(llm: LLM, messages: list[Message], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        llm.encode(messages)


def test_rows_count_before_a_picture_is_decoded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(vision_prompt, "decode_picture", decode)
    with pytest.raises(ContextLengthError) as caught:
        llm.generate(ask(*(draw(seed, 64, 64) for seed in range(20, 30)), "x"))
    assert isinstance(caught.value, PicturesLengthError)
    assert caught.value.num_rows == 10 * 17 * tiny.ROWS_PER_TILE
    assert caught.value.capacity == llm.kv_capacity
    assert "680 of them are rows of pictures: lower --image-tiles, which is 16" in str(caught.value)
    for rebuilt in (copy.copy(caught.value), pickle.loads(pickle.dumps(caught.value))):
        assert str(rebuilt) == str(caught.value)


def test_a_long_text_beside_a_picture_says_what_the_picture_takes(llm: LLM) -> None:
    with pytest.raises(PicturesLengthError, match="68 of them are rows of pictures"):
        llm.generate(ask(draw(31, 64, 64), "x y " * 400))
    with pytest.raises(ContextLengthError) as caught:
        llm.generate(ask("x y " * 400))
    assert not isinstance(caught.value, PicturesLengthError)


def test_few_tiles_unless_more_are_asked_for(vision_bundle: Path) -> None:
    for tiles, rows in ((None, 1), (0, 1), (4, 5), (99, 17)):
        with LLM(vision_bundle, backend="ort-cpu", num_threads=1, image_tiles=tiles) as llm:
            ids = llm.encode(ask(draw(1, 64, 64), "x"))
            assert sum(i >= PICTURE_IDS for i in ids) == rows * tiny.ROWS_PER_TILE, tiles


def test_a_bundle_of_text_says_so(tiny_bundles: Bundles) -> None:
    with LLM(tiny_bundles("qwen2"), backend="ort-cpu", num_threads=1) as llm:
        assert not llm.reads_images
        for picture in (b"\x89PNG", draw(1), Path("a.png"), object()):
            with pytest.raises(RequestError, match="this bundle reads text only"):
                llm.generate(ask("see", picture))
    with pytest.raises(ConfigError, match="leave image_tiles out"):
        LLM(tiny_bundles("qwen2"), backend="ort-cpu", image_tiles=1)


def test_a_template_that_loses_pictures_is_a_bundle_s_fault(
    vision_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(vision_bundle, bundle)
    template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    replace_file(bundle, "chat_template.jinja", template.encode())
    with (
        LLM(bundle, backend="ort-cpu", num_threads=1) as llm,
        pytest.raises(BundleError, match="0 times for 1 pictures"),
    ):
        llm.encode(ask(draw(1), "x"))


def test_prompts_know_their_pictures(llm: LLM) -> None:
    ids: Any = llm.encode(ask(draw(1), "x", draw(2)))
    assert [picture.ids[0] in ids for picture in ids.pictures] == [True, True]
    assert PictureReader.__doc__
