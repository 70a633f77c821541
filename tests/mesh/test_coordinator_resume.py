"""Streams that break off and go on at another runner, over real TLS: no token lost, none doubled, nobody the wiser."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.api.runner.v1 import runner_pb2
from chorus.client import AttemptChanged, ClientEvent, Generation, StartedAt
from chorus.core.errors import (
    ChorusError,
    EngineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import Feature, RunnerState
from chorus.core.generation import (
    DeliveredChoice,
    Finished,
    FinishReason,
    GenerationRequest,
    Requirements,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.runner.service import RunnerService
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FAKE_FEATURES, FakeEngine, FakeModel, fake_artifact
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from tests.mesh.scripted_runner import ScriptedRunner

LASTING = {"lease_ttl_s": 600.0}


def mesh_of(certificates: MeshCertificates, *engines: FakeEngine, **coordinator: object) -> InProcessMesh:
    return InProcessMesh(runners=engines, certificates=certificates, coordinator=coordinator)


def raw(text: str = "tell me", **fields: object) -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(text), **fields)  # type: ignore[arg-type]


def on(index: int) -> Requirements:
    return Requirements(runner_ids=(f"runner-{index}",))


def ids(events: list[ClientEvent], choice: int = 0) -> list[int]:
    return [
        token
        for event in events
        if isinstance(event, TokenDelta) and event.choice == choice
        for token in event.token_ids
    ]


def text(events: list[ClientEvent], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenDelta) and event.choice == choice)


def changes(events: list[ClientEvent]) -> list[AttemptChanged]:
    return [event for event in events if isinstance(event, AttemptChanged)]


async def heard(request: GenerationRequest, mesh: InProcessMesh) -> list[ClientEvent]:
    return [event async for event in mesh.client().generate(request)]


async def undisturbed(certificates: MeshCertificates, request: GenerationRequest) -> list[ClientEvent]:
    """What one runner answers when nothing goes wrong."""
    async with mesh_of(certificates, FakeEngine()) as mesh:
        return await heard(request, mesh)


async def until_token(generation: Generation, count: int) -> list[ClientEvent]:
    """The events up to and including the delta of that number."""
    events: list[ClientEvent] = []
    while sum(isinstance(event, TokenDelta) for event in events) < count:
        events.append(await anext(generation))
    return events


def check_contract(events: list[ClientEvent]) -> None:
    """Started once, each choice's indexes without gap and repeat, Finished last and with the whole."""
    assert sum(isinstance(event, StartedAt) for event in events) == 1
    assert isinstance(events[-1], Finished)
    counts: dict[int, int] = {}
    for event in events:
        if isinstance(event, TokenDelta):
            assert event.index == counts.get(event.choice, 0)
            counts[event.choice] = event.index + len(event.token_ids)
    finished = events[-1]
    assert {outcome.choice: outcome.token_count for outcome in finished.choices} == counts
    assert finished.usage.completion_tokens == sum(counts.values())


# --- the same answer ------------------------------------------------------------------------------------------------

