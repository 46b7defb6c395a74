from __future__ import annotations

import copy
import datetime
import hashlib
import itertools
import json
import re
import resource
import threading
import time
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.bundle.manifest import Tokens
from edge.errors import BundleError, RequestError
from edge.limited_child import LimitedChild, Limits
from edge.text import known_templates, template_child
from edge.text.chat_template import ChatTemplate, encode_chat
from edge.text.messages import normalize_messages
from edge.text.reasoning import prompt_opens_reasoning, template_reasons
from edge.text.template_engine import TemplateEngine
from edge.text.tokenizer import Tokenizer
from tests.makers.tiny_models import (
    BOS,
    BOS_ID,
    CHAT_TEMPLATE,
    CONTROL,
    CONTROL_IDS,
    EOS,
    EOS_ID,
    write_tokenizer,
)

TOKENS = Tokens(bos=BOS_ID, bos_text=BOS, eos=(EOS_ID,), eos_text=EOS, add_bos=True)
USER, ASSISTANT = CONTROL_IDS["<｜User｜>"], CONTROL_IDS["<｜Assistant｜>"]
THINK = CONTROL_IDS["<think>"]
quick = settings(deadline=None, max_examples=100)

# As SmolLM2's: no bos, the role is printed, a default system message.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Qwen3: tools as JSON, reasoning kept after the last question, an option.
REASONING = """
{%- if tools %}
    {{- bos_token }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
            {%- set reasoning = reasoning.lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<｜Assistant｜>' }}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '[' + call.function.name + call.function.arguments|tojson + ']' }}
        {%- endfor %}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- elif message.role == "tool" %}
        {{- '[' + message.name + ': ' + message.content + ']' }}
    {%- else %}
        {{- '<｜User｜>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return bytes((directory / "tokenizer.json").read_bytes())


@pytest.fixture(scope="module")
def tokenizer(data) -> Tokenizer:
    return Tokenizer.from_bytes(data, TOKENS)


@pytest.fixture(scope="module")
def r1() -> ChatTemplate:
    return ChatTemplate(CHAT_TEMPLATE, TOKENS)


@pytest.fixture(scope="module")
def reasoning() -> ChatTemplate:
    return ChatTemplate(REASONING, TOKENS)


def turn(role: str, content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


HISTORY = [
    turn("system", "Be brief."),
    turn("user", "2+2?"),
    turn("assistant", "<think>\nadd\n</think>\n\n4"),
    turn("user", "And 3+3?"),
]

# --- rendering ------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "description": "<it's> é & co"}}
ARGUMENTS = {"b": [1, None], "a": 0.5}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
# (template, messages, options, text that jinja2 renders under the settings of transformers)
GOLDEN = [
    (
        CHAT_TEMPLATE,
        HISTORY,
        {},
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+2?<｜Assistant｜>\n\n4<｜end▁of▁sentence｜>"
        "<｜User｜>And 3+3?<｜Assistant｜><think>\n",
    ),
    (
        CHAT_TEMPLATE,
        HISTORY[1:2],
        {"add_generation_prompt": False},
        "<｜begin▁of▁sentence｜><｜User｜>2+2?",
    ),
    (
        CHATML,
        HISTORY[1:],
        {},
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nadd\n</think>\n\n4<|im_end|>\n"
        "<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        REASONING,
        HISTORY,
        {"enable_thinking": False},
        "<｜User｜>Be brief.<｜User｜>2+2?<｜Assistant｜>4<｜end▁of▁sentence｜>"
        "<｜User｜>And 3+3?<｜Assistant｜><think>\n\n</think>\n\n",
    ),
    (
        REASONING,
        [
            turn("user", "q"),
            turn("assistant", None, reasoning_content="so\n", tool_calls=[CALL]),
            turn("tool", "42", name="f"),
            turn("assistant", "<think>\nhm\n</think>\n\n42"),
        ],
        {"tools": [TOOL], "add_generation_prompt": False},
        '<｜begin▁of▁sentence｜>\n{"type": "function", "function": {"name": "f", '
        '"description": "<it\'s> é & co"}}<｜User｜>q<｜Assistant｜><think>\nso\n</think>\n\n'
        '[f{"b": [1, null], "a": 0.5}]<｜end▁of▁sentence｜>[f: 42]<｜Assistant｜><think>\nhm\n'
        "</think>\n\n42<｜end▁of▁sentence｜>",
    ),
]


@pytest.mark.parametrize(("source", "messages", "options", "expected"), GOLDEN)
def test_rendering_is_that_of_jinja2(source, messages, options, expected):
    assert ChatTemplate(source, TOKENS).render(messages, **options) == expected
    context = {"bos_token": BOS, "eos_token": EOS, "add_generation_prompt": True} | options
    assert by_jinja2(source, messages=messages, **context) == expected


def by_jinja2(source, **context):
    """What jinja2 renders, set up as transformers does it."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment.from_string(source).render(**context)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1)
