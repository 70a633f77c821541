"""What is asked of servers compatible with OpenAI's API, in the words of each make."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from chorus.core.fleet.records import Feature
from chorus.core.generation import (
    ConstraintKind,
    Conversation,
    GenerationRequest,
    ImagePart,
    Message,
    MessageRole,
    Part,
    TextPart,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from chorus.engine.remote.dialect import (
    Call,
    RemoteModel,
    delivered_text,
    json_of,
    raw_prompt,
    unsupported,
)


def call_of(make: str, model: RemoteModel, request: GenerationRequest, seed: int) -> Call:
    """The call that generates at a server of that make. Raises `UnsupportedFeatureError`, naming what it can't do."""
    counts = make in ("vllm", "llama-server")
    body: dict[str, Any] = {
        "model": model.id,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
    }
    if make == "vllm":
        body["stream_options"]["continuous_usage_stats"] = True
        body |= _vllm(request, seed)
    elif make == "llama-server":
        body |= {"timings_per_token": True} | _llama_server(request, seed)
    # Where every line tells what was used, stop strings are looked for here: so it is known which one it was.
    elif request.stop.strings:
        body["stop"] = list(request.stop.strings)
    if request.stop.token_ids and make != "vllm":
        raise unsupported(model, Feature.TOKEN_IDS, "stop at token ids")
    limit = request.tokens_left
    if limit is not None:
        body["max_tokens"] = max(1, limit)
    schema = request.constraint is not None and request.constraint.kind is ConstraintKind.JSON_SCHEMA
    if request.constraint is not None and schema:
        wanted = {
            "name": "answer",
            "schema": json_of(request.constraint.kind, request.constraint.source),
            "strict": True,
        }
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    prompt = raw_prompt(model, request)
    if prompt is not None:
        body["prompt"] = prompt
        if limit is None and make != "llama-server":
            body["max_tokens"] = None  # by itself it would be 16
        if make == "llama-server" and schema:
            body["json_schema"] = body.pop("response_format")["json_schema"]["schema"]
        return Call("/v1/completions", body, counts)
    assert isinstance(request.prompt, Conversation)
    body |= _chat(make, model, request, request.prompt)
    last = body["messages"][-1]
    # llama-server repeats the message that it goes on with; not every version does.
    echo = last["content"] if make == "llama-server" and last["role"] == MessageRole.ASSISTANT.value else ""
    return Call("/v1/chat/completions", body, counts, echo if isinstance(echo, str) else "")


def _vllm(request: GenerationRequest, seed: int) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": seed,
        "ignore_eos": request.stop.ignore_eos,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if request.stop.token_ids:
        body["stop_token_ids"] = list(request.stop.token_ids)
    return body


def _llama_server(request: GenerationRequest, seed: int) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_last_n": sampling.penalty_window,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": seed,
        "ignore_eos": request.stop.ignore_eos,
    }
    if sampling.dry is not None:
        body |= {
            "dry_multiplier": sampling.dry.multiplier,
            "dry_base": sampling.dry.base,
            "dry_allowed_length": sampling.dry.allowed_length,
            "dry_penalty_last_n": -1 if sampling.dry.window is None else sampling.dry.window,
            "dry_sequence_breakers": list(sampling.dry.sequence_breakers),
        }
    if sampling.xtc is not None:
        body |= {"xtc_probability": sampling.xtc.probability, "xtc_threshold": sampling.xtc.threshold}
    if request.constraint is not None and request.constraint.kind is ConstraintKind.GRAMMAR:
        body["grammar"] = request.constraint.source
    return body


def _chat(make: str, model: RemoteModel, request: GenerationRequest, conversation: Conversation) -> dict[str, Any]:
    body: dict[str, Any] = {}
    messages = [said for message in conversation.messages for said in _messages(message)]
    delivered = delivered_text(model, request)
    if conversation.continue_last or delivered:
        if make not in ("vllm", "llama-server"):
            raise unsupported(model, Feature.RESUME, "go on with a message of a conversation")
        if not conversation.continue_last:
            messages.append({"role": MessageRole.ASSISTANT.value, "content": ""})
        messages[-1]["content"] = str(messages[-1].get("content") or "") + delivered
        if make == "vllm":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    body["messages"] = messages
    if conversation.template_variables:
        if make not in ("vllm", "llama-server"):
            raise unsupported(model, Feature.CHAT, "fill in variables of its chat template")
        body["chat_template_kwargs"] = dict(conversation.template_variables)
    if request.tools and request.tool_choice is not ToolChoice.NONE:
        body["tool_choice"] = "required" if request.tool_choice is ToolChoice.REQUIRED else "auto"
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": dict(tool.parameters) or {"type": "object", "properties": {}},
                },
            }
            for tool in request.tools
        ]
    return body


def _messages(message: Message) -> list[dict[str, Any]]:
    """A message in OpenAI's form; each tool's result is a message of its own, and what was thought is left out."""
    said: list[dict[str, Any]] = [
        {"role": "tool", "content": part.text, "tool_call_id": part.tool_call_id}
        for part in message.parts
        if isinstance(part, ToolResult)
    ]
    rest = [part for part in message.parts if not isinstance(part, ToolResult)]
    if not rest:
        return said
    entry: dict[str, Any] = {"role": message.role.value, "content": _content(rest)}
    calls = [part for part in rest if isinstance(part, ToolCall)]
    if calls:
        entry["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json or "{}"},
            }
            for call in calls
        ]
    if message.name:
        entry["name"] = message.name
    return [*said, entry]


def _content(parts: Sequence[Part]) -> str | list[dict[str, Any]]:
    if not any(isinstance(part, ImagePart) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, TextPart))
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        elif isinstance(part, ImagePart):
            encoded = base64.b64encode(part.data).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:{part.media_type};base64,{encoded}"}})
    return content
