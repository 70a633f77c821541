"""A real model's answers that break off on one runner and go on at another: still whole in form and count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from chorus.client import AttemptChanged, StartedAt
from chorus.core.errors import DrainingError
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenDelta,
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
    finished = events[-1]
    assert isinstance(finished, Finished)
    for outcome in finished.choices:
        deltas = [event for event in events if isinstance(event, TokenDelta) and event.choice == outcome.choice]
        assert [delta.index for delta in deltas] == list(range(outcome.token_count))
        text = "".join(delta.text for delta in deltas)
        if outcome.reason is FinishReason.END:
            document = json.loads(text)
            assert document["kind"] in ("cat", "dog")
            assert document["age"] in range(31)
            assert document.keys() == {"kind", "age", "name"}
        else:
            assert outcome.reason is FinishReason.LENGTH
            assert text.startswith("{")
    assert finished.usage.completion_tokens == sum(outcome.token_count for outcome in finished.choices)