WHOLE = st.integers(-(10**17), 10**17).map(float)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WHOLE | st.text("aé<'\"\\\n", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=6,
)
# As templates write the arguments of calls: whole, one by one, and by their kind.
WRITES = """{{ x | tojson }}{% for key, v in x.items() %}
{{ key }} {{ v | tojson }} {{ v }} {{ v | string }} {{ 'v: ' ~ v }}
{{ [v, {'v': v}] | tojson(indent=1) }}
{%- for kind in [v is number, v is float, v is integer, v is boolean, v is string, v is mapping,
                 v is sequence, v is none, v or false, not v] %} {{ kind }}{% endfor %}
{% endfor %}"""


@quick
@given(st.dictionaries(st.text("ab"), JSON, max_size=3))
@example({"a": 21.0, "b": -0.0, "c": 1e16, "d": 1e20, "e": 1.5e-7, "f": 1e-4, "g": 0.0})
def test_a_value_is_written_as_jinja2_writes_it(value):
    assert TemplateEngine(WRITES).render({"x": value}) == by_jinja2(WRITES, x=value)


def test_options_are_numbers_to_compute_with():
    source = (
        "{% if budget > 3 %}{{ budget + 1 }}{% endif %} {{ budget == 5 }}{{ messages | length }}"
    )
    assert ChatTemplate(source, TOKENS).render([turn("user")], budget=5.0) == "6.0 True1"


def test_arguments_of_a_call_keep_their_point():
    source = (
        "{% for m in messages %}{{ m.content }}{% for t in m.tool_calls or [] %}"
        "{% for k, v in t.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    function = {"name": "f", "arguments": '{"a": 21.0, "b": -0.0, "c": 1e16, "d": 5}'}
    call = {"type": "function", "function": function}
    messages = [turn("user", "q"), turn("assistant", "", tool_calls=[call])]
    assert ChatTemplate(source, TOKENS).render(messages) == "q a=21.0 b=-0.0 c=1e+16 d=5"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ missing }}{% if missing.x is not defined %}{% endif %}", None),
        ("{{ missing }}|{% if not missing %}x{% endif %}", "|x"),
        ("{{ ' a '.strip() }}{{ 'xay'.lstrip('x').rstrip('y') }}", "aa"),
        ("{{ 'ab'.startswith('a') }} {{ 'ab'.endswith('a') }}", "True False"),
        ("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{%- generation -%} a {%- endgeneration %} b", "a b"),
        ("{{ {'b': '<', 'a': 1} | tojson(indent=1) }}", '{\n "b": "<",\n "a": 1\n}'),
        ("{{ messages[0].content }}<b>&'", "<i>&'<b>&'"),
        ("{{ messages[0].__class__ }}|{{ ''.__class__ }}", "|"),
        ("{{ 'a' is sequence }} {{ [1] is sequence }} {{ 1 is sequence }}", "True True False"),
    ],
)
def test_what_templates_rely_on(source, expected):
    template = ChatTemplate(source, TOKENS)
    if expected is None:
        with pytest.raises(RequestError, match="undefined value"):
            template.render([turn("user")])
    else:
        assert template.render([turn("user", "<i>&'")]) == expected


def test_strftime_now():
    before = datetime.datetime.now().year
    year = ChatTemplate("{{ strftime_now('%Y') }}", TOKENS).render([turn("user")])
    assert before <= int(year) <= datetime.datetime.now().year


DOUBLE = "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = EXPR %}{% endfor %}"
ENDLESS = [
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    DOUBLE.replace("['a']", "'aa'").replace("EXPR", "n.x + n.x"),
]
# What fuel does not bound: one step each, or memory.
UNBOUNDED = [
    DOUBLE.replace("EXPR", "n.x + n.x") + "{{ n.x | length }}",
    DOUBLE.replace("EXPR", "[n.x, n.x]") + "{{ n.x | tojson }}",
    DOUBLE.replace("EXPR", "[n.x, n.x]") + "{{ n.x }}",
    "{{ [[1]] | tojson(indent=900000000) }}",
]


