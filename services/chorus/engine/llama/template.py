"""Rendering a model's own chat template (Jinja, from its GGUF file) without trusting it or the conversation.

The template is somebody else's program: it runs in Jinja's sandbox, with a limit on its steps, its time and the size of
what it writes and joins. (It could still waste memory within a single filter; a model file is trusted that far.)

The conversation is somebody else's text: written into the prompt as it is, `<|im_end|>` in a message would end the
turn. So wherever a message holds the text of a control token, a marker character is put inside of it before rendering,
and the prompt is cut there before it is tokenized: no piece holds the whole text any more, and so no piece becomes the
control token.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chorus.core.errors import InvalidRequestError, ModelFileError
from chorus.core.generation import (
    Conversation,
    ImagePart,
    Message,
    MessageRole,
    ReasoningPart,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
)

_LARGEST_OUTPUT = 16_000_000  # characters, more than any context holds
_MOST_STEPS = 3_000_000
_LONGEST_S = 5.0
_FILE = "<template>"  # what Jinja calls code that came from a text
_MARKERS = [chr(code) for code in range(0xE000, 0xE100)]  # private use: no text means anything by them


class _TemplateError(Exception):
    """What a template says by `raise_exception`, or a limit that it broke."""


class _Generation(Extension):
    """`{% generation %}` marks what a model said, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare them

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with limits on what grows."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator, unless the result could be huge."""
        sizes = [len(value) if isinstance(value, str | list | tuple) else 0 for value in (left, right)]
        if operator == "+" and sum(sizes) > _LARGEST_OUTPUT:
            raise _TemplateError("joins too much text")
        if operator == "*" and any(sizes):
            times = left if isinstance(left, int) else right
            if isinstance(times, int) and sum(sizes) * times > _LARGEST_OUTPUT:
                raise _TemplateError("repeats a text too often")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{4}|\*", left):
            raise _TemplateError("formats a text too wide")
        if operator == "**" and not (abs(left) <= 1_000_000 and abs(right) <= 64):
            raise _TemplateError("computes too large a number")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """No method that can make a huge text of a small one."""
        if isinstance(obj, str) and attr in {"center", "ljust", "rjust", "zfill", "expandtabs"}:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, in the sandbox, unless it could pad without bounds."""
        formatting = super().wrap_str_format(value)
        if formatting is not None and re.search(r"\d{4}|:[^}]*\{", str(value.__self__)):
            raise _TemplateError("formats a text too wide")
        return formatting

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for concat in list(tree.find_all(nodes.Concat)):
            # `~` is compiled to a plain join, past every check: make it a call of one that looks at the sizes
            parts = nodes.List(concat.nodes, lineno=concat.lineno)
            concat.nodes = [nodes.Filter(parts, "_join", [], [], None, None, lineno=concat.lineno)]
        return tree


def _join(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > _LARGEST_OUTPUT:
        raise _TemplateError("joins too much text")
    return "".join(texts)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    separators = options.get("separators")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=min(indent, 16) if isinstance(indent, int) else None,
        separators=tuple(separators) if separators else None,
        sort_keys=bool(options.get("sort_keys", False)),
        default=str,
    )


def _raise_exception(message: object = "") -> None:
    raise _TemplateError(str(message))


def _strftime_now(format_: str) -> str:
    return datetime.datetime.now().astimezone().strftime(str(format_)[:200])


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation], autoescape=False
    )
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _tojson
    environment.filters["_join"] = _join
    for name in (
        "center",
        "format",
        "wordwrap",
        "urlize",
    ):  # these make much text of little, and no template needs them
        environment.filters.pop(name, None)
    return environment


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as pieces of text; special tokens are to be parsed within each of them, never across two."""

    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole prompt."""
        return "".join(self.pieces)


class ChatTemplate:
    """One model's chat template. Rendering is thread-safe; it may take a few milliseconds."""

    def __init__(self, source: str, *, bos: str, eos: str, control_texts: Iterable[str]) -> None:
        """Compiles it. Raises `ModelFileError` where it is no template."""
        self._bos, self._eos = bos, eos
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise ModelFileError(f"the model's chat template cannot be read: {_words(error)}") from error
        texts = sorted(set(control_texts), key=len, reverse=True)
        self._controls = re.compile("|".join(re.escape(text) for text in texts if len(text) > 1)) if texts else None
        self.takes_tools = "tools" in source
        self.calls_as_tags = self.takes_tools and "<tool_call>" in source

    def render(self, conversation: Conversation, tools: Sequence[Tool] = ()) -> Rendered:
        """The prompt of a conversation. Raises `InvalidRequestError` about `conversation`, in the template's words."""
        messages = _messages(conversation.messages)
        functions = [_function(tool) for tool in tools]
        variables = dict(conversation.template_variables)
        everything = [messages, functions, variables]
        cut, end = _unused_characters(everything, 2)
        messages, functions, variables = self._neutralize(everything, cut)
        if conversation.continue_last:
            last = messages[-1]
            if last["role"] != MessageRole.ASSISTANT.value:
                raise InvalidRequestError(
                    "conversation", "only an unfinished message of the assistant can be continued"
                )
            last["content"] += end
        variables.update(
            messages=messages,
            tools=functions or None,
            bos_token=self._bos,
            eos_token=self._eos,
            add_generation_prompt=not conversation.continue_last,
        )
        text = self._run(variables)
        if conversation.continue_last:
            text, found, _ = text.partition(end)
            if not found:
                raise InvalidRequestError("conversation", "this model's template cannot continue an unfinished message")
        return Rendered(tuple(piece for piece in text.split(cut) if piece))

    def _run(self, variables: Mapping[str, Any]) -> str:
        written: list[str] = []
        size = 0
        try:
            with _Limits():
                for piece in self._template.generate(variables):
                    size += len(piece)
                    if size > _LARGEST_OUTPUT:
                        raise _TemplateError("writes too much")
                    written.append(piece)
        except _TemplateError as error:
            raise InvalidRequestError("conversation", f"the model's chat template refuses it: {error}") from error
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                "conversation", f"the model's chat template cannot render it: {_words(error)}"
            ) from error
        except Exception as error:  # what a template does to values of a kind it does not expect
            raise InvalidRequestError(
                "conversation",
                "the model's chat template cannot render it: a message or variable has a form that it does not expect",
            ) from error
        return "".join(written)

    def _neutralize(self, value: Any, cut: str) -> Any:
        """A copy with a cut inside of every control token's text (after its first character)."""
        if isinstance(value, str):
            return _break_up(value, self._controls, cut) if self._controls is not None else value
        if isinstance(value, Mapping):
            return {self._neutralize(key, cut): self._neutralize(item, cut) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._neutralize(item, cut) for item in value]
        return value


