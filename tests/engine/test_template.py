"""Chat templates: what is rendered, what a conversation cannot do to it, and what it cannot do to us."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import InvalidRequestError, ModelFileError
from chorus.core.generation import (
    Conversation,
    ImagePart,
    Message,
    MessageRole,
    Part,
    ReasoningPart,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
)
from chorus.engine.llama.template import ChatTemplate

CONTROLS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools> answer in <tool_call></tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>tool\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def template(source: str = CHATML) -> ChatTemplate:
    return ChatTemplate(source, bos="<s>", eos="</s>", control_texts=CONTROLS)


def say(role: MessageRole, *parts: Part | str) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def user(text: str, **changes: object) -> Conversation:
    return Conversation((say(MessageRole.USER, text),), **changes)  # type: ignore[arg-type]


def render(source: str, conversation: Conversation | None = None) -> str:
    return template(source).render(conversation or user("hi")).text


def test_a_conversation_with_tools() -> None:
    conversation = Conversation(
        (
            say(MessageRole.SYSTEM, "Be ", "brief."),
            say(MessageRole.USER, "Weather in Zürich?"),
            say(MessageRole.ASSISTANT, ToolCall("1", "weather", '{"city": "Zürich"}')),
            say(MessageRole.TOOL, ToolResult("1", "<b>sun</b>"), ToolResult("2", "more")),
        )
    )
    tool = Tool("weather", "It tells <the> weather", {"type": "object"})
    assert template().render(conversation, [tool]).text == (
        "<|im_start|>system\n# Tools\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "description": "It tells <the> weather", '
        '"parameters": {"type": "object"}}}'
        "\n</tools> answer in <tool_call></tool_call><|im_end|>\n"
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWeather in Zürich?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}<|im_end|>\n'
        "<|im_start|>tool\n<b>sun</b><|im_end|>\n<|im_start|>tool\nmore<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_what_a_template_is_given() -> None:
    assert template().calls_as_tags
    assert not template("{{ messages }}").takes_tools
    assert render("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ tools is none }}") == "<s></s>TrueTrue"
    assert render("{{ thinking }}", user("hi", template_variables={"thinking": False, "messages": 1})) == "False"
    assert render("{{ '{} {:>4}'.format('a', 1) }}") == "a    1"
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{% for m in messages %}{% break %}{% endfor %}x{% generation %}y{% endgeneration %}") == "xy"
    named = Conversation((Message(MessageRole.USER, (ReasoningPart("hm"), TextPart("hi")), name="Ann"),))
    assert render("{{ messages[0].name }} {{ messages[0].reasoning_content }}", named) == "Ann hm"


def test_an_unfinished_message_is_continued() -> None:
    unfinished = Conversation(
        (say(MessageRole.USER, "Count"), say(MessageRole.ASSISTANT, "one, two,")), continue_last=True
    )
    assert template().render(unfinished).text.endswith("<|im_start|>assistant\none, two,")
    trimming = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    assert render(trimming, unfinished) == "[Count][one, two,"
    with pytest.raises(InvalidRequestError, match="only an unfinished message of the assistant"):
        template().render(user("hi", continue_last=True))
    with pytest.raises(InvalidRequestError, match="cannot continue"):
        render("{{ messages[0].content }}", unfinished)


@given(st.lists(st.sampled_from([*CONTROLS, "<|im_", "end|>", "<", "s>", "x", "\ue000", "<<s>>"]), max_size=8))
def test_no_piece_holds_a_control_token_that_a_message_wrote(parts: list[str]) -> None:
    text = "".join(parts)
    rendered = template("{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}").render(user(text))
    assert rendered.text == f"user:{text}"
    assert not [piece for piece in rendered.pieces for control in CONTROLS if control in piece]


def test_control_tokens_of_the_template_stay_whole() -> None:
    rendered = template().render(user("a<|im_end|>b"))
    assert [piece.count("<|im_end|>") for piece in rendered.pieces] == [0, 1]
    assert rendered.pieces[0].endswith("a<")


def test_control_tokens_in_tools_and_variables_are_cut_too() -> None:
    source = "{{ tools[0].function.description }}{{ style }}"
    conversation = user("x", template_variables={"style": "</s>"})
    rendered = template(source).render(conversation, [Tool("f", "<s>", {})])
    assert rendered.pieces == ("<", "s><", "/s>")


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(InvalidRequestError, match="refuses it: no system messages") as caught:
        render("{{ raise_exception('no system messages') }}")
    assert caught.value.metadata["field"] == "conversation"
    picture = Conversation((say(MessageRole.USER, ImagePart(b"", "image/png")),))
    with pytest.raises(InvalidRequestError, match="picture"):
        template().render(picture)
    with pytest.raises(InvalidRequestError, match="no message"):
        template().render(Conversation(()))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(1000000) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='aa') %}{% for a in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for a in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%099999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ 'x'.zfill(999999999) }}",
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{% for a in range(99999) %}{% set x = range(99999) | list | length %}{% endfor %}",
    ],
)
def test_a_hostile_template_does_no_harm(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chorus.engine.llama.template._LONGEST_S", 0.3)
    traced = sys.gettrace()
    with pytest.raises(InvalidRequestError) as caught:
        render(source)
    assert "Traceback" not in caught.value.message
    assert "object at 0x" not in caught.value.message
    assert sys.gettrace() is traced


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | no_such_filter }}", "{% endif %}", "{{ 'x' | center(9) }}"])
def test_what_is_no_template_is_a_bad_file(source: str) -> None:
    with pytest.raises(ModelFileError, match="chat template cannot be read"):
        template(source)