@pytest.fixture
def hasty(monkeypatch):
    """A child of its own, with less time, as each of these tests uses it up."""
    limits = Limits(cpu_s=0.5, memory_bytes=template_child.TEMPLATE_LIMITS.memory_bytes)
    with LimitedChild("edge.text.template_engine:work", limits) as child:
        monkeypatch.setattr(template_child, "_child", child)
        yield


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("source", [*ENDLESS, *UNBOUNDED])
def test_a_template_that_never_ends_is_refused_when_it_is_opened(source):
    before_s = time.monotonic()
    with pytest.raises(BundleError, match=r"cannot be used: it (takes more than|did not end)"):
        ChatTemplate(source, TOKENS)
    assert time.monotonic() - before_s < 10


@pytest.mark.timing
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("source", [*ENDLESS, *UNBOUNDED])
def test_a_message_cannot_make_a_template_run_for_ever(source):
    """Nor take this process's memory, nor hold its other threads, and the next chat is answered."""
    trap = f"{{% if messages[0].content == 'go' %}}{source}{{% endif %}}ok"
    template = ChatTemplate(trap, TOKENS)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.01):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ticker.start()
    try:
        before_s = time.monotonic()
        with pytest.raises(RequestError, match="cannot render these messages"):
            template.render([turn("user", "go")])
        took_s = time.monotonic() - before_s
        assert template.render([turn("user", "hello")]) == "ok"
    finally:
        done.set()
        ticker.join()
    assert took_s < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 32 << 10
    times = [before_s, *ticks, before_s + took_s]
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.4


@pytest.mark.timing
def test_an_unknown_template_costs_little_per_request(r1):
    """No process per request: a hundred chats take less than five starts of a process would."""
    assert not r1.is_known
    before_s = time.monotonic()
    for _ in range(100):
        r1.render(HISTORY)
    assert time.monotonic() - before_s < 0.5


def test_known_templates_run_in_this_process(monkeypatch):
    digest = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    unknown = ChatTemplate(CHAT_TEMPLATE, TOKENS)
    monkeypatch.setitem(known_templates.KNOWN_TEMPLATES, digest, "the tests'")

    def refuse(task: bytes) -> bytes:
        raise AssertionError("a known template was given to the child")

    monkeypatch.setattr(template_child._child, "ask", refuse)
    known = ChatTemplate(CHAT_TEMPLATE + "\n", TOKENS)
    assert known.is_known
    assert known.variables == unknown.variables
    rendered = known.render(HISTORY)
    monkeypatch.undo()
    assert rendered == unknown.render(HISTORY)
    for wrong in ([turn("user", "a"), turn("assistant", None, tool_calls=[CALL])], [turn("robot")]):
        with pytest.raises(RequestError):
            known.render(wrong)


def test_templates_that_are_no_text():
    with pytest.raises(BundleError, match="lone surrogate"):
        ChatTemplate("{{ '\ud800' }}", TOKENS)
    with pytest.raises(BundleError, match="at most"):
        ChatTemplate("a" * ((1 << 18) + 1), TOKENS)


def test_long_chats_are_within_the_bound(r1):
    messages = [turn("user", "a" * 200), turn("assistant", "b" * 200)] * 1000
    assert len(r1.render([turn("system", "s" * 1_000_000), *messages])) > 1_400_000


def test_errors_of_templates():
    with pytest.raises(BundleError, match=r"does not compile: .*:2\)"):
        ChatTemplate("a\n{% if %}", TOKENS)
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", TOKENS)
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        refusing.render([turn("user")])
    for source in ("{{ messages[0].pop('x') }}", "{{ {}|nothing }}", "{{ none + 'a' }}"):
        with pytest.raises(RequestError, match="cannot render these messages"):
            ChatTemplate(source, TOKENS).render([turn("user", "secret")])


def test_templates_get_a_copy():
    message = turn("user", "q")
    ChatTemplate("{{ messages[0].pop('content') }}{{ messages.clear() }}", TOKENS).render([message])
    assert message == turn("user", "q")


