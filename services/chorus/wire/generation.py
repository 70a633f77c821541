"""Generations: between `chorus.api.inference.v1` and `chorus.core.generation`.

`decode_generation` is where a request is checked: what it returns is within every documented range. It raises
`InvalidRequestError` naming the field as it stands in the proto.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf import json_format, struct_pb2

from chorus.api.inference.v1 import content_pb2
from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.core.errors import InvalidRequestError
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Conversation,
    DeliveredChoice,
    Dry,
    GenerationRequest,
    ImagePart,
    Message,
    MessageRole,
    Part,
    Priority,
    Prompt,
    ReasoningPart,
    Requirements,
    Sampling,
    StopConditions,
    TextPart,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Xtc,
)
from chorus.core.text.strict_json import parse_json
from chorus.wire.bounds import check_bounds
from chorus.wire.resources import TIERS, decode_tier

MAX_CHOICES = 128
MAX_ALTERNATIVES = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 1000
MAX_LOGIT_BIAS = 1024

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

ROLES: dict[MessageRole, content_pb2.MessageRole.ValueType] = {
    role: content_pb2.MessageRole.Value(f"MESSAGE_ROLE_{role.name}") for role in MessageRole
}
TOOL_CHOICES: dict[ToolChoice, content_pb2.ToolChoice.ValueType] = {
    choice: content_pb2.ToolChoice.Value(f"TOOL_CHOICE_{choice.name}") for choice in ToolChoice
}
PRIORITIES: dict[Priority, pb.Priority.ValueType] = {
    priority: pb.Priority.Value(f"PRIORITY_{priority.name}") for priority in Priority
}
_ROLES_BACK = {value: role for role, value in ROLES.items()}
_TOOL_CHOICES_BACK = {value: choice for choice, value in TOOL_CHOICES.items()}
_PRIORITIES_BACK = {value: priority for priority, value in PRIORITIES.items()}


# --- decoding -------------------------------------------------------------------------------------------------------


def decode_generation(message: pb.GenerationSpec) -> GenerationRequest:
    """A checked request. Raises `InvalidRequestError`."""
    check_bounds(message)
    prompt = _decode_prompt(message)
    tools = tuple(_decode_tool(index, tool) for index, tool in enumerate(message.tools))
    if tools and not isinstance(prompt, Conversation):
        raise InvalidRequestError("tools", "need a conversation; a raw prompt has no template to show them in")
    tool_choice = _decode_tool_choice(message)
    if tool_choice is ToolChoice.REQUIRED and not tools:
        raise InvalidRequestError("tool_choice", "requires a tool, but none is given")
    choice_count = message.choice_count if message.HasField("choice_count") else 1
    _between("choice_count", choice_count, 1, MAX_CHOICES)
    return GenerationRequest(
        model=message.model,
        prompt=prompt,
        tools=tools,
        tool_choice=tool_choice,
        sampling=_decode_sampling(message.sampling) if message.HasField("sampling") else Sampling(),
        stop=_decode_stop(message.stop),
        choice_count=choice_count,
        logprobs=_alternatives("logprobs", message.logprobs) if message.HasField("logprobs") else None,
        prompt_logprobs=(
            _alternatives("prompt_logprobs", message.prompt_logprobs) if message.HasField("prompt_logprobs") else None
        ),
        constraint=_decode_constraint(message),
        resume=_decode_resume(message.resume, choice_count),
        allow_text_resume=message.resume.allow_text,
        priority=_decode_priority(message.priority),
        requirements=decode_requirements(message.requirements),
        adapter=message.adapter,
        context_shift=message.context_shift,
        session_id=message.session_id,
    )


def decode_requirements(message: pb.Requirements) -> Requirements:
    """What runner, node or model must be like."""
    if not message.ByteSize():  # as of nearly every request
        return Requirements()
    if message.artifact_sha256 and not _SHA256.fullmatch(message.artifact_sha256):
        raise InvalidRequestError("requirements.artifact_sha256", "must be 64 lower-case hexadecimal digits")
    tier = decode_tier(message.tier)
    if message.tier and tier is None:
        raise InvalidRequestError("requirements.tier", f"{message.tier} is not a tier that this version knows")
    return Requirements(
        labels=dict(message.labels),
        tier=tier,
        tags=tuple(message.tags),
        context_length=message.context_length,
        artifact_sha256=message.artifact_sha256,
        runner_ids=tuple(message.runner_ids),
        node_ids=tuple(message.node_ids),
        private=message.private,
    )


def decode_priority(field: str, value: pb.Priority.ValueType) -> Priority:
    """A priority; unspecified is interactive."""
    if not value:
        return Priority.INTERACTIVE
    try:
        return _PRIORITIES_BACK[value]
    except KeyError:
        raise InvalidRequestError(field, f"{value} is not a priority that this version knows") from None


def _decode_priority(value: pb.Priority.ValueType) -> Priority:
    return decode_priority("priority", value)


def _decode_prompt(message: pb.GenerationSpec) -> Prompt:
    match message.WhichOneof("input"):
        case "prompt":
            return TextPrompt(message.prompt)
        case "token_ids":
            if not message.token_ids.ids:
                raise InvalidRequestError("token_ids", "must hold at least one token")
            return TokenPrompt(tuple(message.token_ids.ids))
        case "conversation":
            return _decode_conversation(message.conversation)
        case _:
            raise InvalidRequestError("input", "one of prompt, token_ids and conversation must be set")


def _decode_conversation(message: content_pb2.Conversation) -> Conversation:
    if not message.messages:
        raise InvalidRequestError("conversation.messages", "must hold at least one message")
    messages = tuple(_decode_message(index, turn) for index, turn in enumerate(message.messages))
    if message.continue_last and messages[-1].role is not MessageRole.ASSISTANT:
        raise InvalidRequestError("conversation.continue_last", "needs a last message of the assistant's")
    return Conversation(
        messages=messages,
        template_variables=_decode_struct("conversation.template_variables", message.template_variables),
        continue_last=message.continue_last,
    )


def _decode_message(index: int, message: content_pb2.Message) -> Message:
    field = f"conversation.messages[{index}]"
    role = _ROLES_BACK.get(message.role)
    if role is None:
        raise InvalidRequestError(f"{field}.role", "must be system, user, assistant or tool")
    if not message.parts:
        raise InvalidRequestError(f"{field}.parts", "must hold at least one part")
    parts = tuple(_decode_part(f"{field}.parts[{number}]", part) for number, part in enumerate(message.parts))
    return Message(role=role, parts=parts, name=message.name)


def _decode_part(field: str, part: content_pb2.Part) -> Part:
    match part.WhichOneof("part"):
        case "text":
            return TextPart(part.text)
        case "image":
            if not part.image.data:
                raise InvalidRequestError(f"{field}.image.data", "must not be empty")
            return ImagePart(part.image.data, part.image.media_type)
        case "tool_call":
            call = part.tool_call
            _check_json(f"{field}.tool_call.arguments_json", call.arguments_json)
            return ToolCall(call.id, call.name, call.arguments_json)
        case "tool_result":
            return ToolResult(part.tool_result.tool_call_id, part.tool_result.text, part.tool_result.failed)
        case "reasoning":
            return ReasoningPart(part.reasoning)
        case _:
            raise InvalidRequestError(field, "is of no kind that this version knows")


def _decode_tool(index: int, tool: content_pb2.Tool) -> Tool:
    if not _TOOL_NAME.fullmatch(tool.name):
        raise InvalidRequestError(f"tools[{index}].name", "must be 1 to 64 letters, digits, `_` or `-`")
    return Tool(
        name=tool.name,
        description=tool.description,
        parameters=_decode_struct(f"tools[{index}].parameters", tool.parameters),
        acts=tool.acts,
    )


def _decode_tool_choice(message: pb.GenerationSpec) -> ToolChoice:
    if not message.tool_choice:
        return ToolChoice.AUTO
    try:
        return _TOOL_CHOICES_BACK[message.tool_choice]
    except KeyError:
        problem = f"{message.tool_choice} is not a choice that this version knows"
        raise InvalidRequestError("tool_choice", problem) from None


def _decode_struct(field: str, struct: struct_pb2.Struct) -> dict[str, Any]:
    try:
        decoded: dict[str, Any] = json_format.MessageToDict(struct)
    except (json_format.Error, RecursionError, ValueError):
        raise InvalidRequestError(field, "is not plain JSON (a number may be NaN, or a value may be unset)") from None
    return decoded


def _check_json(field: str, text: str) -> None:
    try:
        parse_json(text)
    except ValueError as error:
        raise InvalidRequestError(field, f"is not JSON: {error}") from None


def _decode_sampling(message: pb.Sampling) -> Sampling:
    default = Sampling()
    number = _Numbers(message, "sampling")
    bias: dict[int, float] = {}
    if len(message.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequestError("sampling.logit_bias", f"has over {MAX_LOGIT_BIAS} entries")
    for entry in message.logit_bias:
        _between("sampling.logit_bias.bias", entry.bias, -100.0, 100.0)
        bias[entry.token_id] = entry.bias
    return Sampling(
        temperature=number("temperature", default.temperature, 0.0, 5.0),
        top_k=message.top_k if message.HasField("top_k") else default.top_k,
        top_p=number("top_p", default.top_p, 0.0, 1.0, above=True),
        min_p=number("min_p", default.min_p, 0.0, 1.0),
        typical_p=number("typical_p", default.typical_p, 0.0, 1.0, above=True),
        repetition_penalty=number("repetition_penalty", default.repetition_penalty, 0.0, 10.0, above=True),
        presence_penalty=number("presence_penalty", default.presence_penalty, -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", default.frequency_penalty, -2.0, 2.0),
        penalty_window=message.penalty_window if message.HasField("penalty_window") else default.penalty_window,
        dry=_decode_dry(message.dry) if message.HasField("dry") and message.dry.multiplier != 0 else None,
        xtc=_decode_xtc(message.xtc) if message.HasField("xtc") and message.xtc.probability != 0 else None,
        logit_bias=bias,
        seed=message.seed if message.HasField("seed") else None,
    )


def _decode_dry(message: pb.Dry) -> Dry:
    number = _Numbers(message, "sampling.dry")
    default = Dry(multiplier=0.0)
    _between("sampling.dry.multiplier", message.multiplier, 0.0, 100.0)
    return Dry(
        multiplier=message.multiplier,
        base=number("base", default.base, 1.0, 100.0),
        allowed_length=message.allowed_length if message.HasField("allowed_length") else default.allowed_length,
        window=message.window if message.HasField("window") else None,
        sequence_breakers=tuple(message.sequence_breakers) or default.sequence_breakers,
    )


def _decode_xtc(message: pb.Xtc) -> Xtc:
    _between("sampling.xtc.probability", message.probability, 0.0, 1.0)
    _between("sampling.xtc.threshold", message.threshold, 0.0, 0.5)
    return Xtc(message.probability, message.threshold)


def _decode_stop(message: pb.StopConditions) -> StopConditions:
    if len(message.strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop.strings", f"has {len(message.strings)}; at most {MAX_STOP_STRINGS} are taken")
    if any(not text for text in message.strings):
        raise InvalidRequestError("stop.strings", "must not hold an empty string")
    longest = max(map(len, message.strings), default=0)
    if longest > MAX_STOP_STRING_LENGTH:  # each character costs the engine a few hundred bytes
        problem = f"holds one of {longest} characters; at most {MAX_STOP_STRING_LENGTH} are taken"
        raise InvalidRequestError("stop.strings", problem)
    max_tokens = message.max_tokens if message.HasField("max_tokens") else None
    if max_tokens == 0:
        raise InvalidRequestError("stop.max_tokens", "must be at least 1, or absent for as many as the context holds")
    return StopConditions(
        max_tokens=max_tokens,
        strings=tuple(message.strings),
        token_ids=tuple(message.token_ids),
        ignore_eos=message.ignore_eos,
    )


def _decode_constraint(message: pb.GenerationSpec) -> Constraint | None:
    name = message.WhichOneof("constraint")
    if name is None:
        return None
    source = str(getattr(message, name))
    if not source:
        raise InvalidRequestError(name, "must not be empty")
    if name == "json_schema":
        _check_json(name, source)
    return Constraint(ConstraintKind(name), source)


def _decode_resume(message: pb.Resume, choice_count: int) -> tuple[DeliveredChoice, ...]:
    seen: set[int] = set()
    choices = []
    for number, choice in enumerate(message.choices):
        field = f"resume.choices[{number}]"
        _between(f"{field}.choice", choice.choice, 0, choice_count - 1)
        if choice.choice in seen:
            raise InvalidRequestError(f"{field}.choice", f"{choice.choice} is there twice")
        if choice.text and not choice.token_ids and not message.allow_text:
            raise InvalidRequestError(f"{field}.text", "going on from text alone needs resume.allow_text")
        most = len(choice.token_ids) or len(choice.text.encode())
        if choice.token_count > most or (choice.token_ids and choice.token_count not in (0, most)):
            what = "token ids" if choice.token_ids else "bytes of text"
            raise InvalidRequestError(f"{field}.token_count", f"is {choice.token_count}, beside {most} {what}")
        seen.add(choice.choice)
        choices.append(
            DeliveredChoice(
                choice.choice,
                tuple(choice.token_ids),
                choice.text,
                0 if choice.token_ids else choice.token_count,
            )
        )
    return tuple(choices)


class _Numbers:
    """Reads a message's optional floats, checking each against its range."""

    def __init__(self, message: Any, prefix: str) -> None:
        self._message = message
        self._prefix = prefix

    def __call__(self, name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        if not self._message.HasField(name):
            return default
        value = float(getattr(self._message, name))
        _between(f"{self._prefix}.{name}", value, low, high, above=above)
        return value


def _between(field: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    inside = low < value <= high if above else low <= value <= high
    if not inside or math.isnan(value):
        span = f"over {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise InvalidRequestError(field, f"is {value:g}, but must be {span}")


def _alternatives(field: str, value: int) -> int:
    _between(field, value, 0, MAX_ALTERNATIVES)
    return value


# --- encoding -------------------------------------------------------------------------------------------------------


def encode_generation(request: GenerationRequest) -> pb.GenerationSpec:
    """The message of a request; decoding it gives an equal one (floats rounded to 32 bits)."""
    message = pb.GenerationSpec(
        model=request.model,
        tools=[_encode_tool(tool) for tool in request.tools],
        tool_choice=TOOL_CHOICES[request.tool_choice],
        sampling=_encode_sampling(request.sampling),
        stop=pb.StopConditions(
            max_tokens=request.stop.max_tokens,
            strings=request.stop.strings,
            token_ids=request.stop.token_ids,
            ignore_eos=request.stop.ignore_eos,
        ),
        choice_count=request.choice_count,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        priority=PRIORITIES[request.priority],
        requirements=encode_requirements(request.requirements),
        adapter=request.adapter,
        context_shift=request.context_shift,
        session_id=request.session_id,
    )
    match request.prompt:
        case TextPrompt(text):
            message.prompt = text
        case TokenPrompt(token_ids):
            message.token_ids.ids.extend(token_ids)
        case Conversation():
            message.conversation.CopyFrom(_encode_conversation(request.prompt))
    if request.constraint is not None:
        setattr(message, request.constraint.kind.value, request.constraint.source)
    if request.resume or request.allow_text_resume:
        message.resume.allow_text = request.allow_text_resume
        message.resume.choices.extend(map(encode_delivered, request.resume))
    return message


def encode_delivered(choice: DeliveredChoice) -> pb.DeliveredChoice:
    """What one choice of an interrupted stream has delivered."""
    return pb.DeliveredChoice(
        choice=choice.choice, token_ids=choice.token_ids, text=choice.text, token_count=choice.token_count
    )


def encode_requirements(requirements: Requirements) -> pb.Requirements:
    """What runner, node or model must be like."""
    return pb.Requirements(
        labels=requirements.labels,
        tier=TIERS[requirements.tier] if requirements.tier else pb.TIER_UNSPECIFIED,
        tags=requirements.tags,
        context_length=requirements.context_length or None,
        artifact_sha256=requirements.artifact_sha256,
        runner_ids=requirements.runner_ids,
        node_ids=requirements.node_ids,
        private=requirements.private,
    )


def _encode_conversation(conversation: Conversation) -> content_pb2.Conversation:
    return content_pb2.Conversation(
        messages=[
            content_pb2.Message(
                role=ROLES[turn.role], parts=[_encode_part(part) for part in turn.parts], name=turn.name
            )
            for turn in conversation.messages
        ],
        template_variables=_encode_struct(conversation.template_variables),
        continue_last=conversation.continue_last,
    )


def _encode_part(part: Part) -> content_pb2.Part:
    match part:
        case TextPart(text):
            return content_pb2.Part(text=text)
        case ImagePart(data, media_type):
            return content_pb2.Part(image=content_pb2.Image(data=data, media_type=media_type))
        case ToolCall():
            return content_pb2.Part(tool_call=encode_tool_call(part))
        case ToolResult(tool_call_id, text, failed):
            result = content_pb2.ToolResult(tool_call_id=tool_call_id, text=text, failed=failed)
            return content_pb2.Part(tool_result=result)
        case ReasoningPart(text):
            return content_pb2.Part(reasoning=text)


def encode_tool_call(call: ToolCall) -> content_pb2.ToolCall:
    """A call of a tool."""
    return content_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)


def _encode_tool(tool: Tool) -> content_pb2.Tool:
    return content_pb2.Tool(
        name=tool.name,
        description=tool.description,
        parameters=_encode_struct(tool.parameters),
        acts=tool.acts,
    )


def _encode_struct(values: Any) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def _encode_sampling(sampling: Sampling) -> pb.Sampling:
    message = pb.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        penalty_window=sampling.penalty_window,
        seed=sampling.seed,
        logit_bias=_encode_logit_bias(sampling.logit_bias.items()),
    )
    if sampling.dry is not None:
        dry = sampling.dry
        message.dry.CopyFrom(
            pb.Dry(
                multiplier=dry.multiplier,
                base=dry.base,
                allowed_length=dry.allowed_length,
                window=dry.window,
                sequence_breakers=dry.sequence_breakers,
            )
        )
    if sampling.xtc is not None:
        message.xtc.CopyFrom(pb.Xtc(probability=sampling.xtc.probability, threshold=sampling.xtc.threshold))
    return message


def _encode_logit_bias(items: Iterable[tuple[int, float]]) -> list[pb.LogitBias]:
    make: Callable[..., pb.LogitBias] = pb.LogitBias
    return [make(token_id=token_id, bias=bias) for token_id, bias in items]
