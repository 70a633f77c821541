"""The Python client in direct mode: it streams from runners itself, and is relayed where it can't or that ends."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from chorus.client import AttemptChanged, StartedAt, SyncMeshClient
from chorus.config import ChorusConfig
from chorus.core.errors import DeadlineExceededError, EngineError, UnavailableError, UnknownModelError
from chorus.core.generation import Finished, GenerationRequest, Queued, TextPrompt, TokenDelta
from chorus.testing.blackhole import Blackhole
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace


def raw(text: str = "echo:hello") -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(text))


class Seen:
    """What the coordinators counted."""

    def __init__(self, mesh: InProcessMesh) -> None:
        self._mesh = mesh

    def tickets(self, closing: str) -> float:
        return self._sum("chorus_generation_tickets_total", closing=closing)

    def relayed(self) -> float:
        method = "chorus.api.coordinator.v1.Coordinator/Generate"
        codes = ("OK", "CANCELLED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NOT_FOUND")
        return sum(self._sum("chorus_rpc_requests_total", method=method, code=code) for code in codes)

    @property
    def open(self) -> int:
        return sum(service._granting.open for service in self._mesh.coordinators)

    def _sum(self, name: str, **labels: str) -> float:
        return sum(metrics.get_sample_value(name, labels) or 0.0 for metrics in self._mesh.coordinator_metrics)


async def settled(seen: Seen) -> None:
    """Returns once every ticket's place is free."""
    while seen.open:
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()


# --- who streams from whom ------------------------------------------------------------------------------------------


async def test_auto_is_direct_from_the_second_generation_on(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=2, certificates=certificates) as mesh:
        client, seen = mesh.client(direct="auto"), Seen(mesh)
        for _ in range(3):
            answer = await client.complete(raw())
            assert (answer.text, answer.attempts) == ("hello", 1)
            assert answer.runner_id in ("runner-1", "runner-2")
        await settled(seen)
        assert (seen.tickets("ended"), seen.relayed()) == (2, 1)


@pytest.mark.parametrize(("mode", "tickets"), [("always", 2), ("never", 0)])
async def test_always_and_never(certificates: MeshCertificates, mode: Any, tickets: int) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        client, seen = mesh.client(direct=mode), Seen(mesh)
        for _ in range(2):
            assert (await client.complete(raw())).text == "hello"
        await settled(seen)
        assert (seen.tickets("ended"), seen.relayed()) == (tickets, 2 - tickets)


async def test_a_coordinator_that_was_just_started_looks_around_before_it_refuses(
    certificates: MeshCertificates,
) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        client = mesh.client(direct="always")
        for _ in range(3):
            await mesh.restart_coordinator(0)
            assert (await client.complete(raw())).text == "hello"


