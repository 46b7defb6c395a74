"""Structured output with a real model and the clients' own models of data: answers end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from edge import LLM, OutputFormat, SamplingParams
from tests.edge_serve.scripted import Live, running

pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")
ollama = pytest.importorskip("ollama")
anthropic = pytest.importorskip("anthropic")
pytest.importorskip("pydantic")
from pydantic import BaseModel, Field  # noqa: E402

TOKENS = 250
pytestmark = [pytest.mark.slow, pytest.mark.once]


class Real:
    """Opens a model as it is, where tests mostly script one."""

    def __init__(self) -> None:
        self.running = threading.Event()

    def open(self, bundle: Path, **options: Any) -> LLM:
        self.llm = LLM(bundle, **options)
        return self.llm


@pytest.fixture(scope="module")
def real(smollm2_bundle: Path) -> Iterator[Live]:
    engine: Any = Real()
    with running(smollm2_bundle, engine, llm={"num_slots": 1}) as live:
        yield live


class Country(BaseModel):  # of Ollama's documentation
    name: str
    capital: str
    languages: list[str]


class CalendarEvent(BaseModel):  # of OpenAI's
    name: str
    date: str
    participants: list[str]


class ContactInfo(BaseModel):  # of Anthropic's
    name: str
    email: str
    plan_interest: str
    demo_requested: bool


class Kind(str, Enum):
    bird = "bird"
    fish = "fish"


class Cat(BaseModel):
    type: Literal["cat"] = "cat"
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    type: Literal["dog"] = "dog"
    tricks: list[Literal["sit", "roll"]] = Field(max_length=3)


class Tree(BaseModel):
    value: int = Field(ge=0, le=99)
    left: Optional[Tree] = None  # noqa: UP045 - as it is written in many programs


class Zoo(BaseModel):
    kind: Kind
    size: Optional[int] = None  # noqa: UP045
    first: Union[Cat, Dog] = Field(discriminator="type")  # noqa: UP007
    second: Union[Cat, Dog]  # noqa: UP007
    tree: Tree = Field(description="It may be small.")


AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
BOB: Any = [{"role": "user", "content": "Bob is 42."}]
ZOO = [{"role": "user", "content": "Describe a zoo."}]
FAIR: Any = [{"role": "user", "content": "Alice and Bob go to a science fair on Friday."}]
CONTACT: Any = [
    {
        "role": "user",
        "content": "John Smith (john@example.com) wants a demo of the Enterprise plan.",
    }
]


@pytest.mark.live
def test_ollama(real: Live):
    options = {"temperature": 0, "num_predict": TOKENS, "repeat_penalty": 1.1}
    asked: list[tuple[Any, str]] = [(AGE, "Bob is 42."), (Country.model_json_schema(), "Canada")]
    client = ollama.Client(real.url)
    with client._client:  # older versions of the library cannot be closed otherwise
        age, country = (
            client.chat("tiny", [{"role": "user", "content": text}], format=form, options=options)
            for form, text in asked
        )
    assert age.done_reason == country.done_reason == "stop"
    assert json.loads(age.message.content).keys() == {"age"}
    Country.model_validate_json(country.message.content)


def test_openai(real: Live):
    limits: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS}
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        for strict in (True, False):
            named = {"name": "a", "schema": AGE, "strict": strict}
            form: Any = {"type": "json_schema", "json_schema": named}
            answer = client.chat.completions.create(
                model="tiny", messages=BOB, response_format=form, **limits
            ).choices[0]
            assert answer.finish_reason == "stop"
            assert json.loads(answer.message.content) == {"age": 42}
        chat = client.chat.completions.parse(
            model="tiny", messages=FAIR, response_format=CalendarEvent, **limits
        ).choices[0]
        assert chat.finish_reason == "stop"
        assert isinstance(chat.message.parsed, CalendarEvent)
        response = client.responses.parse(
            model="tiny", input=FAIR, text_format=CalendarEvent, temperature=0,
            max_output_tokens=TOKENS,
        )  # fmt: skip
        assert response.status == "completed"
        assert isinstance(response.output_parsed, CalendarEvent)


def test_anthropic(real: Live):
    """The tool's schema is as the documentation has it: without additionalProperties."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": TOKENS, "messages": CONTACT}
    asked["extra_body"] = {"temperature": 0}
    tool: Any = {"name": "contact", "input_schema": ContactInfo.model_json_schema()}
    with anthropic.Anthropic(base_url=real.url, api_key="none", max_retries=0) as client:
        called = client.messages.create(**asked, tools=[tool], tool_choice={"type": "any"})
        assert (called.stop_reason, called.content[0].type) == ("tool_use", "tool_use")
        ContactInfo.model_validate(called.content[0].input)
        form = {"type": "json_schema", "schema": ContactInfo.model_json_schema()}
        asked["extra_body"]["output_config"] = {"format": form}
        answer = client.messages.create(**asked)
    assert answer.stop_reason == "end_turn"
    ContactInfo.model_validate_json(answer.content[0].text)


def test_python(real: Live):
    llm = real.engine.llm
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    answer = llm.generate(ZOO, params, output=OutputFormat("json_schema", Zoo))
    assert answer.finish_reason == "stop"
    Zoo.model_validate_json(answer.text)