def test_options_without_effect_are_refused(r1, reasoning):
    messages = [turn("user", "q")]
    with pytest.raises(RequestError, match="tools: this model's chat template has no place"):
        r1.render(messages, tools=[TOOL])
    with pytest.raises(RequestError, match=r"enable_thinking: .* no such option; it reads none"):
        r1.render(messages, enable_thinking=False)
    with pytest.raises(RequestError, match="it reads enable_thinking"):
        reasoning.render(messages, thinking=False)
    with pytest.raises(RequestError, match="bos_token: "):
        r1.render(messages, bos_token="x")
    with pytest.raises(RequestError, match=r"messages\[1\].tool_calls: this model's"):
        r1.render([*messages, turn("assistant", "a", tool_calls=[CALL])])


# --- messages -------------------------------------------------------------------------------


def test_messages_in_every_accepted_form():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given_ = [
        turn("developer", "d"),
        turn("user", parts, name=None),
        {"role": "assistant", "tool_calls": [CALL], "reasoning": "r"},
        turn("tool", "t", tool_call_id="1"),
        turn("assistant", "a", reasoning="r", reasoning_content="r", refusal=None),
    ]
    expected = [
        turn("system", "d"),
        turn("user", "a\nb"),
        turn("assistant", None, tool_calls=[CALL], reasoning_content="r"),
        turn("tool", "t", tool_call_id="1"),
        turn("assistant", "a", reasoning_content="r"),
    ]
    assert normalize_messages(given_) == expected
    assert normalize_messages(expected) == expected


@pytest.mark.parametrize(
    ("message", "where"),
    [
        (turn("robot"), r"messages[1].role: must be one of system, user"),
        ({"content": "a"}, "messages[1].role"),
        ("hello", "messages[1]: give an object, not str"),
        (turn("user", 3), "messages[1].content"),
        ({"role": "user"}, "messages[1].content"),
        (turn("assistant", None), "messages[1].content"),
        (turn("user", [{"type": "image_url", "image_url": "x"}]), "messages[1].content[0]"),
        (turn("user", [{"type": "text", "text": "a"}, "b"]), "messages[1].content[1]"),
        (turn("user", [{"type": "text", "text": 1}]), "messages[1].content[0]"),
        (turn("user", "a", reasoning="b"), "messages[1].reasoning"),
        (turn("user", "a", cache=True), "messages[1].cache: a message of role 'user'"),
        (turn("assistant", "a", reasoning=1), "messages[1].reasoning"),
        (turn("assistant", "a", reasoning="b", reasoning_content="c"), "messages[1].reasoning"),
        (turn("assistant", "a", tool_calls="b"), "messages[1].tool_calls"),
        (turn("tool", "a", name=["b"]), "messages[1].name"),
        (turn("user", "a\ud800"), "messages[1]: not plain JSON"),
        (turn("user", object()), "messages[1]: not plain JSON"),
    ],
)
def test_wrong_messages_name_the_place(r1, message, where):
    with pytest.raises(RequestError, match=re.escape(where)):
        r1.render([turn("user"), message])


# As Qwen3.5's in this one thing.
STRICT_SYSTEM = CHATML.replace(
    "{{ '<|im_start|>' + message['role']",
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "{{ '<|im_start|>' + message['role']",
)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, STRICT_SYSTEM])
def test_system_messages_become_one_where_the_template_has_place_for_one(tokenizer, source):
    template = ChatTemplate(source, TOKENS)
    late = [turn("system", ""), *HISTORY[1:3], turn("developer", "Be <think>."), HISTORY[3]]
    for many, text in (
        ([HISTORY[0], turn("developer", "Be kind."), *HISTORY[1:]], "Be brief.\n\nBe kind."),
        ([*HISTORY[1:3], HISTORY[0], HISTORY[3]], "Be brief."),
        (late, "Be <think>."),
    ):
        one = [turn("system", text), *HISTORY[1:]]
        assert template.render(many) == template.render(one)
        assert encode_chat(tokenizer, template, many) == encode_chat(tokenizer, template, one)
        assert text in template.render(many)
    refused = [*late[:4], turn("assistant", "a", tool_calls=[CALL])]
    with pytest.raises(RequestError, match=r"messages\[4\].tool_calls: this model's chat"):
        template.render(refused)


def test_system_messages_stay_where_the_template_writes_each():
    many = [HISTORY[0], turn("system", "Be kind."), *HISTORY[1:3], turn("system", "Be quick.")]
    places = [(m["role"], m["content"]) for m in many]
    written = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in places)
    template = ChatTemplate(CHATML, TOKENS)
    assert template.render(many, add_generation_prompt=False) == written


