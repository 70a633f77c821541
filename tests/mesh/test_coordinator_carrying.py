"""One generation over attempts that break off anywhere, against a model of it: what the caller gets in the end."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.api.runner.v1 import runner_pb2
from chorus.coordinator.carrying import Carrying
from chorus.coordinator.events import EventBoard
from chorus.coordinator.relay import relay
from chorus.core.costs import Tab
from chorus.core.errors import EngineError, UnavailableError
from chorus.core.events import EventLog
from chorus.core.fleet.directory import DirectoryEntry
from chorus.core.fleet.records import Cpu, Load, Node, Runner, RunnerRecord, RunnerState
from chorus.core.generation import Fallback, GenerationRequest, TextPrompt
from chorus.core.placement import Candidate, FallingBack, Needs
from chorus.core.resilience.stream_silence import StreamPatience, StreamWatch
from chorus.telemetry.metrics import GenerationMetrics, StreamTimer
from chorus.testing.engine_fake import FakeEngine
from chorus.wire.generation import encode_generation
from tests.mesh.breaking_attempts import PROMPT_TOKENS, Behaviour, behaviours, engine, token


def candidate(number: int) -> Candidate:
    runner = Runner(f"r{number}", 1, "n", "127.0.0.1:1", "r", "1", (), FakeEngine().models())
    record = RunnerRecord(runner, Node("n", "n", "Linux", Cpu("c", 1, 1), 1, 1), RunnerState.READY, Load(), 1)
    return Candidate(DirectoryEntry(record, 0.0), runner.models[0], 0.0, {})  # type: ignore[arg-type]


class Caller:
    """What a caller gets, and the clock of it all: a second a message."""

    def __init__(self) -> None:
        self.events: list[pb.GenerationEvent] = []
        self.now = 0.0

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    async def write(self, raw: bytes) -> None:
        self.events.append(runner_pb2.GenerateResponse.FromString(raw).event)

    def kinds(self) -> list[str]:
        return [str(event.WhichOneof("event")) for event in self.events]

    def deltas(self, choice: int) -> list[pb.TokenDelta]:
        return [event.delta for event in self.events if event.HasField("delta") and event.delta.choice == choice]


def carrying_of(request: GenerationRequest, needs: Needs, caller: Caller) -> Carrying:
    return Carrying(
        encode_generation(request),
        request,
        needs=needs,
        falling_back=FallingBack(Fallback(), request),
        first_attempt=1,
        arrived=caller.clock(),
        clock=caller.clock,
        time_left=lambda: None,
        events=EventBoard(EventLog(1), clock=caller.clock, wall=caller.clock),
        tab=Tab(),
    )


async def carried(lengths: list[int], script: list[Behaviour]) -> tuple[Caller, Carrying]:
    """Attempts as the script says, then one that does everything right."""
    caller = Caller()
    request = GenerationRequest("", TextPrompt("hi"), choice_count=len(lengths))
    carrying = carrying_of(request, Needs.of_generation(request), caller)
    timer = StreamTimer(GenerationMetrics(CollectorRegistry()).model("m"), 0.0)
    for number, behaviour in enumerate([*script, Behaviour(step=1, breaks_after=10_000)], start=1):
        asked = carrying.attempt(candidate(number), number)
        assert asked.attempt == number
        try:
            await relay(
                engine(asked, lengths, behaviour),
                caller.write,
                carrying.delivered,
                carrying,
                runner_id=f"r{number}",
                timer=timer,
                clock=caller.clock,
                watch=StreamWatch(StreamPatience(), 0.0),
            )
        except (UnavailableError, EngineError) as error:
            if carrying.begun:
                needs = carrying.broken(error.reason)
                assert needs.artifact_sha256 == candidate(1).model.artifact.sha256
        else:
            return caller, carrying
    raise AssertionError("the last attempt does everything right")


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 7), min_size=1, max_size=3), st.lists(behaviours, max_size=6))
def test_whatever_happens_the_caller_gets_the_answer_once(lengths: list[int], script: list[Behaviour]) -> None:
    caller, carrying = asyncio.run(carried(lengths, script))
    kinds = caller.kinds()
    assert kinds.count("started") == kinds.count("finished") == 1
    assert kinds[-1] == "finished"
    others = [kind for kind in kinds if kind != "progress"]
    assert others[0] == "started"
    for choice, length in enumerate(lengths):
        deltas = caller.deltas(choice)
        indexes = [delta.index for delta in deltas]
        assert indexes == [sum(len(earlier.token_ids) for earlier in deltas[:place]) for place in range(len(deltas))]
        ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert ids == [token(choice, index) for index in range(length)]
        assert "".join(delta.text for delta in deltas) == "".join(f"{token_id} " for token_id in ids)
    finished = caller.events[-1].finished
    assert [outcome.token_count for outcome in finished.choices] == lengths
    assert finished.usage.completion_token_count == sum(lengths) == carrying.tokens
    assert finished.usage.prompt_token_count == PROMPT_TOKENS
    changes = [event.attempt_changed for event in caller.events if event.HasField("attempt_changed")]
    attempts = [changed.attempt for changed in changes]
    assert attempts == sorted(set(attempts))
    for changed in changes:
        assert changed.runner_id == f"r{changed.attempt}"
        assert changed.reason in ("UNAVAILABLE", "ENGINE_FAILED")
        assert changed.gap.ToNanoseconds() > 0
    # Each is told of when it brings something, and not before.
    for place, kind in enumerate(others[:-1]):
        if kind == "attempt_changed":
            assert others[place + 1] in ("delta", "finished")


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 6), st.integers(1, 6))
def test_timings_and_usage_are_those_of_the_whole(first: int, rest: int) -> None:
    lengths = [first + rest]
    whole, _ = asyncio.run(carried(lengths, []))
    behaviour = Behaviour(step=1, breaks_after=2 + first)
    broken, carrying = asyncio.run(carried(lengths, [behaviour]))
    told = broken.events[-1].finished
    assert told.usage == whole.events[-1].finished.usage
    delivered = carrying.delivered
    assert delivered.first_at is not None
    assert delivered.last_at is not None
    assert told.timings.time_to_first_token.ToNanoseconds() / 1e9 < delivered.first_at
    decode_s = told.timings.decode.ToNanoseconds() / 1e9
    assert decode_s == round(delivered.last_at - delivered.first_at, 9)
    assert told.timings.tokens_per_second > 0.0
    # An answer that nobody interrupted is passed on as its runner told it.
    assert not whole.events[-1].finished.timings.HasField("decode")


@pytest.mark.parametrize(
    ("model", "chosen_by_us", "allowed"), [("", False, False), ("m", False, True), ("m", True, False)]
)
def test_a_paid_provider_goes_on_only_where_it_might_have_begun(model: str, chosen_by_us: bool, allowed: bool) -> None:
    """A server that tells no digest is gone on from by its model's name, which is then nobody's word for paying."""
    request, at_home = GenerationRequest(model, TextPrompt("hi"), allow_text_resume=True), candidate(1)
    status = replace(at_home.model, artifact=replace(at_home.model.artifact, sha256=""))
    needs = Needs.of_generation(request)
    carrying = carrying_of(request, replace(needs, allow_external=False) if chosen_by_us else needs, Caller())
    carrying.attempt(replace(at_home, model=status), 1)
    carrying.delivered.take(0, 0, (), "once", now=0.0)
    assert carrying.begun
    going_on = carrying.broken("UNAVAILABLE")
    assert going_on.model == status.artifact.name
    assert going_on.allow_external is allowed