ASKED = {
    "plain": raw(),
    "several choices": raw(choice_count=3),
    "half characters": raw("echo:grüße 👍 an alle"),
    "a withheld stop string": raw("echo:one two STOP three", stop=StopConditions(strings=("STOP",))),
    "a limit": raw(stop=StopConditions(max_tokens=17)),
    "scores": raw(logprobs=2, prompt_logprobs=1),
    "a seed": raw(sampling=Sampling(seed=2**64 - 1)),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("before", [1, 4, 11])
async def test_the_answer_is_that_of_an_undisturbed_runner(
    certificates: MeshCertificates, asked: GenerationRequest, before: int
) -> None:
    expected = await undisturbed(certificates, asked)
    engines = FakeEngine(), FakeEngine()
    async with mesh_of(certificates, *engines) as mesh:
        engines[0].faults = engines[1].faults  # whoever is asked first
        engines[0].fail_next(before=before)
        events = await heard(asked, mesh)
    check_contract(events)
    (changed,) = changes(events)
    assert (changed.attempt, changed.reason, changed.from_text) == (2, "ENGINE_FAILED", False)
    assert changed.gap_s >= 0.0
    assert [event for event in events if not isinstance(event, AttemptChanged | StartedAt | Finished)] == [
        event for event in expected if not isinstance(event, StartedAt | Finished)
    ]
    finished, whole = events[-1], expected[-1]
    assert isinstance(finished, Finished)
    assert isinstance(whole, Finished)
    assert (finished.choices, finished.usage) == (whole.choices, whole.usage)


async def test_timings_are_those_of_the_whole(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engines = FakeEngine(pace=pace), FakeEngine(pace=pace)
    async with mesh_of(certificates, *engines) as mesh:
        loop = asyncio.get_running_loop()
        async with mesh.client().generate(raw(stop=StopConditions(max_tokens=4))) as generation:
            pace.release(2)
            events = await until_token(generation, 2)
            seen_at = loop.time()
            await begun_on(mesh, events).stop(0.0)
            pace.release_all()
            events += [event async for event in generation]
            ended_at = loop.time()
        check_contract(events)
        finished = events[-1]
        assert isinstance(finished, Finished)
        (changed,) = changes(events)
        assert finished.timings.decode_s >= changed.gap_s > 0.0
        assert changed.gap_s <= ended_at - seen_at + finished.timings.decode_s
        assert finished.timings.tokens_per_second == pytest.approx(3 / finished.timings.decode_s)


def begun_on(mesh: InProcessMesh, events: list[ClientEvent]) -> RunnerService:
    """The runner that answers."""
    started = next(event for event in events if isinstance(event, StartedAt))
    return next(runner for runner in mesh.runners if runner.presence.runner_id == started.origin.runner_id)


# --- how a runner is lost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["drained", "killed", "unloaded", "stuck"])
async def test_a_runner_is_lost_in_the_middle(certificates: MeshCertificates, how: str) -> None:
    expected = await undisturbed(certificates, raw())
    paces = ManualPace(), ManualPace()
    engines = tuple(FakeEngine(pace=pace) for pace in paces)
    async with mesh_of(certificates, *engines) as mesh, mesh.client().generate(raw()) as generation:
        for pace in paces:
            pace.release(10)
        events = await until_token(generation, 10)
        first = begun_on(mesh, events)
        index = mesh.runners.index(first)
        paces[1 - index].release_all()
        if how == "drained":
            await first.stop(0.0)
        elif how == "killed":
            await mesh.kill_runner(index)
        elif how == "unloaded":
            await engines[index].unload("fake-1b")
        # else its pace stands still, while its process answers: it is stuck
        events += [event async for event in generation]
        paces[index].release_all()  # what it still had to say is nobody's
    check_contract(events)
    assert ids(events) == ids(expected)
    assert text(events) == text(expected)
    (changed,) = changes(events)
    assert changed.runner_id == f"runner-{2 - index}"
    reasons = {"drained": {"DRAINING"}, "unloaded": {"DRAINING"}, "killed": {"UNAVAILABLE", "CANCELLED"}}
    assert changed.reason in reasons.get(how, {"UNAVAILABLE"})


async def test_a_stream_outlives_many_runners(certificates: MeshCertificates) -> None:
    asked = raw()
    expected = await undisturbed(certificates, asked)
    engines = [FakeEngine() for _ in range(3)]
    shared = engines[0].faults
    async with mesh_of(certificates, *engines) as mesh:
        for engine in engines:
            engine.faults = shared
        for before in range(2, 14, 2):
            engines[0].fail_next(before=before)
        events = await heard(asked, mesh)
    check_contract(events)
    assert ids(events) == ids(expected)
    assert [change.attempt for change in changes(events)] == list(range(2, 8))


async def test_an_end_that_was_delivered_but_not_told_is_told(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    pace = ManualPace()
    for engine in engines:
        engine.pace = pace
    asked = raw("echo:abc", choice_count=2, stop=StopConditions(max_tokens=3))
    async with mesh_of(certificates, *engines) as mesh, mesh.client().generate(asked) as generation:
        pace.release(5)
        events = await until_token(generation, 5)  # the first choice has ended, the other lacks its last token
        await begun_on(mesh, events).stop(0.0)
        pace.release_all()
        events += [event async for event in generation]
    check_contract(events)
    assert (text(events, 0), text(events, 1)) == ("abc", "abc")
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert {outcome.reason for outcome in finished.choices} == {FinishReason.LENGTH}


# --- what the next runner is asked ----------------------------------------------------------------------------------


async def test_only_the_very_same_artifact_goes_on(certificates: MeshCertificates) -> None:
    other = FakeModel(fake_artifact("fake-1b.Q4_0.gguf"))  # the same family
    engines = FakeEngine(), FakeEngine([other]), FakeEngine()
    async with mesh_of(certificates, *engines) as mesh:
        for engine in (engines[0], engines[2]):
            engine.fail_next(before=3)
        events = await heard(replace(raw(), model=fake_artifact().name), mesh)
        check_contract(events)
        assert {change.runner_id for change in changes(events)} <= {"runner-1", "runner-3"}
        named = await heard(replace(raw(), model="fake-1b", requirements=on(2)), mesh)
        assert not changes(named)


class Script:
    """A runner's answers, one after another; the times left to each attempt are kept, in seconds."""

    def __init__(self, *answers: list[pb.GenerationEvent]) -> None:
        self._answers = list(answers)
        self.left_s: list[float] = []

    async def __call__(self, _request: runner_pb2.GenerateRequest, context: Any) -> None:
        self.left_s.append(context.time_remaining())
        for event in self._answers.pop(0):
            await context.write(runner_pb2.GenerateResponse(event=event).SerializeToString())


def started(seed: int) -> pb.GenerationEvent:
    return pb.GenerationEvent(started=pb.Started(seed=seed, prompt_token_count=7, cached_token_count=3))


def delta(choice: int, index: int, *token_ids: int) -> pb.GenerationEvent:
    return pb.GenerationEvent(delta=pb.TokenDelta(choice=choice, index=index, token_ids=token_ids))


def finished(*counts: int, prompt_tokens: int = 7) -> pb.GenerationEvent:
    outcomes = [pb.ChoiceOutcome(choice=choice, token_count=count) for choice, count in enumerate(counts)]
    usage = pb.Usage(prompt_token_count=prompt_tokens, cached_token_count=5, completion_token_count=sum(counts))
    return pb.GenerationEvent(finished=pb.Finished(choices=outcomes, usage=usage))


async def test_the_next_is_asked_for_the_rest_of_the_same(certificates: MeshCertificates) -> None:
    script = Script(
        [started(77), delta(1, 0, 11, 12), delta(0, 0, 1)],
        [started(5), delta(0, 1, 2)],  # another seed than it was asked for: not told to anybody
        [started(77), delta(2, 0, 21), delta(0, 2, 3), finished(3, 2, 1)],
    )
    runners = [ScriptedRunner(script) for _ in range(3)]
    mesh = InProcessMesh(runners=0, certificates=certificates, registry={**LASTING, "heartbeat_interval_s": 1})
    async with mesh:
        for number, runner in enumerate(runners):
            await runner.join(mesh, f"scripted-{number}")
        events = await heard(raw(choice_count=3, prompt_logprobs=0, logprobs=0), mesh)
        for runner in runners:
            await runner.leave()
    check_contract(events)
    assert (ids(events, 0), ids(events, 1), ids(events, 2)) == ([1, 2, 3], [11, 12], [21])
    asked = sorted((request for runner in runners for request in runner.requests), key=lambda request: request.attempt)
    assert [request.attempt for request in asked] == [1, 2, 3]
    first, *others = asked
    assert not first.spec.HasField("resume")
    assert not first.spec.sampling.HasField("seed")
    for request in others:
        assert request.spec.sampling.seed == 77
        assert request.spec.requirements.artifact_sha256 == fake_artifact().sha256
        assert (request.spec.prompt, request.spec.choice_count, request.spec.logprobs) == ("tell me", 3, 0)
        assert not request.spec.HasField("prompt_logprobs")
    had = [{choice.choice: list(choice.token_ids) for choice in request.spec.resume.choices} for request in others]
    assert had == [{0: [1], 1: [11, 12]}, {0: [1, 2], 1: [11, 12]}]
    assert all(0.0 < left_s < 30.0 for left_s in script.left_s)  # what the client gave, less what has passed
    told = [event for event in events if isinstance(event, StartedAt)]
    assert [event.started.seed for event in told] == [77]
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.usage.prompt_tokens, last.usage.cached_tokens, last.usage.completion_tokens) == (7, 3, 6)


async def test_an_end_that_leaves_tokens_out_is_no_end(certificates: MeshCertificates) -> None:
    script = Script([started(1), delta(0, 0, 1), finished(2)], [started(1), delta(0, 1, 2), finished(2)])
    runners = [ScriptedRunner(script) for _ in range(2)]
    mesh = InProcessMesh(runners=0, certificates=certificates, registry={**LASTING, "heartbeat_interval_s": 1})
    async with mesh:
        for number, runner in enumerate(runners):
            await runner.join(mesh, f"scripted-{number}")
        events = await heard(raw(), mesh)
        for runner in runners:
            await runner.leave()
    check_contract(events)
    assert ids(events) == [1, 2]
    assert [change.reason for change in changes(events)] == ["ENGINE_FAILED"]


async def test_a_caller_who_had_some_of_it_elsewhere_is_carried_on_as_well(certificates: MeshCertificates) -> None:
    expected = ids(await undisturbed(certificates, raw()))
    engines = FakeEngine(), FakeEngine()
    async with mesh_of(certificates, *engines) as mesh:
        engines[0].faults = engines[1].faults
        engines[0].fail_next(before=20)
        events = await heard(raw(resume=(DeliveredChoice(0, tuple(expected[:15])),)), mesh)
    deltas = [event for event in events if isinstance(event, TokenDelta)]
    assert [delta.index for delta in deltas] == list(range(15, len(expected)))
    assert ids(events) == expected[15:]
    assert len(changes(events)) == 1
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.usage.completion_tokens == len(expected)


# --- ends -----------------------------------------------------------------------------------------------------------


async def failure(mesh: InProcessMesh, request: GenerationRequest) -> tuple[list[ClientEvent], ChorusError]:
    events: list[ClientEvent] = []
    try:
        async for event in mesh.client().generate(request):
            events.append(event)  # noqa: PERF401 - what came before the error counts
    except ChorusError as error:
        return events, error
    raise AssertionError("it succeeded")


@pytest.mark.parametrize("error", [InvalidRequestError("grammar", "does not fit"), InternalError("a defect")])
async def test_the_requests_own_fault_moves_nowhere(certificates: MeshCertificates, error: ChorusError) -> None:
    engines = FakeEngine(), FakeEngine()
    async with mesh_of(certificates, *engines) as mesh:
        for engine in engines:
            engine.fail_next(before=3, error=error)
        events, told = await failure(mesh, raw())
    assert type(told) is type(error)
    assert (told.metadata["delivered_tokens"], told.metadata["attempts"]) == ("3", "1")
    assert not changes(events)


async def test_attempts_that_bring_nothing_are_bounded(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    async with mesh_of(certificates, *engines, max_attempts=2) as mesh:
        engines[0].faults = engines[1].faults
        engines[0].fail_next(before=3, times=50)
        events, told = await failure(mesh, raw())
        assert len(engines[0].faults) == 47
    assert isinstance(told, UnavailableError)
    assert "broke off after 3 tokens" in told.message
    assert (told.metadata["delivered_tokens"], told.metadata["cause"]) == ("3", EngineError.reason)
    assert len(ids(events)) == 3


async def test_nobody_to_go_on_is_waited_for_and_then_told(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    mesh = mesh_of(certificates, FakeEngine(pace=pace), resume_wait_s=0.5)
    async with mesh, mesh.client().generate(raw()) as generation:
        pace.release(5)
        await until_token(generation, 5)
        await mesh.kill_runner()
        with pytest.raises(UnavailableError, match=r"nobody could go on with it within 0.5 s") as caught:
            await collect(generation)
    assert caught.value.metadata["delivered_tokens"] == "5"
    assert caught.value.metadata["runner_id"] == "runner-1"


async def test_the_wait_ends_as_soon_as_somebody_comes(certificates: MeshCertificates) -> None:
    expected = await undisturbed(certificates, raw())
    pace = ManualPace()
    mesh = mesh_of(certificates, FakeEngine(pace=pace), resume_wait_s=600)
    async with mesh, mesh.client().generate(raw()) as generation:
        pace.release(5)
        events = await until_token(generation, 5)
        rest = asyncio.create_task(collect(generation))
        await mesh.kill_runner()
        await mesh.until(lambda directory: not is_usable(directory, "runner-1"))
        assert not rest.done()
        await mesh.add_runner()
        events += await rest
    check_contract(events)
    assert ids(events) == ids(expected)
    assert [change.runner_id for change in changes(events)] == ["runner-2"]


async def collect(generation: Generation) -> list[ClientEvent]:
    return [event async for event in generation]


def is_usable(directory: Directory, runner_id: str) -> bool:
    entry = directory.get(runner_id)
    return entry is not None and entry.reachable and entry.record.state is RunnerState.READY


async def test_the_only_runner_goes_on_itself_when_it_can(certificates: MeshCertificates) -> None:
    expected = await undisturbed(certificates, raw())
    engine = FakeEngine()
    async with mesh_of(certificates, engine) as mesh:
        engine.fail_next(before=6)  # as where an engine's thread died, and another took its place
        engine.faults += [replace(engine.faults[0], before=None, error=OverloadedError("full", retry_after_s=0.1))]
        events = await heard(raw(), mesh)
    check_contract(events)
    assert ids(events) == ids(expected)
    assert [(change.attempt, change.reason) for change in changes(events)] == [(3, "OVERLOADED")]


async def test_a_caller_who_goes_away_while_it_waits_is_gone(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace), resume_wait_s=600, max_requests=1) as mesh:
        async with mesh.client().generate(raw()) as generation:
            pace.release(5)
            await until_token(generation, 5)
            await mesh.kill_runner()
        await mesh.add_runner()
        await mesh.until(lambda directory: is_usable(directory, "runner-2"))
        assert (await mesh.client().complete(raw("echo:free"))).text == "free"


# --- engines without token ids --------------------------------------------------------------------------------------

_TEXT_ONLY = FakeModel(features=FAKE_FEATURES - {Feature.TOKEN_IDS, Feature.RESUME})


async def test_text_without_ids_breaks_off_with_its_reason(certificates: MeshCertificates) -> None:
    engines = FakeEngine([_TEXT_ONLY]), FakeEngine([_TEXT_ONLY])
    async with mesh_of(certificates, *engines) as mesh:
        engines[0].faults = engines[1].faults
        engines[0].fail_next(before=3)
        events, told = await failure(mesh, raw("echo:abcdef"))
    assert text(events) == "abc"
    assert isinstance(told, UnavailableError)
    assert "without token ids" in told.message
    assert (told.metadata["delivered_tokens"], told.metadata["attempts"]) == ("3", "1")


async def test_text_goes_on_from_text_where_the_caller_allows_it(certificates: MeshCertificates) -> None:
    engines = FakeEngine([_TEXT_ONLY]), FakeEngine([_TEXT_ONLY])
    async with mesh_of(certificates, *engines) as mesh:
        engines[0].faults = engines[1].faults
        engines[0].fail_next(before=3)
        events = await heard(raw("echo:abcdef", allow_text_resume=True), mesh)
    assert text(events) == "abcdef"
    (changed,) = changes(events)
    assert changed.from_text
    deltas = [event for event in events if isinstance(event, TokenDelta)]
    assert [delta.index for delta in deltas] == list(range(len(deltas)))