@pytest.mark.parametrize("key", [".arguments", "['arguments']", '["arguments"]'])
def test_arguments_as_text_are_the_object_that_they_say(tokenizer, reasoning, key):
    source = reasoning.source.replace("call.function.arguments", f"call.function{key} ")
    template = ChatTemplate(source, TOKENS)
    as_text = {"function": {**CALL["function"], "arguments": json.dumps(ARGUMENTS)}}
    messages, same = (
        [turn("user", "a"), turn("assistant", None, tool_calls=[call, call])]
        for call in (as_text, CALL)
    )
    before = copy.deepcopy(messages)
    assert template.render(messages) == template.render(same)
    assert encode_chat(tokenizer, template, messages) == encode_chat(tokenizer, template, same)
    assert messages == before
    none = [turn("user", "a"), turn("assistant", None, tool_calls=[as_text])]
    for text in ("{}", "", "null"):  # Anthropic's models send an empty text, small ones null
        as_text["function"]["arguments"] = text
        assert "[f{}]" in template.render(none)
    for wrong in ("{", "[1]", '"a"'):
        as_text["function"]["arguments"] = wrong
        with pytest.raises(
            RequestError, match=r"messages\[1\].tool_calls: arguments must be a JSON"
        ):
            encode_chat(tokenizer, template, messages)


@pytest.mark.parametrize(
    "source", ["{{ arguments }}", "{% if arguments is string %}{{ arguments|tojson }}{% endif %}"]
)
def test_arguments_stay_text_where_the_template_writes_them_as_they_are(source):
    source = f"{{% set arguments = messages[0].tool_calls[0].function.arguments %}}{source}"
    call = {"function": {"name": "f", "arguments": "{"}}
    rendered = ChatTemplate(source, TOKENS).render([turn("assistant", None, tool_calls=[call])])
    assert rendered == ("{" if "tojson" not in source else '"{"')


@pytest.mark.parametrize("contents", ["m.content", "'</think>' in m.content"])
@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        ("{{ call | tojson }}", '{"name": "f", "arguments": {"x": "a"}}'),
        ("{% set a = call.arguments %}{{ a | tojson }}", '{"x": "a"}'),
        ("{{ call.arguments | tojson(indent=none) }}", '{"x": "a"}'),
        ("{% for k, v in call.arguments | items %}<{{ k }}>{{ v }}{% endfor %}", "<x>a"),
        ("{% for k, v in call.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}", "<x>a"),
        ("{% for k, v in call.arguments | dictsort %}{{ k }}={{ v }}{% endfor %}", "x=a"),
        ('{% for k in call.arguments %}<p name="{{ k }}">{% endfor %}', '<p name="x">'),
        (  # as Gemma's
            "{% if call.arguments is mapping %}{% for k, v in call.arguments | dictsort %}"
            "{{ k }}:{{ v }}{% endfor %}{% else %}{{ call.arguments }}{% endif %}",
            "x:a",
        ),
        (  # as Qwen3's
            "{% if call.arguments is string %}{{ call.arguments }}"
            "{% else %}{{ call.arguments | tojson }}{% endif %}",
            '{"x":  "a"}',
        ),
        ("{{ 'json ' + call.arguments + ' end' }}", 'json {"x":  "a"} end'),  # as R1's
        ("{{ call.arguments }}", '{"x":  "a"}'),
        ("{{ call.name }}", "f"),
    ],
)
def test_arguments_have_the_form_that_the_template_wants(contents, writes, expected):
    """The text of a client has two spaces, so that it can be told from what a template makes."""
    template = ChatTemplate(
        "{%- if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{% for m in messages %}{% if m.tool_calls %}"
        f"{{% if {contents} %}}{{% endif %}}{{% set call = m.tool_calls[0].function %}}{writes}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        TOKENS,
    )
    call = {"function": {"name": "f", "arguments": '{"x":  "a"}'}}
    history = [turn("user", "q"), turn("assistant", None, tool_calls=[call])]
    assert template.render(history) == f"q{expected}"


