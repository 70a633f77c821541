"""A second attempt beside one that is late: who answers, what the caller is told, and what becomes of the loser."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from chorus.api.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from chorus.api.inference.v1 import content_pb2, generation_pb2
from chorus.core.errors import EngineError, OverloadedError
from chorus.core.events import AttemptHedged, EventKind
from chorus.core.identity import Role
from chorus.core.resilience.hedging import LEAST_SAMPLES
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from chorus.transport import open_channel
from tests.mesh.scripted_runner import ScriptedRunner

PROMPT = "echo:hello there"
GIVEN_S = 10.0


class Hedged:
    """A mesh whose coordinator knows that first tokens of its model come within 50 ms."""

    def __init__(self, mesh: InProcessMesh) -> None:
        self.mesh = mesh
        service = mesh.coordinators[0]
        self.placing: Any = service._placing
        self.hedging: Any = service._hedging
        for _ in range(LEAST_SAMPLES):
            for engine in (runner._engine for runner in mesh.runners):
                self.hedging._times.note(engine.models()[0].artifact.name, len(PROMPT) // 4, 0.01)

    def hedges(self, outcome: str) -> float:
        return (
            self.mesh.coordinator_metrics[0].get_sample_value("chorus_generation_hedges_total", {"outcome": outcome})
            or 0.0
        )

    def attempts(self, outcome: str) -> float:
        return (
            self.mesh.coordinator_metrics[0].get_sample_value("chorus_generation_attempts_total", {"outcome": outcome})
            or 0.0
        )

    def in_flight(self) -> list[int]:
        return [self.placing._in_flight.running(f"runner-{number + 1}") for number in range(len(self.mesh.runners))]

    async def generate(self, **fields: Any) -> list[generation_pb2.GenerationEvent]:
        asked = {"allow_hedging": True, **fields}
        spec = asked.pop("spec", generation_pb2.GenerationSpec(prompt=PROMPT))
        address = self.mesh.coordinators[0].address
        me = self.mesh.certificates.identity(Role.CLIENT, "kim")
        server = self.mesh.certificates.id(Role.COORDINATOR, "coordinator-1")
        async with open_channel(address, identity=me, server=server) as channel:
            call = coordinator_pb2_grpc.CoordinatorStub(channel).Generate(
                coordinator_pb2.GenerateRequest(spec=spec, **asked), timeout=GIVEN_S
            )
            return [response.event async for response in call]


def text(events: list[generation_pb2.GenerationEvent]) -> str:
    return "".join(event.delta.text for event in events)


def started(events: list[generation_pb2.GenerationEvent]) -> generation_pb2.Started:
    (found,) = [event.started for event in events if event.HasField("started")]
    return found


def two(certificates: MeshCertificates, **settings: Any) -> tuple[InProcessMesh, list[FakeEngine], list[ManualPace]]:
    """Two runners whose tokens come when a test says so; the first one is preferred."""
    paces = [ManualPace(), ManualPace()]
    engines = [FakeEngine(pace=pace) for pace in paces]
    coordinator = {"runner_weights": {"runner-2": 0.5}, **settings}
    return InProcessMesh(runners=engines, certificates=certificates, coordinator=coordinator), engines, paces


async def test_the_second_one_answers_where_the_first_is_late(certificates: MeshCertificates) -> None:
    mesh, engines, (_, second) = two(certificates)
    async with mesh:
        hedged = Hedged(mesh)
        engines[0].hang_next()
        answer = asyncio.create_task(hedged.generate())
        await second.waiting(1)
        second.release_all()
        events = await answer
        assert text(events) == "hello there"
        assert started(events).runner_id == "runner-2"
        assert started(events).attempt == 2
        assert [event.WhichOneof("event") for event in events].count("attempt_changed") == 0
        log = mesh.coordinators[0].events.log
        happened = [log.get(number) for number in range(1, log.last + 1)]
        (told,) = [event for event in happened if event.kind is EventKind.ATTEMPT_HEDGED]
        assert isinstance(told.detail, AttemptHedged)
        assert (told.detail.attempt, told.subject.runner_id) == (2, "runner-2")
        assert told.subject.request_id == started(events).request_id
        assert 0 < told.detail.after_s < GIVEN_S
        assert (hedged.hedges("won"), hedged.attempts("OK")) == (1, 1)
        assert hedged.in_flight() == [0, 0]
        await idle(engines[0])
        assert not hedged.placing._failures.penalties(mesh.coordinators[0].live.now)


async def idle(engine: FakeEngine) -> None:
    """Returns once nothing runs at an engine: the loser's slot is free."""
    while any(load.slots_used for load in engine.load_report()):
        changed = asyncio.Event()
        asyncio.get_running_loop().call_soon(changed.set)
        await changed.wait()