def _break_up(text: str, controls: re.Pattern[str], cut: str) -> str:
    pieces = []
    start = place = 0
    while (match := controls.search(text, place)) is not None:
        place = match.start() + 1  # the next one may begin inside of this one
        pieces.append(text[start:place])
        start = place
    pieces.append(text[start:])
    return cut.join(pieces)


class _Limits:
    """Counts the steps of this thread while a template runs, and ends it after too many or too long."""

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        self._steps = 0
        self._deadline = time.monotonic() + _LONGEST_S
        sys.settrace(self._on_call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        self._count()
        return self._on_line if frame.f_code.co_filename == _FILE else None

    def _on_line(self, _frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any]:
        self._count()
        return self._on_line

    def _count(self) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS or (self._steps % 1000 == 0 and time.monotonic() > self._deadline):
            raise _TemplateError("takes too long")


def _words(error: BaseException) -> str:
    """An error of Jinja's in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _unused_characters(value: Any, count: int) -> list[str]:
    """Characters that occur nowhere in `value`."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    found = [marker for marker in _MARKERS if marker not in text][:count]
    if len(found) < count:
        raise InvalidRequestError("conversation", "uses every character of Unicode's private use area")
    return found


def _function(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
    }


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form that Hugging Face's templates expect; each tool result is a message of its own."""
    if not messages:
        raise InvalidRequestError("conversation", "has no message")
    result: list[dict[str, Any]] = []
    for message in messages:
        texts: list[str] = []
        reasoning: list[str] = []
        calls: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                texts.append(part.text)
            elif isinstance(part, ReasoningPart):
                reasoning.append(part.text)
            elif isinstance(part, ToolCall):
                calls.append(_call(part))
            elif isinstance(part, ToolResult):
                results.append({"role": "tool", "content": part.text, "tool_call_id": part.tool_call_id})
            elif isinstance(part, ImagePart):
                raise InvalidRequestError("conversation", "holds a picture, which this engine cannot read")
        if texts or reasoning or calls or not results:
            entry: dict[str, Any] = {"role": message.role.value, "content": "".join(texts)}
            if message.name:
                entry["name"] = message.name
            if reasoning:
                entry["reasoning_content"] = "".join(reasoning)
            if calls:
                entry["tool_calls"] = calls
            result.append(entry)
        result.extend(results)
    return result


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments_json)
    except ValueError:
        arguments = call.arguments_json
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