@pytest.mark.parametrize("more", [{}, {"reasoning_content": "so"}])
@pytest.mark.parametrize(
    ("writes", "content"),
    [  # as Qwen3's first template, QwQ's, and R1's, which writes calls only where there is none
        ("{% if '</think>' in m.content %}{% endif %}{{ m.content + call.arguments }}", ""),
        ("{{ m.content.split('</think>')[-1] + call.arguments }}", ""),
        ("{% if m.content is none %}{{ call.arguments }}{% endif %}", None),
    ],
)
def test_calls_beside_no_content_are_written(tokenizer, writes, content, more):
    template = ChatTemplate(
        "{% for m in messages %}{{ m.reasoning_content }}{% if m.tool_calls %}"
        f"{{% set call = m.tool_calls[0].function %}}{writes}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        TOKENS,
    )
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = turn("assistant", None, tool_calls=[call], **more)
    history = [turn("user", "q"), asked, turn("tool", "2", name="f")]
    assert template._normalize(history)[1]["content"] == content
    expected = f'q{more.get("reasoning_content", "")}{{"a": 1}}2'
    assert template.render(history) == expected
    assert tokenizer.decode(encode_chat(tokenizer, template, history)) == BOS + expected
    with_text = [history[0], {**asked, "content": "I look."}]
    assert template._normalize(with_text)[1]["content"] == "I look."


def test_messages_must_be_a_list(r1):
    wrongs: list[Any] = [[], "hello", turn("user")]
    for wrong in wrongs:
        with pytest.raises(RequestError, match="at least one message"):
            r1.render(wrong)


# --- encoding: control tokens come from the template alone ---------------------------------------


def same_text(a: str, b: str) -> bool:
    """Up to NFC, which the tokenizer applies to the text between control tokens."""
    return unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def test_r1_prompt(tokenizer, r1):
    expected = [BOS_ID, *plain(tokenizer, "Be brief."), USER, *plain(tokenizer, "2+2?")]
    expected += [ASSISTANT, *plain(tokenizer, "\n\n4"), EOS_ID, USER]
    expected += [*plain(tokenizer, "And 3+3?"), ASSISTANT, THINK, *plain(tokenizer, "\n")]
    assert encode_chat(tokenizer, r1, HISTORY) == expected


def test_exactly_one_bos(data, tokenizer, r1):
    message = [turn("user", "hello")]
    chatml = ChatTemplate(CHATML, TOKENS)
    assert encode_chat(tokenizer, r1, message).count(BOS_ID) == 1
    ids = encode_chat(tokenizer, chatml, message)
    assert ids[0] == BOS_ID
    assert ids.count(BOS_ID) == 1
    no_bos = Tokenizer.from_bytes(
        data, Tokens(bos=None, bos_text="", eos=(), eos_text="", add_bos=False)
    )
    assert encode_chat(no_bos, chatml, message) == ids[1:]
    # A typed bos at the very start is not the template's.
    bare = ChatTemplate("{{ messages[0].content }}", TOKENS)
    typed = encode_chat(tokenizer, bare, [turn("user", BOS + "x")])
    assert typed == [BOS_ID, *plain(tokenizer, BOS + "x")]


hostile = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROL, "<", "<<think>", "</think", ">", "\n\n", " ", "hello", "\ue000"]
        ),
        st.sampled_from(["\U0010ffff", "\U0010fffe", "\U0010fffd", "\U0010ffff<think>"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    ),
    max_size=8,
).map("".join)


@quick
@given(hostile, hostile, hostile)
def test_typed_control_tokens_stay_text(tokenizer, r1, system, user, answer):
    messages = [turn("system", system), turn("user", user), turn("assistant", answer)]
    expected = [BOS_ID, *plain(tokenizer, system), USER, *plain(tokenizer, user)]
    expected += [ASSISTANT, *plain(tokenizer, answer.split("</think>")[-1]), EOS_ID]
    expected += [ASSISTANT, THINK, *plain(tokenizer, "\n")]
    assert encode_chat(tokenizer, r1, messages) == expected


@quick
@given(hostile)
def test_every_string_of_a_request_is_shielded(tokenizer, reasoning, text):
    call = {"function": {"name": text, "arguments": {text: [text]}}}
    messages = [
        turn("user", [{"type": "text", "text": text}]),
        turn("assistant", text, reasoning=text or "x", tool_calls=[call]),
        turn("tool", text, name=text),
    ]
    ids = encode_chat(tokenizer, reasoning, messages, tools=[{text: {"enum": [text]}}])
    assert [id_ for id_ in ids if id_ in CONTROL_IDS.values()] == [
        *[BOS_ID, USER, ASSISTANT],
        *([THINK, CONTROL_IDS["</think>"]]),
        *[EOS_ID, ASSISTANT],
    ]
    rendered = reasoning.render(messages, tools=[{text: {"enum": [text]}}])
    assert same_text(tokenizer.decode(ids), rendered)


