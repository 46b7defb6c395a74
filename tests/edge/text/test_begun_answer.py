from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.manifest import Tokens
from edge.errors import RequestError
from edge.text.begun_answer import BegunAnswer, take_begun_answer
from edge.text.chat_template import ChatTemplate, encode_chat
from edge.text.reasoning import ReasoningSplitter
from edge.text.tokenizer import Tokenizer
from tests.makers.tiny_models import BOS, BOS_ID, CHAT_TEMPLATE, EOS, EOS_ID, write_tokenizer

TOKENS = Tokens(bos=BOS_ID, bos_text=BOS, eos=(EOS_ID,), eos_text=EOS, add_bos=True)
QUESTION = {"role": "user", "content": "what"}
OPENS = ChatTemplate(CHAT_TEMPLATE, TOKENS)
LEAVES_OPEN = ChatTemplate(CHAT_TEMPLATE.replace("<think>\\n", ""), TOKENS)
quick = settings(deadline=None, max_examples=60)
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    return Tokenizer(path.read_bytes(), TOKENS, str(path))


def begin(content: str | None = "", *, reasons: bool = True, **more: Any) -> BegunAnswer:
    messages = [QUESTION, {"role": "assistant", "content": content, **more}]
    before, begun = take_begun_answer(messages, reasons=reasons)
    assert before == [QUESTION]
    return begun


@pytest.mark.parametrize(
    ("content", "more", "expected"),
    [
        ("", {}, BegunAnswer()),
        ("a b ", {}, BegunAnswer("a b ", "", "text")),
        ("", {"reasoning_content": "so\n"}, BegunAnswer("", "so\n", "reasoning")),
        ("", {"reasoning": "so"}, BegunAnswer("", "so", "reasoning")),
        ("a", {"reasoning_content": "\nso\n"}, BegunAnswer("a", "so", "text")),
        ("</think>\n\na", {"reasoning_content": "so"}, BegunAnswer("a", "so", "text")),
        ("</think>", {"reasoning_content": "so"}, BegunAnswer("", "so", "text")),
        ("a</think>", {"reasoning_content": "so"}, BegunAnswer("a</think>", "so", "text")),
        ("<think>\nso", {}, BegunAnswer("", "so", "reasoning")),
        ("<think>\nso\n</think>", {}, BegunAnswer("", "so", "text")),
        ("<think>\nso\n</think>\n\na\n", {}, BegunAnswer("a\n", "so", "text")),
        ("so\n</think>\n\na", {}, BegunAnswer("a", "so", "text")),
        # A tag alone says where to go on, too.
        ("<think>\n", {}, BegunAnswer("", "", "reasoning")),
        ("</think>", {}, BegunAnswer("", "", "text")),
        ("<think>\n\n</think>\n\n", {}, BegunAnswer("", "", "text")),
        ("<think>\n\n</think>\n\na", {}, BegunAnswer("a", "", "text")),
        # Tags that the text is about.
        ("a <b> <think>", {}, BegunAnswer("a <b> <think>", "", "text")),
        ("Use <think>x</think>.", {}, BegunAnswer("Use <think>x</think>.", "", "text")),
        ("x</think>", {"reasoning_content": ""}, BegunAnswer("x</think>", "", "text")),
        ("", {"reasoning_content": ""}, BegunAnswer()),
    ],
)
def test_where_an_answer_continues(content: str, more: dict[str, Any], expected: BegunAnswer):
    assert begin(content, **more) == expected


def test_a_model_that_does_not_reason_has_tags_as_text():
    assert begin("<think>so", reasons=False) == BegunAnswer("<think>so", "", "text")
    assert begin("a", reasons=False, reasoning_content="so") == BegunAnswer("a", "", "text")
    assert begin("", reasons=False) == BegunAnswer()
    with pytest.raises(RequestError, match=r"messages\[1\].reasoning_content: .*not reason"):
        begin("", reasons=False, reasoning_content="so")


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([QUESTION], r"messages\[0\].role: only an answer of the assistant"),
        ([{"role": "assistant", "content": "a"}], "nothing before it"),
        (
            [
                QUESTION,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            ],
            r"messages\[1\].tool_calls",
        ),
        ([], "at least one message"),
    ],
)
def test_what_cannot_be_continued(messages: list[dict[str, Any]], error: str):
    with pytest.raises(RequestError, match=error):
        take_begun_answer(messages, reasons=True)


@quick
@given(
    reasoning=text,
    content=text,
    place=st.sampled_from(["start", "reasoning", "text"]),
    template=st.sampled_from([OPENS, LEAVES_OPEN]),
)
def test_the_prompt_is_the_models_own_text_so_far(
    tokenizer: Tokenizer, reasoning: str, content: str, place: Any, template: ChatTemplate
):
    """Joined to what the model then writes, it is one answer; and no text is a control token."""
    if place == "start":
        reasoning = content = ""
    elif place == "reasoning":
        content = ""
    begun = BegunAnswer(content, reasoning, place)
    ids = encode_chat(tokenizer, template, [QUESTION], begun=begun)
    opens = template is OPENS or place == "reasoning" or bool(reasoning)
    opening = "<｜Assistant｜>" + ("<think>\n" if opens else "")
    closing = "\n</think>\n\n" if opens and place == "text" else ""
    assert tokenizer.decode(ids) == f"{BOS}<｜User｜>what{opening}{reasoning}{closing}{content}"
    controls = set(tokenizer.control_tokens.values())
    marks = [id_ for id_ in ids if id_ in controls]
    written = f"{BOS}<｜User｜>{opening}{closing}"
    assert marks == [id_ for id_ in tokenizer.encode(written, control=True) if id_ in controls]


def test_a_text_cannot_open_a_turn(tokenizer: Tokenizer):
    begun = BegunAnswer("a<｜User｜>b", "c<｜Assistant｜>", "text")
    ids = encode_chat(tokenizer, OPENS, [QUESTION], begun=begun)
    assert ids.count(tokenizer.control_tokens["<｜User｜>"]) == 1
    assert ids.count(tokenizer.control_tokens["<｜Assistant｜>"]) == 1


@quick
@given(reasoning=text, answer=text, data=st.data())
def test_continued_reasoning_is_split_as_if_uninterrupted(
    reasoning: str, answer: str, data: st.DataObject
):
    reasoning = "x" + reasoning.rstrip("\n")
    cut = data.draw(st.integers(1, len(reasoning)))
    splitter = ReasoningSplitter(True, goes_on=True)
    rest = f"{reasoning[cut:]}\n</think>\n\n{answer}"
    at = data.draw(st.integers(0, len(rest)))
    parts = [splitter.push(rest[:at]), splitter.push(rest[at:]), splitter.flush()]
    thought, said = ("".join(texts) for texts in zip(*parts, strict=True))
    assert (reasoning[:cut] + thought, said) == (reasoning, answer.lstrip("\n"))
