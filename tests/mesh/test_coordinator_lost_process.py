"""Runners as processes that are killed, stopped or cut off under streams: every answer is whole, and nothing stale."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from chorus.client import AttemptChanged, ClientEvent, Generation, StartedAt
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import RunnerState
from chorus.core.generation import Finished, GenerationRequest, TextPrompt, TokenDelta
from chorus.core.identity import Role
from chorus.testing.blackhole import Blackhole
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from chorus.testing.service import TOKENS_PER_SECOND_ENV
from tests.mesh.child import RUNNER, Child, child, configured
from tests.mesh.conftest import TRUST_DOMAIN

# A lease that does not lapse meanwhile: what is noticed, the coordinator notices itself.
LASTING = {"lease_ttl_s": 600.0, "heartbeat_interval_s": 0.1}


class Processes:
    """A registry and a coordinator in this process, and runners in their own."""

    def __init__(self, mesh: InProcessMesh, certs_dir: Path, stack: AsyncExitStack) -> None:
        self.mesh = mesh
        self.runners: dict[str, Child] = {}
        self._certs_dir = certs_dir
        self._stack = stack

    async def runner(self, name: str, **more: Any) -> Child:
        """Starts a runner, which is ready when this returns; `more` are settings of it."""
        if name not in self.runners:
            self.mesh.certificates.leaf(Role.RUNNER, name).write(self._certs_dir)
        registries = [f"registry-1@{self.mesh.registries[0].address}"]
        settings = {"name": name, "listen": "127.0.0.1:0", "registries": registries, "slots": 16, **more}
        process = await self._stack.enter_async_context(
            child(RUNNER, configured(self._certs_dir, TRUST_DOMAIN, runner=settings))
        )
        self.runners[name] = process
        await self.mesh.until(lambda directory: is_usable(directory, name))
        return process


@pytest.fixture
async def processes(
    certificates: MeshCertificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Processes]:
    monkeypatch.setenv(TOKENS_PER_SECOND_ENV, "25")
    async with InProcessMesh(runners=0, certificates=certificates, registry=LASTING) as mesh, AsyncExitStack() as stack:
        yield Processes(mesh, tmp_path, stack)


def is_usable(directory: Directory, runner_id: str) -> bool:
    entry = directory.get(runner_id)
    return entry is not None and entry.reachable and entry.record.state is RunnerState.READY


def slots_used(directory: Directory, runner_id: str) -> int:
    entry = directory.get(runner_id)
    return sum(load.slots_used for load in entry.record.load.models) if entry is not None else -1


def raw(text: str) -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(text))


async def right_ids(text: str) -> list[int]:
    """What every fake engine answers."""
    return [
        token
        async for event in FakeEngine().generate(raw(text))
        if isinstance(event, TokenDelta)
        for token in event.token_ids
    ]


def ids(events: list[ClientEvent]) -> list[int]:
    return [token for event in events if isinstance(event, TokenDelta) for token in event.token_ids]


async def until_token(generation: Generation, count: int) -> list[ClientEvent]:
    events: list[ClientEvent] = []
    while len(ids(events)) < count:
        events.append(await anext(generation))
    return events


async def until_changed(generation: Generation) -> list[ClientEvent]:
    events: list[ClientEvent] = []
    while not events or not isinstance(events[-1], AttemptChanged):
        events.append(await anext(generation))
    return events


async def collect(generation: Generation) -> list[ClientEvent]:
    return [event async for event in generation]


def changes(events: list[ClientEvent]) -> list[AttemptChanged]:
    return [event for event in events if isinstance(event, AttemptChanged)]


def begun_on(events: list[ClientEvent]) -> str:
    """The runner that began an answer."""
    return next(event.origin.runner_id for event in events if isinstance(event, StartedAt))


async def check_whole(text: str, events: list[ClientEvent]) -> None:
    right = await right_ids(text)
    assert ids(events) == right
    deltas = [event for event in events if isinstance(event, TokenDelta)]
    assert [delta.index for delta in deltas] == list(range(len(right)))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.usage.completion_tokens == len(right)


async def test_killed_under_many_streams(processes: Processes) -> None:
    names = {"alpha", "beta", "gamma"}
    for name in names:
        await processes.runner(name)
    client = processes.mesh.client()
    texts = [f"question {number}" for number in range(12)]
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(client.generate(raw(text))) for text in texts]
        begun = await asyncio.gather(*(until_token(stream, 10 + number) for number, stream in enumerate(streams)))
        killed = begun_on(begun[0])
        processes.runners[killed].signal(signal.SIGKILL)
        rests = await asyncio.gather(*(collect(stream) for stream in streams))
    moved = [change for rest in rests for change in changes(rest)]
    assert moved
    assert {change.runner_id for change in moved} <= names - {killed}
    for text, events, rest in zip(texts, begun, rests, strict=True):
        await check_whole(text, events + rest)


async def test_the_only_process_is_killed_and_started_again(processes: Processes) -> None:
    first = await processes.runner("alpha")
    async with processes.mesh.client().generate(raw("hello")) as generation:
        events = await until_token(generation, 8)
        rest = asyncio.create_task(collect(generation))
        first.signal(signal.SIGKILL)
        await first.ended()
        await processes.mesh.until(lambda directory: not is_usable(directory, "alpha"))
        await processes.runner("alpha")
        events += await rest
    await check_whole("hello", events)
    assert [(change.runner_id, change.attempt) for change in changes(events)] == [("alpha", 2)]


async def test_every_process_is_replaced_in_turn_under_streams(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rolling restart: each is told to end, with less grace than its streams need, and another one is started."""
    monkeypatch.setenv(TOKENS_PER_SECOND_ENV, "8")  # so that the answers outlast the starts of processes
    await processes.runner("alpha", drain_grace_s=0.1)
    client = processes.mesh.client()
    texts = [f"question {number}" for number in range(4)]
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(client.generate(raw(text))) for text in texts]
        answers = await asyncio.gather(*(until_token(stream, 5) for stream in streams))
        for old, new in (("alpha", "beta"), ("beta", "gamma")):
            await processes.runner(new, drain_grace_s=0.1)
            reading = [asyncio.create_task(until_changed(stream)) for stream in streams]
            processes.runners[old].signal(signal.SIGTERM)
            assert await processes.runners[old].ended() == 0
            for events, more in zip(answers, reading, strict=True):
                events += await more
        for events, stream in zip(answers, streams, strict=True):
            events += await collect(stream)
    for text, events in zip(texts, answers, strict=True):
        await check_whole(text, events)
        assert [change.runner_id for change in changes(events)] == ["beta", "gamma"]
        assert {change.reason for change in changes(events)} == {"DRAINING"}