@pytest.mark.parametrize("control", CONTROL)
def test_injection_of_each_control_token(tokenizer, r1, control):
    ids = encode_chat(tokenizer, r1, [turn("user", f"a{control}b")])
    middle = plain(tokenizer, f"a{control}b")
    assert ids == [BOS_ID, USER, *middle, ASSISTANT, THINK, *plain(tokenizer, "\n")]


def test_past_reasoning_is_dropped(tokenizer, r1):
    def answer(content: str, **more: str) -> str:
        messages = [turn("assistant", content, **more)]
        ids = encode_chat(tokenizer, r1, messages, add_generation_prompt=False)
        return str(tokenizer.decode(ids[2:-1]))  # without bos, <｜Assistant｜> and the end

    assert answer("x</think>answer") == "answer"
    assert answer("<think>x\n</think>\n\nanswer") == "\n\nanswer"
    assert answer("x</think>y</think>answer") == "answer"
    assert answer("answer", reasoning="x") == "answer"
    assert answer("x <|EOT|></think>answer <|EOT|>") == "answer <|EOT|>"


def test_reasoning_tags_that_a_template_keeps_stay_text(tokenizer):
    # It writes the tags, but does not cut them out of old turns.
    source = "{{ '<｜Assistant｜><think>' + messages[-1].content.strip() + '</think>' }}"
    text = "a <think> b \n</think>"
    ids = encode_chat(tokenizer, ChatTemplate(source, TOKENS), [turn("assistant", text + " ")])
    expected = [BOS_ID, ASSISTANT, THINK, *plain(tokenizer, text), CONTROL_IDS["</think>"]]
    assert ids == expected


@quick
@given(hostile, st.sampled_from(["r1", "reasoning"]), st.booleans())
def test_shielding_changes_no_character(tokenizer, request, text, name, last):
    template = request.getfixturevalue(name)
    messages = [turn("user", text), turn("assistant", text), turn("user", text)][: 2 + last]
    rendered = template.render(messages)
    ids = encode_chat(tokenizer, template, messages)
    expected = tokenizer.encode(rendered, add_bos=not rendered.startswith(BOS))
    assert same_text(tokenizer.decode(ids), tokenizer.decode(expected))


def test_reasoning_goes_where_the_template_wants_it(tokenizer, reasoning):
    new = [turn("user", "q"), turn("assistant", "<think>\nhm\n</think>\n\n42")]
    same = [turn("user", "q"), turn("assistant", "42", reasoning="hm")]
    ids = encode_chat(tokenizer, reasoning, new)
    assert tokenizer.decode(ids).count("<think>\nhm\n</think>\n\n42") == 1
    assert THINK in ids
    assert encode_chat(tokenizer, reasoning, same) == ids
    old = encode_chat(tokenizer, reasoning, [*new, turn("user", "q")])
    assert "hm" not in tokenizer.decode(old)


def test_shielding_takes_linear_time(tokenizer, r1):
    content = " " * 200_000 + "</think>" * 2000 + "<" * 2000
    ids = encode_chat(tokenizer, r1, [turn("assistant", content)])
    assert ids[2:-4] == plain(tokenizer, "<" * 2000)


# --- reasoning and answer ---------------------------------------------------------------------


def test_whether_a_prompt_opens_the_reasoning(tokenizer, r1, reasoning):
    messages = [turn("user", "q")]
    assert prompt_opens_reasoning(r1.render(messages))
    assert prompt_opens_reasoning(tokenizer.decode(encode_chat(tokenizer, r1, messages)[-8:]))
    assert not prompt_opens_reasoning(reasoning.render(messages))
    assert not prompt_opens_reasoning(reasoning.render(messages, enable_thinking=False))


def test_whether_a_model_reasons(tokenizer):
    assert template_reasons(CHAT_TEMPLATE)
    assert not template_reasons(CHATML)
    assert template_reasons(f"{{% if enable_thinking %}}Think.{{% endif %}}{CHATML}")
    assert template_reasons(CHATML, tokenizer.control_tokens)