async def test_the_first_one_answers_if_its_token_comes_first_and_the_other_is_cancelled(
    certificates: MeshCertificates,
) -> None:
    mesh, engines, (first, second) = two(certificates)
    async with mesh:
        hedged = Hedged(mesh)
        answer = asyncio.create_task(hedged.generate())
        await first.waiting(1)
        await second.waiting(1)
        assert hedged.in_flight() == [1, 1]
        first.release_all()
        events = await answer
        assert text(events) == "hello there"
        assert (started(events).runner_id, started(events).attempt) == ("runner-1", 1)
        assert (hedged.hedges("lost"), hedged.attempts("OK")) == (1, 1)
        assert hedged.in_flight() == [0, 0]
        await idle(engines[1])


@pytest.mark.parametrize("fails", [0, 1])
async def test_where_one_fails_the_other_goes_on(certificates: MeshCertificates, fails: int) -> None:
    mesh, engines, paces = two(certificates)
    async with mesh:
        hedged = Hedged(mesh)
        answer = asyncio.create_task(hedged.generate())
        for pace in paces:
            await pace.waiting(1)
        abort(engines[fails])
        await until_in_flight(hedged, fails)
        paces[1 - fails].release_all()
        events = await answer
        assert text(events) == "hello there"
        assert started(events).runner_id == f"runner-{2 - fails}"
        assert (hedged.attempts("ENGINE_FAILED"), hedged.attempts("OK")) == (1, 1)
        assert hedged.hedges("failed") == fails
        assert list(hedged.placing._failures.penalties(mesh.coordinators[0].live.now)) == [f"runner-{1 + fails}"]


def abort(engine: FakeEngine) -> None:
    """Ends what runs at an engine with an error."""
    for host in engine._hosts.values():
        for run in tuple(host.runs):
            run.abort(EngineError("broke"))


async def until_in_flight(hedged: Hedged, index: int) -> None:
    while hedged.in_flight()[index]:
        changed = asyncio.Event()
        asyncio.get_running_loop().call_soon(changed.set)
        await changed.wait()


async def test_the_winner_may_break_off_and_the_stream_goes_on(certificates: MeshCertificates) -> None:
    """Whatever is blamed and resumed is the winner's, with its seed."""
    mesh, engines, (first, second) = two(certificates)
    async with mesh:
        hedged = Hedged(mesh)
        engines[1].fail_next(before=3)
        answer = asyncio.create_task(hedged.generate())
        await first.waiting(1)
        await second.waiting(1)
        second.release_all()
        await idle(engines[0])
        first.release_all()
        events = await answer
        assert text(events) == "hello there"
        (changed,) = [event.attempt_changed for event in events if event.HasField("attempt_changed")]
        assert (changed.runner_id, changed.reason, changed.attempt) == ("runner-1", "ENGINE_FAILED", 3)
        assert started(events).runner_id == "runner-2"
        assert list(hedged.placing._failures.penalties(mesh.coordinators[0].live.now)) == ["runner-2"]
        assert hedged.in_flight() == [0, 0]