async def test_events_are_those_of_the_relay(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        kinds = []
        for mode in ("never", "always"):
            async with mesh.client(direct=mode).generate(raw(), max_tokens=4) as generation:  # type: ignore[arg-type]
                kinds.append([type(event) async for event in generation])
        assert kinds[0] == kinds[1]
        assert kinds[1][-1] is Finished


async def test_without_an_event_loop_and_from_the_configuration(certificates: MeshCertificates, tmp_path: Any) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        config = mesh.client_config(tmp_path)
        assert config.client.direct == "auto"
        always = config.model_copy(update={"client": config.client.model_copy(update={"direct": "always"})})
        text = await asyncio.to_thread(ask, always)
        assert text == "hello"
        await settled(Seen(mesh))
        assert Seen(mesh).tickets("ended") == 1


def ask(config: ChorusConfig) -> str:
    with SyncMeshClient(config) as client:
        return client.complete(raw()).text


async def test_a_hedged_generation_is_relayed(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        client, seen = mesh.client(direct="always"), Seen(mesh)
        assert (await client.complete(raw(), allow_hedging=True)).text == "hello"
        assert (seen.tickets("ended"), seen.relayed()) == (0, 1)


# --- where it can't -------------------------------------------------------------------------------------------------


async def test_a_runner_out_of_reach_is_relayed_and_the_ticket_given_back(certificates: MeshCertificates) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nothing listens there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with InProcessMesh(runners=1, certificates=certificates, coordinator={"max_requests": 1}) as mesh:
            client, seen = mesh.client(direct="auto"), Seen(mesh)
            grants_for(mesh, address)
            assert (await client.complete(raw())).text == "hello"
            for _ in range(3):  # only the first one of them tries
                assert (await client.complete(raw())).text == "hello"
            assert (seen.tickets("returned"), seen.relayed(), seen.open) == (1, 4, 0)
            with pytest.raises(UnavailableError, match="can't be reached from here"):
                await mesh.client(direct="always").complete(raw())


def grants_for(mesh: InProcessMesh, address: str) -> None:
    """Has tickets name another address than the one that coordinators use, as where networks differ."""
    granting: Any = mesh.coordinators[0]._granting
    grant = granting._grant

    def elsewhere(*arguments: Any) -> Any:
        response = grant(*arguments)
        response.address = address
        return response

    granting._grant = elsewhere


async def test_where_there_is_no_place_the_relay_waits_and_says_so(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(
        runners=[FakeEngine(pace=pace)], certificates=certificates, coordinator={"max_requests": 1}
    ) as mesh:
        client, seen = mesh.client(direct="auto"), Seen(mesh)
        first = asyncio.create_task(client.complete(raw()))
        await pace.waiting(1)
        async with client.generate(raw()) as second:
            assert isinstance(await anext(second), Queued)
            pace.release_all()
            assert isinstance([event async for event in second][-1], Finished)
        assert (await first).text == "hello"
        assert (seen.relayed(), seen.open) == (2, 0)


async def test_always_waits_for_its_turn(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(
        runners=[FakeEngine(pace=pace)], certificates=certificates, coordinator={"max_requests": 1}
    ) as mesh:
        client, seen = mesh.client(direct="always"), Seen(mesh)
        answers = asyncio.gather(client.complete(raw()), client.complete(raw()))
        await pace.waiting(1)
        pace.release_all()
        assert [answer.text for answer in await answers] == ["hello", "hello"]
        await settled(seen)
        assert (seen.tickets("ended"), seen.relayed()) == (2, 0)


async def test_a_refused_ticket_is_relayed(certificates: MeshCertificates) -> None:
    """As where the runner's clock is wrong."""
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        client, seen = mesh.client(direct="auto"), Seen(mesh)
        mesh.runners[0]._desk._wall = lambda: 4e9
        for _ in range(3):
            assert (await client.complete(raw())).text == "hello"
        assert (seen.tickets("returned"), seen.relayed(), seen.open) == (1, 3, 0)


async def test_the_meshs_answer_is_the_same(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        client = mesh.client(direct="always")
        with pytest.raises(UnknownModelError):
            await client.complete(raw(), model="nothing")
        assert Seen(mesh).open == 0


async def test_its_time_counts_on_either_way(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh:
        client, seen = mesh.client(direct="always"), Seen(mesh)
        with pytest.raises(DeadlineExceededError, match=r"client\.timeout_s"):
            await client.complete(raw(), timeout_s=0.3)
        await settled(seen)


# --- where it ends early --------------------------------------------------------------------------------------------


async def until_token(generation: Any, count: int) -> list[Any]:
    """The events up to that many tokens."""
    events: list[Any] = []
    while sum(isinstance(event, TokenDelta) for event in events) < count:
        events.append(await anext(generation))
    return events


def text(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenDelta))


@pytest.mark.parametrize("how", ["dies", "fails", "drains"])
async def test_a_stream_that_breaks_off_goes_on_through_the_relay(certificates: MeshCertificates, how: str) -> None:
    paces = [ManualPace(), ManualPace()]
    engines = [FakeEngine(pace=pace) for pace in paces]
    async with InProcessMesh(
        runners=engines, certificates=certificates, coordinator={"runner_weights": {"runner-2": 0.1}}
    ) as mesh:
        client, seen = mesh.client(direct="always"), Seen(mesh)
        if how == "fails":
            engines[0].fail_next(before=5, error=EngineError("broke"))
        async with client.generate(raw("echo:hello there")) as generation:
            paces[0].release(5)
            events = await until_token(generation, 5)
            began = next(event for event in events if isinstance(event, StartedAt))
            assert began.origin.runner_id == "runner-1"
            paces[1].release_all()
            if how == "dies":
                await mesh.kill_runner(0)
            elif how == "drains":
                await mesh.runners[0].stop(0.0)
            else:
                paces[0].release_all()
            events += [event async for event in generation]
        assert text(events) == "hello there"
        ids = [token_id for event in events if isinstance(event, TokenDelta) for token_id in event.token_ids]
        (changed,) = [event for event in events if isinstance(event, AttemptChanged)]
        assert changed.attempt == 2
        assert changed.runner_id == "runner-2"
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.completion_tokens == len(ids) >= len("hello there")
        await settled(seen)
        assert seen.relayed() == 1


async def test_before_the_first_token_the_relay_begins_anew(certificates: MeshCertificates) -> None:
    engines = [FakeEngine(), FakeEngine()]
    async with InProcessMesh(
        runners=engines, certificates=certificates, coordinator={"runner_weights": {"runner-2": 0.1}}
    ) as mesh:
        client, seen = mesh.client(direct="always"), Seen(mesh)
        engines[0].fail_next(error=EngineError("broke"))
        async with client.generate(raw()) as generation:
            events = [event async for event in generation]
        assert text(events) == "hello"
        (started,) = [event for event in events if isinstance(event, StartedAt)]
        assert (started.origin.attempt, started.origin.runner_id) == (2, "runner-2")
        assert not [event for event in events if isinstance(event, AttemptChanged)]
        await settled(seen)
        assert (seen.tickets("ended"), seen.relayed()) == (1, 1)
        # Where nobody else is, the one that failed is asked again.
        await mesh.runners[1].stop(0.0)
        await mesh.until(lambda directory: directory.get("runner-2") is None)
        engines[0].fail_next(error=EngineError("broke"))
        assert (await client.complete(raw())).runner_id == "runner-1"


async def test_a_runner_that_stands_still_is_left(certificates: MeshCertificates) -> None:
    """Its connection stays open, and nothing comes over it any more, as from a process that is suspended."""
    paces = [ManualPace(), ManualPace()]
    engines = [FakeEngine(pace=pace) for pace in paces]
    async with InProcessMesh(
        runners=engines, certificates=certificates, coordinator={"runner_weights": {"runner-2": 0.1}}
    ) as mesh:
        _, _, port = mesh.runners[0].address.rpartition(":")
        async with Blackhole() as way:
            way.leads_to = int(port)
            grants_for(mesh, f"127.0.0.1:{way.port}")
            client = mesh.client(direct="always")
            async with client.generate(raw("echo:hello there")) as generation:
                paces[0].release(5)
                events = await until_token(generation, 5)
                way.shut()
                for pace in paces:
                    pace.release_all()
                events += [event async for event in generation]
        assert text(events) == "hello there"
        assert [type(event) for event in events].count(AttemptChanged) == 1


async def test_a_caller_that_goes_away_frees_the_runners_slot(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(pace=pace)
    async with InProcessMesh(runners=[engine], certificates=certificates) as mesh:
        client, seen = mesh.client(direct="always"), Seen(mesh)
        async with client.generate(raw()) as generation:
            pace.release(2)
            await until_token(generation, 2)
        await settled(seen)
        assert not any(load.slots_used for load in engine.load_report())
        assert seen.tickets("ended") == 1
