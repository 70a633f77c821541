"""A coordinator's view of its mesh: who comes and goes, what it tells of it, and what it survives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from chorus.client import Generation
from chorus.core.errors import ChorusError, NotFoundError, RunnersUnavailableError, UnavailableError
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.events import BookmarkEvent, DeltaEvent, SnapshotEvent
from chorus.core.fleet.listing import NodeFilter
from chorus.core.fleet.records import RunnerState
from chorus.core.generation import Finished, GenerationRequest, Requirements, TextPrompt, TokenDelta
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace


def raw(text: str = "echo:hello", **fields: object) -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(text), **fields)  # type: ignore[arg-type]


async def first_token(generation: Generation) -> None:
    while not isinstance(await anext(generation), TokenDelta):
        pass


def has(runner_id: str) -> object:
    return lambda directory: runner_id in directory.entries


def lacks(directory: Directory, runner_id: str) -> bool:
    return runner_id not in directory.entries


# --- who dies -------------------------------------------------------------------------------------------------------


async def test_a_killed_runner_is_unreachable_at_once_then_gone(certificates: MeshCertificates) -> None:
    # The lease is long: only the broken connection can tell so soon that nobody is there.
    async with InProcessMesh(runners=2, certificates=certificates, registry={"lease_ttl_s": 60}) as mesh:
        client = mesh.client()
        assert await client.complete(raw(requirements=Requirements(runner_ids=("runner-1",))))
        await mesh.kill_runner(0)
        await mesh.until(lambda directory: not directory.entries["runner-1"].reachable)
        for _ in range(5):
            assert (await client.complete(raw())).runner_id == "runner-2"
        with pytest.raises(RunnersUnavailableError, match="runner-1 cannot be reached"):
            await client.complete(raw(requirements=Requirements(runner_ids=("runner-1",))))


async def test_a_killed_runners_lease_lapses(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=2, certificates=certificates) as mesh:
        await mesh.until(lambda directory: directory.synced)
        await mesh.kill_runner(0)
        await mesh.until(lambda directory: lacks(directory, "runner-1"))
        nodes = (await mesh.client().list_nodes()).nodes
        assert [node.node.node_id for node in nodes] == ["node-of-runner-2"]


async def test_a_stream_whose_runner_is_killed_ends_as_unavailable(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh:
        generation = mesh.client().generate(raw())
        pace.release()
        await first_token(generation)
        await mesh.kill_runner(0)
        with pytest.raises(UnavailableError) as caught:
            await anext(generation)
        assert caught.value.metadata["runner_id"] == "runner-1"


async def test_a_runner_killed_before_its_first_token_costs_nobody_anything(certificates: MeshCertificates) -> None:
    paces = [ManualPace(), ManualPace()]
    engines = [FakeEngine(pace=pace) for pace in paces]
    async with InProcessMesh(runners=engines, certificates=certificates) as mesh:
        asking = asyncio.create_task(mesh.client().complete(raw("echo:saved")))
        waiting = [asyncio.create_task(pace.waiting(1)) for pace in paces]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        chosen = next(index for index, task in enumerate(waiting) if task.done())
        await mesh.kill_runner(chosen)
        paces[1 - chosen].release_all()
        answer = await asking
        assert (answer.text, answer.runner_id, answer.attempts) == ("saved", f"runner-{2 - chosen}", 2)
        for task in waiting:
            task.cancel()


async def test_a_runner_that_comes_back_is_used_again(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        client = mesh.client()
        before = mesh.runners[0].presence.incarnation
        await mesh.kill_runner(0)
        await mesh.until(lambda directory: lacks(directory, "runner-1") or not directory.entries["runner-1"].reachable)
        await mesh.add_runner(name="runner-1")
        directory = await mesh.until(
            lambda directory: (
                (entry := directory.get("runner-1")) is not None
                and entry.record.runner.incarnation > before
                and entry.record.state is RunnerState.READY
            )
        )
        assert directory.entries["runner-1"].reachable
        assert (await client.complete(raw())).text == "hello"


# --- registries -----------------------------------------------------------------------------------------------------


async def test_a_registry_that_restarts_interrupts_nobody_and_loses_nobody(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace), FakeEngine()], certificates=certificates) as mesh:
        client = mesh.client()
        await mesh.until(lambda directory: directory.synced)
        seen: list[int] = []
        mesh.coordinators[0].live.on_change(lambda _: seen.append(len(mesh.coordinators[0].live.directory.entries)))
        async with client.generate(raw("echo:steady", requirements=Requirements(runner_ids=("runner-1",)))) as running:
            pace.release()
            await first_token(running)
            await mesh.restart_registry()
            await mesh.until(lambda directory: not directory.synced)
            assert (await client.complete(raw(requirements=Requirements(runner_ids=("runner-2",))))).text == "hello"
            await mesh.until(lambda directory: directory.synced)
            pace.release_all()
            assert isinstance([event async for event in running][-1], Finished)
        assert set(seen) == {2}


async def test_without_any_registry_the_last_directory_serves(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        client = mesh.client()
        await mesh.registries[0].stop(0.0)
        await mesh.until(lambda directory: not directory.synced)
        assert (await client.complete(raw())).text == "hello"
        (registry,) = (await client.list_nodes()).registries
        assert not registry.connected
        assert registry.problem
        assert registry.last_heard_s is not None


async def test_one_registry_of_two_is_enough(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, registries=2, certificates=certificates) as mesh:
        client = mesh.client()
        nodes = await client.list_nodes()
        assert [registry.address.partition("@")[0] for registry in nodes.registries] == ["registry-1", "registry-2"]
        await mesh.registries[0].stop(0.0)
        await mesh.add_runner()
        await mesh.until(lambda directory: "runner-2" in directory.entries)
        assert len((await client.list_models()).models[0].places) == 2


# --- what is told ---------------------------------------------------------------------------------------------------


async def test_nodes_are_listed_by_condition(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=2, certificates=certificates) as mesh:
        await mesh.add_runner(labels={"room": "attic"})
        await mesh.until(lambda directory: "runner-3" in directory.entries)
        client = mesh.client()
        assert len((await client.list_nodes()).nodes) == 3
        (node,) = (await client.list_nodes(NodeFilter(labels={"room": "attic"}))).nodes
        assert [leased.record.runner.runner_id for leased in node.runners] == ["runner-3"]
        assert (await client.list_nodes(NodeFilter(model="nothing"))).nodes == ()


async def test_a_watch_begins_with_everybody_and_tells_of_changes(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        watch = mesh.client().watch_nodes(without_load=True)
        opening = await anext(watch)
        assert isinstance(opening, SnapshotEvent)
        assert [leased.record.runner.runner_id for leased in opening.runners] == ["runner-1"]
        runner = await mesh.add_runner()
        joined = await next_delta(watch)
        assert {leased.record.runner.runner_id for leased in joined.upserts} == {"runner-2"}
        assert joined.epoch == opening.epoch
        assert joined.revision > opening.revision
        await runner.stop(0.0)
        while not (left := await next_delta(watch)).removals:
            assert {leased.record.state for leased in left.upserts} <= {RunnerState.READY, RunnerState.DRAINING}
        assert [removal.runner_id for removal in left.removals] == ["runner-2"]
        assert isinstance(await anext(watch), BookmarkEvent)
        await watch.aclose()


async def test_a_watch_with_load_tells_of_it(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh:
        client = mesh.client()
        watch = client.watch_nodes()
        assert isinstance(await anext(watch), SnapshotEvent)
        async with client.generate(raw()) as running:
            pace.release()
            await first_token(running)
            busy = False
            while not busy:
                event = await anext(watch)
                upserts = event.upserts if isinstance(event, DeltaEvent) else ()
                busy = any(load.slots_used for leased in upserts for load in leased.record.load.models)
        await watch.aclose()


async def test_a_watch_ends_as_unavailable_when_the_coordinator_stops(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=0, certificates=certificates) as mesh:
        watch = mesh.client().watch_nodes()
        assert isinstance(await anext(watch), SnapshotEvent)
        stopping = asyncio.create_task(mesh.coordinators[0].stop(5.0))
        with pytest.raises(ChorusError, match="stopping"):
            await drained(watch)
        await stopping


async def test_a_client_may_ask_and_a_runner_may_not(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        with pytest.raises(ChorusError) as caught:
            await mesh.client(role=Role.RUNNER, name="runner-1").complete(raw())
        assert caught.value.reason == "PERMISSION_DENIED"
        assert not isinstance(caught.value, NotFoundError)


async def next_delta(watch: AsyncIterator[object]) -> DeltaEvent:
    async for event in watch:
        if isinstance(event, DeltaEvent):
            return event
    raise AssertionError("the watch ended")


async def drained(watch: AsyncIterator[object]) -> None:
    async for _ in watch:
        pass
