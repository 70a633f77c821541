"""A real model's answers that break off on one runner and go on at another: still whole in form and count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from chorus.client import AttemptChanged, ClientEvent, StartedAt
from chorus.core.errors import DrainingError
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Conversation,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Message,
    MessageRole,
    Sampling,
    StopConditions,
    TextPart,
    TextPrompt,
    TokenDelta,
    Tool,
)
from chorus.engine.llama import LlamaEngine
from chorus.testing.mesh import InProcessMesh
from tests.engine.conftest import SETTINGS, smollm2

_SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "name": {"type": "string", "maxLength": 12},
    },
    "required": ["kind", "age", "name"],
    "additionalProperties": False,
}


class BreaksOff:
    """An engine whose next answers end too early, each after so many deltas; nothing else about it is changed."""

    def __init__(self, engine: LlamaEngine, after: list[int]) -> None:
        self._engine = engine
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        left = self._after.pop(0) if self._after else None
        events = self._engine.generate(request)
        try:
            async for event in events:
                if isinstance(event, TokenDelta) and left is not None:
                    if left == 0:
                        raise DrainingError("told to leave")
                    left -= 1
                yield event
        finally:
            await events.aclose()


@pytest.mark.parametrize("seed", [None, 7])
async def test_a_form_and_several_choices_go_on_elsewhere(seed: int | None) -> None:
    breaks = [5, 4, 6]
    engines = [BreaksOff(LlamaEngine([smollm2()], SETTINGS), breaks) for _ in range(2)]
    request = GenerationRequest(
        model="",
        prompt=TextPrompt("A pet as JSON: "),
        choice_count=2,
        sampling=Sampling(temperature=1.2, repetition_penalty=1.1, seed=seed),
        stop=StopConditions(max_tokens=60),
        constraint=Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(_SCHEMA)),
    )
    async with asyncio.timeout(240), InProcessMesh(runners=engines) as mesh:
        events = [event async for event in mesh.client(timeout_s=200.0).generate(request)]
    changes = [event for event in events if isinstance(event, AttemptChanged)]
    assert [change.reason for change in changes] == ["DRAINING"] * 3
    assert breaks == []
    (started,) = (event for event in events if isinstance(event, StartedAt))
    assert seed is None or started.started.seed == seed
    check_documents(events)


def check_whole(events: list[ClientEvent]) -> Finished:
    """Every token once, in order, and counted."""
    finished = events[-1]
    assert isinstance(finished, Finished)
    for outcome in finished.choices:
        deltas = [event for event in events if isinstance(event, TokenDelta) and event.choice == outcome.choice]
        indexes = [delta.index + offset for delta in deltas for offset in range(len(delta.token_ids))]
        assert indexes == list(range(outcome.token_count))
    assert finished.usage.completion_tokens == sum(outcome.token_count for outcome in finished.choices)
    return finished


def check_documents(events: list[ClientEvent]) -> None:
    """The same, and each choice keeps to the schema."""
    for outcome in check_whole(events).choices:
        choice = outcome.choice
        text = "".join(event.text for event in events if isinstance(event, TokenDelta) and event.choice == choice)
        if outcome.reason is FinishReason.END:
            document = json.loads(text)
            assert document["kind"] in ("cat", "dog")
            assert document["age"] in range(31)
            assert document.keys() == {"kind", "age", "name"}
        else:
            assert outcome.reason is FinishReason.LENGTH
            assert text.startswith("{")


async def without_its_coordinator(mesh: InProcessMesh, request: GenerationRequest, after: int) -> list[ClientEvent]:
    """The events of an answer whose coordinator is killed after so many tokens."""
    events: list[ClientEvent] = []
    tokens = 0
    async with mesh.client(timeout_s=200.0).generate(request) as generation:
        async for event in generation:
            events.append(event)
            tokens += len(event.token_ids) if isinstance(event, TokenDelta) else 0
            if tokens >= after:
                (index,) = (index for index, one in enumerate(mesh.coordinators) if one._admission.running)
                await mesh.kill_coordinator(index)
                break
        events += [event async for event in generation]
    assert [event.reason for event in events if isinstance(event, AttemptChanged)] == ["UNAVAILABLE"]
    return events


async def test_a_form_and_tool_calls_outlive_their_coordinators() -> None:
    # The model is shown its first message alone: calls, which it goes on with.
    template = "{% if tools %}{# <tool_call> #}{% endif %}{{ messages[0].content }}"
    engine = LlamaEngine([smollm2(chat_template=template)], SETTINGS)
    cities = ("Bern", "Rome", "Oslo", "Bonn")
    said = "".join(
        f'<tool_call>{{"name": "weather", "arguments": {{"city": "{city}"}}}}</tool_call>\n' for city in cities
    )
    form = GenerationRequest(
        model="",
        prompt=TextPrompt("A pet as JSON: "),
        sampling=Sampling(temperature=1.2, seed=7),
        stop=StopConditions(max_tokens=60),
        constraint=Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(_SCHEMA)),
    )
    calls = GenerationRequest(
        model="",
        prompt=Conversation((Message(MessageRole.USER, (TextPart(said),)),)),
        tools=(Tool("weather", "", {"type": "object"}),),
        sampling=Sampling(temperature=0.0),
        stop=StopConditions(max_tokens=48),
    )
    async with asyncio.timeout(240), InProcessMesh(runners=[engine], coordinators=3) as mesh:
        check_documents(await without_its_coordinator(mesh, form, 6))
        events = await without_its_coordinator(mesh, calls, 1)
    check_whole(events)
    deltas = [event for event in events if isinstance(event, TokenDelta)]
    called = [delta.tool_call for delta in deltas if delta.tool_call is not None]
    assert called
    assert all(call.name == "weather" and isinstance(json.loads(call.arguments_json), dict) for call in called)
    assert "</tool_call>" not in "".join(delta.text for delta in deltas)