async def test_a_caller_that_goes_away_frees_both(certificates: MeshCertificates) -> None:
    mesh, engines, paces = two(certificates)
    async with mesh:
        hedged = Hedged(mesh)
        answer = asyncio.create_task(hedged.generate())
        for pace in paces:
            await pace.waiting(1)
        answer.cancel()
        for engine in engines:
            await idle(engine)
        await until_in_flight(hedged, 0)
        await until_in_flight(hedged, 1)
        assert hedged.hedges("won") + hedged.hedges("lost") + hedged.hedges("failed") == 0


ACTS = content_pb2.Tool(name="pay", acts=True)
CHAT = content_pb2.Conversation(
    messages=[
        content_pb2.Message(role=content_pb2.MESSAGE_ROLE_USER, parts=[content_pb2.Part(text="echo:hello there")])
    ]
)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"allow_hedging": False}, {}),
        ({}, {"hedging": "never"}),
        ({"spec": generation_pb2.GenerationSpec(conversation=CHAT, tools=[ACTS])}, {"hedging": "always"}),
        ({"spec": generation_pb2.GenerationSpec(prompt=PROMPT, priority=generation_pb2.PRIORITY_BATCH)}, {}),
    ],
    ids=["not allowed", "off", "tools that act", "batch"],
)
async def test_who_is_never_hedged_waits_for_the_first(
    certificates: MeshCertificates, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    mesh, engines, (first, _) = two(certificates, **settings)
    async with mesh:
        hedged = Hedged(mesh)
        for length in range(1, 200):
            hedged.hedging._times.note(engines[0].models()[0].artifact.name, length, 0.0)
        engines[1].fail_next(error=OverloadedError("nobody is to come here"), times=9)
        answer = asyncio.create_task(hedged.generate(**fields))
        await first.waiting(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):  # several times what late is
                await asyncio.shield(answer)
        first.release_all()
        assert text(await answer) == "hello there"
        assert len(engines[1].faults) == 9


async def test_a_spent_budget_hedges_nobody(certificates: MeshCertificates) -> None:
    mesh, engines, (first, _) = two(certificates)
    async with mesh:
        hedged = Hedged(mesh)
        now = mesh.coordinators[0].live.now
        while hedged.placing._budget.spend(now):
            pass
        hedged.placing._budget._floor_per_s = 0.0
        engines[1].fail_next(error=OverloadedError("nobody is to come here"), times=9)
        answer = asyncio.create_task(hedged.generate())
        await first.waiting(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.shield(answer)
        first.release_all()
        assert text(await answer) == "hello there"
        assert len(engines[1].faults) == 9


async def test_times_are_measured_by_attempts_that_nobody_hedges(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        hedged = Hedged(mesh)
        name = mesh.runners[0]._engine.models()[0].artifact.name
        hedged.hedging._times._windows.clear()
        for _ in range(LEAST_SAMPLES):
            await hedged.generate(allow_hedging=False)
        assert hedged.hedging._times.late_after(name, len(PROMPT) // 4) is not None


async def test_the_callers_deadline_goes_to_runners_less_a_margin(certificates: MeshCertificates) -> None:
    """So a runner is late a little before its caller, and what the coordinator says of it arrives."""
    seen: list[float] = []

    async def script(_request: Any, context: Any) -> None:
        seen.append(context.time_remaining())
        raise EngineError("that was all")

    runner = ScriptedRunner(script)
    registry = {"lease_ttl_s": 60.0}
    async with InProcessMesh(runners=0, certificates=certificates, registry=registry) as mesh:
        await runner.join(mesh)
        began = asyncio.get_running_loop().time()
        with pytest.raises(grpc.RpcError):
            await Hedged(mesh).generate()
        spent_s = asyncio.get_running_loop().time() - began
        assert GIVEN_S - 0.05 - spent_s <= seen[0] <= GIVEN_S - 0.045
        await runner.leave()