async def test_stopped_and_going_on_later_it_delivers_nothing_stale(processes: Processes) -> None:
    for name in ("alpha", "beta"):
        await processes.runner(name)
    async with processes.mesh.client().generate(raw("hello")) as generation:
        events = await until_token(generation, 8)
        stopped = begun_on(events)
        processes.runners[stopped].signal(signal.SIGSTOP)
        events += await until_changed(generation)
        assert not is_usable(processes.mesh.coordinators[0].live.directory, stopped)
        events += await until_token(generation, 3)
        processes.runners[stopped].signal(signal.SIGCONT)  # and it has more to say of what it began
        # It is asked again as soon as it answers, and no longer has the stream that was taken from it.
        await processes.mesh.until(lambda directory: is_usable(directory, stopped))
        await processes.mesh.until(lambda directory: slots_used(directory, stopped) == 0)
        events += await collect(generation)
    await check_whole("hello", events)
    assert [change.reason for change in changes(events)] == ["UNAVAILABLE"]
    assert {change.runner_id for change in changes(events)} == {"alpha", "beta"} - {stopped}


async def test_stopped_with_nobody_else_it_is_waited_for(processes: Processes) -> None:
    alpha = await processes.runner("alpha")
    async with processes.mesh.client().generate(raw("hello")) as generation:
        events = await until_token(generation, 8)
        rest = asyncio.create_task(collect(generation))
        alpha.signal(signal.SIGSTOP)
        await processes.mesh.until(lambda directory: not is_usable(directory, "alpha"))
        alpha.signal(signal.SIGCONT)
        await processes.mesh.until(lambda directory: is_usable(directory, "alpha"))
        events += await rest
    await check_whole("hello", events)
    assert not changes(events)


async def test_stopped_before_its_first_token_another_begins(processes: Processes) -> None:
    alpha = await processes.runner("alpha")
    await processes.mesh.client().complete(raw("echo:there is a connection"))
    alpha.signal(signal.SIGSTOP)
    async with processes.mesh.client().generate(raw("hello")) as generation:
        answer = asyncio.create_task(collect(generation))
        await processes.mesh.until(lambda directory: not is_usable(directory, "alpha"))
        await processes.mesh.add_runner()
        events = await answer
    alpha.signal(signal.SIGCONT)
    await check_whole("hello", events)
    assert not changes(events)


async def test_stopped_while_it_embeds_another_does(processes: Processes) -> None:
    alpha = await processes.runner("alpha")
    await processes.mesh.client().complete(raw("echo:there is a connection"))
    alpha.signal(signal.SIGSTOP)
    answer = asyncio.create_task(processes.mesh.client().embed("hello"))
    await processes.mesh.until(lambda directory: not is_usable(directory, "alpha"))
    await processes.mesh.add_runner()
    assert (await answer).runner_id == "runner-1"


async def test_a_cut_connection_delivers_nothing_when_it_is_mended(certificates: MeshCertificates) -> None:
    paces = ManualPace(), ManualPace()
    async with Blackhole() as way, InProcessMesh(runners=0, certificates=certificates, registry=LASTING) as mesh:
        first = await mesh.add_runner(FakeEngine(pace=paces[0]), advertise=f"127.0.0.1:{way.port}")
        way.leads_to = int(first.address.rpartition(":")[2])
        await mesh.until(lambda directory: is_usable(directory, "runner-1"))
        async with mesh.client().generate(raw("hello")) as generation:
            paces[0].release(8)
            events = await until_token(generation, 8)
            await mesh.add_runner(FakeEngine(pace=paces[1]))
            await mesh.until(lambda directory: is_usable(directory, "runner-2"))
            way.shut()
            paces[0].release_all()  # all of it is on its way, and does not arrive
            paces[1].release(5)
            events += await until_changed(generation)
            events += await until_token(generation, 5)
            way.open()
            await mesh.until(lambda directory: is_usable(directory, "runner-1"))
            paces[1].release_all()
            events += await collect(generation)
    await check_whole("hello", events)
    assert [change.runner_id for change in changes(events)] == ["runner-2"]
