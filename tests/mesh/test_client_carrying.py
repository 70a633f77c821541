"""A client's generation over attempts that break off anywhere, against a model of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.client import AttemptChanged, ClientEvent, StartedAt
from chorus.client.carrying import Carrying
from chorus.core.errors import EngineError, UnavailableError
from chorus.core.generation import Finished, GenerationRequest, Sampling, TextPrompt, TokenDelta
from chorus.wire.generation import encode_generation
from tests.mesh.breaking_attempts import PROMPT_TOKENS, Behaviour, behaviours, engine, token


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def carrying_of(request: GenerationRequest) -> Carrying:
    return Carrying(coordinator_pb2.GenerateRequest(spec=encode_generation(request), attempt=1), request, Clock())


async def carried(lengths: list[int], script: list[Behaviour]) -> tuple[list[ClientEvent], list[pb.GenerationSpec]]:
    """Attempts as the script says, then one that does everything right; the events, and what each was asked."""
    carrying = carrying_of(GenerationRequest("", TextPrompt("hi"), choice_count=len(lengths), prompt_logprobs=0))
    events: list[ClientEvent] = []
    specs: list[pb.GenerationSpec] = []
    for number, planned in enumerate([*script, Behaviour(step=1, breaks_after=10_000)], start=1):
        behaviour = planned
        if not carrying.begun:  # before a token nobody but a coordinator can know that there should have been one
            behaviour = replace(planned, skips=False, ends_early=False)
        asked = carrying.attempt(f"c{number}")
        assert asked.attempt == number
        specs.append(pb.GenerationSpec.FromString(asked.spec.SerializeToString()))
        try:
            async for raw in engine(asked, lengths, behaviour):
                events += carrying.take(coordinator_pb2.GenerateResponse.FromString(raw).event)
                if carrying.finished:
                    return events, specs
        except (UnavailableError, EngineError) as error:
            carrying.broken(error.reason)
    raise AssertionError("the last attempt does everything right")


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 7), min_size=1, max_size=3), st.lists(behaviours, max_size=6))
def test_whatever_happens_the_caller_gets_the_answer_once(lengths: list[int], script: list[Behaviour]) -> None:
    events, specs = asyncio.run(carried(lengths, script))
    assert sum(isinstance(event, StartedAt) for event in events) == 1
    finished = events[-1]
    assert isinstance(finished, Finished)
    counts = Counter[int]()
    for event in events:
        if isinstance(event, TokenDelta):
            assert event.index == counts[event.choice]
            assert event.token_ids == tuple(token(event.choice, event.index + i) for i in range(len(event.token_ids)))
            counts[event.choice] += len(event.token_ids)
    assert [counts[choice] for choice in range(len(lengths))] == lengths
    assert [outcome.token_count for outcome in finished.choices] == lengths
    assert (finished.usage.completion_tokens, finished.usage.prompt_tokens) == (sum(lengths), PROMPT_TOKENS)
    changes = [event for event in events if isinstance(event, AttemptChanged)]
    for change in changes:
        assert change.coordinator == f"c{change.attempt}"
        assert change.gap_s > 0.0
    assert [change.attempt for change in changes] == sorted({change.attempt for change in changes})
    # Once something was delivered, every attempt is asked for the rest of the same.
    for spec in specs:
        if spec.HasField("resume"):
            assert spec.sampling.seed == 5
            assert not spec.HasField("prompt_logprobs")


def delta(index: int, *token_ids: int, **fields: object) -> pb.GenerationEvent:
    return pb.GenerationEvent(delta=pb.TokenDelta(index=index, token_ids=token_ids, **fields))  # type: ignore[arg-type]


def started(**fields: object) -> pb.GenerationEvent:
    return pb.GenerationEvent(started=pb.Started(seed=9, artifact="a.gguf", **fields))  # type: ignore[arg-type]


def tool_call(name: str) -> pb.GenerationEvent:
    event = delta(2, text="")
    event.delta.tool_call.name = name
    return event


def test_tool_calls_beside_the_tokens_are_told_once() -> None:
    carrying = carrying_of(GenerationRequest("m", TextPrompt("hi")))
    carrying.attempt("c1")
    first = delta(1, 12)
    first.delta.tool_call.name = "one"
    for event in (started(), delta(0, 11), first, tool_call("two")):
        carrying.take(event)
    carrying.broken("UNAVAILABLE")
    asked = carrying.attempt("c2")
    assert [list(choice.token_ids) for choice in asked.spec.resume.choices] == [[11, 12]]
    told = [event for message in (started(attempt=2), delta(2, 13)) for event in carrying.take(message)]
    assert [type(event) for event in told] == [AttemptChanged, TokenDelta]


@pytest.mark.parametrize(("sha256", "model"), [("", "a.gguf"), ("ab" * 32, "")])
def test_the_rest_is_asked_of_the_very_same_artifact(sha256: str, model: str) -> None:
    carrying = carrying_of(GenerationRequest("family", TextPrompt("hi"), sampling=Sampling(seed=3)))
    assert carrying.attempt("c1").spec.model == "family"
    for event in (started(artifact_sha256=sha256), delta(0, 11)):
        carrying.take(event)
    carrying.broken("UNAVAILABLE")
    asked = carrying.attempt("c2")
    assert (asked.spec.model, asked.spec.requirements.artifact_sha256) == (model, sha256)
    assert (asked.spec.sampling.seed, asked.attempt) == (3, 2)
    assert asked.fallback.external  # who named it for the beginning allows it for the rest


def test_an_end_without_the_tokens_it_counts_is_no_end() -> None:
    carrying = carrying_of(GenerationRequest("", TextPrompt("hi")))
    carrying.attempt("c1")
    for event in (started(), delta(0, 11)):
        carrying.take(event)
    outcomes = [pb.ChoiceOutcome(token_count=2)]
    with pytest.raises(EngineError, match="has 2 tokens, and 1 came"):
        carrying.take(pb.GenerationEvent(finished=pb.Finished(choices=outcomes)))


def test_an_event_of_a_newer_coordinator_is_left_out() -> None:
    carrying = carrying_of(GenerationRequest("", TextPrompt("hi")))
    carrying.attempt("c1")
    assert carrying.take(pb.GenerationEvent()) == []
