"""Runners and their registries: leases kept, lost, found again and given back, and nobody vanishing meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from structlog.testing import capture_logs

from chorus.api.registry.v1 import registry_pb2 as pb
from chorus.api.registry.v1 import registry_pb2_grpc
from chorus.config import ChorusConfig, Endpoint
from chorus.core.errors import StaleIncarnationError, UnavailableError
from chorus.core.fleet.events import BookmarkEvent, DeltaEvent, RemovalReason, SnapshotEvent
from chorus.core.fleet.records import ModelState, RunnerRecord, RunnerState
from chorus.core.identity import Role
from chorus.hardware import Inventory
from chorus.registry.service import RegistryService
from chorus.runner import registrations
from chorus.runner.service import RunnerService
from chorus.testing.engine_fake import FakeEngine, FakeModel
from chorus.transport import Service, build_server
from chorus.transport.resolve import resolve
from tests.mesh.local_mesh import FAST_REGISTRY, LocalMesh, Seen


def ready(record: RunnerRecord) -> bool:
    return record.state is RunnerState.READY


def of(registry: RegistryService, name: str = "registry") -> str:
    """The registry as a runner has it configured."""
    return f"{name}@{registry.address}"


async def test_a_runner_is_starting_then_ready_with_its_models_and_load(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry()
    engine = FakeEngine([FakeModel(loaded=False)], load_delay_s=0.2)
    runner = await local_mesh.runner(of(registry), engine=engine, models=("fake-1b",), labels={"room": "attic"})
    first = await local_mesh.record(registry, "r1", lambda record: True)
    assert first.state is RunnerState.STARTING
    record = await local_mesh.record(
        registry, "r1", lambda record: ready(record) and record.runner.models[0].state is ModelState.LOADED
    )
    assert record.runner.incarnation == runner.presence.incarnation
    assert record.runner.address == runner.address
    assert record.runner.labels == {"room": "attic"}
    record = await local_mesh.record(registry, "r1", lambda record: bool(record.load.models))
    assert record.load.models[0].slots_total == 8
    assert record.load.memory_available_bytes > 0


async def test_heartbeats_keep_a_lease_for_longer_than_its_ttl(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry(lease_ttl_s=0.5, heartbeat_interval_s=0.05)
    await local_mesh.runner(of(registry))
    ages: list[float] = []
    async for event in local_mesh.watch(registry, without_load=True):
        if isinstance(event, DeltaEvent):
            assert not event.removals
        # The lease began before the watch did: when the registry is synced and then some, it has been renewed.
        ages += [leased.lease_age_s for leased in registry.board.table.leased(registry.board.now)]
        if isinstance(event, BookmarkEvent) and event.synced and len(ages) > 2:
            break
    assert ages[-1] < 0.5


async def test_a_runner_that_stops_gives_its_lease_back(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry(lease_ttl_s=60.0)
    runner = await local_mesh.runner(of(registry))
    await local_mesh.record(registry, "r1", ready)
    events = local_mesh.watch(registry)
    assert isinstance(await anext(events), SnapshotEvent)
    await runner.stop(0.0)
    seen = [change async for change in until_removed(events)]
    assert seen[-1].removals[0].reason is RemovalReason.DEREGISTERED


async def until_removed(events: Any) -> AsyncIterator[DeltaEvent]:
    async for event in events:
        if isinstance(event, DeltaEvent):
            yield event
            if event.removals:
                return


async def test_a_draining_runner_says_so_at_once(local_mesh: LocalMesh) -> None:
    # With an interval far longer than the test may take, only a heartbeat out of turn can tell.
    registry = await local_mesh.registry(lease_ttl_s=600.0, heartbeat_interval_s=250.0)
    runner = await local_mesh.runner(of(registry))
    await local_mesh.record(registry, "r1", ready)
    runner.presence.set_state(RunnerState.DRAINING)
    await local_mesh.record(registry, "r1", lambda record: record.state is RunnerState.DRAINING)


async def test_a_change_of_models_is_registered_at_once(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry(lease_ttl_s=600.0, heartbeat_interval_s=250.0)
    engine = FakeEngine()
    await local_mesh.runner(of(registry), engine=engine)
    await local_mesh.record(registry, "r1", lambda record: record.runner.models[0].state is ModelState.LOADED)
    await engine.unload("fake-1b")
    await local_mesh.record(registry, "r1", lambda record: record.runner.models[0].state is ModelState.AVAILABLE)


async def test_a_registry_that_is_restarted_loses_nobody(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry()
    address = registry.address
    await local_mesh.runner(f"registry@{address}", name="r1")
    await local_mesh.runner(f"registry@{address}", name="r2")
    seen = Seen()
    async for event in local_mesh.watch(registry):
        if len(seen.apply("a", event).entries) == 2 and event.synced:
            break
    seen.history.clear()
    await registry.stop()
    seen.lost("a")
    again = await local_mesh.registry(listen=address)
    assert again.board.table.epoch > registry.board.table.epoch
    first = None
    async for event in local_mesh.watch(again):
        first = first or event
        seen.apply("a", event)
        if event.synced:
            break
    assert isinstance(first, SnapshotEvent)
    assert not first.synced
    assert all(set(directory.entries) == {"r1", "r2"} for directory in seen.history)
    assert seen.merger.directory.synced


async def test_a_registry_that_comes_late_is_found(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry()
    address = registry.address
    await registry.stop()
    await local_mesh.runner(f"registry@{address}")
    late = await local_mesh.registry(listen=address)
    await local_mesh.record(late, "r1", ready)


async def test_a_registry_that_hangs_does_not_hold_up_another(local_mesh: LocalMesh) -> None:
    never = asyncio.Event()
    dialled = asyncio.Event()

    async def hang(_reader: object, writer: asyncio.StreamWriter) -> None:
        dialled.set()
        await never.wait()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as mute:
        port = mute.sockets[0].getsockname()[1]
        other = await local_mesh.registry("b")
        await local_mesh.runner(f"mute@127.0.0.1:{port}", of(other, "b"))
        await dialled.wait()
        heartbeats = 0
        async for event in local_mesh.watch(other):
            if isinstance(event, DeltaEvent):
                assert not event.removals
                heartbeats += 1
            if heartbeats == 20:  # two TTLs
                break
        never.set()


class ScriptedRegistry(registry_pb2_grpc.RegistryServicer):
    """Grants leases to whoever asks and handles streams of heartbeats as told; notes what is called."""

    def __init__(self, stream: Callable[[int, AsyncIterator[Any], Any], Any]) -> None:
        self._stream = stream
        self.terms = {"ttl": Duration(seconds=1), "heartbeat_interval": Duration(nanos=50_000_000)}
        self.calls: Counter[str] = Counter()
        self._called = asyncio.Condition()

    async def called(self, name: str, times: int) -> None:
        """Waits until an RPC has been called so often."""
        async with self._called:
            await self._called.wait_for(lambda: self.calls[name] >= times)

    async def _note(self, name: str) -> None:
        async with self._called:
            self.calls[name] += 1
            self._called.notify_all()

    async def Register(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._note("Register")
        return pb.RegisterResponse(epoch=1, **self.terms)

    async def Deregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.DeregisterResponse()

    async def Heartbeat(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._note("Heartbeat")
        return pb.HeartbeatResponse(**self.terms)

    async def KeepLease(self, requests: Any, context: Any) -> None:  # noqa: N802
        await self._note("KeepLease")
        answer = pb.KeepLeaseResponse(lease=pb.HeartbeatResponse(**self.terms))
        await self._stream(self.calls["KeepLease"], requests, lambda: context.write(answer.SerializeToString()))


@asynccontextmanager
async def scripted(local_mesh: LocalMesh, stream: Any, *, add: Any = None) -> AsyncIterator[ScriptedRegistry]:
    """A scripted registry with a runner; `add` adds it to the server where it isn't of this version."""
    servicer = ScriptedRegistry(stream)
    add = add if add is not None else registry_pb2_grpc.add_RegistryServicer_to_server
    server = build_server(
        identity=local_mesh.identity_of(Role.REGISTRY, "registry"),
        listen=["127.0.0.1:0"],
        services=[Service(pb.DESCRIPTOR.services_by_name["Registry"], add, servicer)],
    )
    await server.start()
    try:
        await local_mesh.runner(f"registry@{server.addresses[0]}")
        yield servicer
    finally:
        await server.stop(0)


async def test_all_heartbeats_to_a_registry_are_one_stream(local_mesh: LocalMesh) -> None:
    many = asyncio.Event()

    async def answers(_number: int, requests: AsyncIterator[Any], answer: Any) -> None:
        count = 0
        async for request in requests:
            assert request.heartbeat.runner_id == "r1"
            await answer()
            count += 1
            if count == 10:
                many.set()

    async with scripted(local_mesh, answers) as registry:
        await many.wait()
        assert registry.calls["KeepLease"] == 1
        assert registry.calls["Heartbeat"] == 0


async def test_a_stream_of_heartbeats_that_breaks_is_begun_again_and_no_outage(local_mesh: LocalMesh) -> None:
    async def breaks(number: int, requests: AsyncIterator[Any], answer: Any) -> None:
        async for _ in requests:
            await answer()
            if number % 3 == 1:
                return
            if number % 3 == 2:
                raise UnavailableError("broken")
            raise RuntimeError

    async with scripted(local_mesh, breaks) as registry:
        await registry.called("KeepLease", 1)
        with capture_logs() as lines:
            await registry.called("KeepLease", 7)
        assert "registry.lost" not in {line["event"] for line in lines}
        assert registry.calls["Register"] == 1


async def test_a_registry_that_stops_answering_on_its_stream_is_noticed(local_mesh: LocalMesh) -> None:
    async def falls_silent(number: int, requests: AsyncIterator[Any], answer: Any) -> None:
        async for _ in requests:
            if number > 1:
                return
            await answer()
            await asyncio.Event().wait()

    async with scripted(local_mesh, falls_silent) as registry:
        await registry.called("KeepLease", 2)


async def test_an_older_registry_gets_a_call_for_each_heartbeat(local_mesh: LocalMesh) -> None:
    class Older:
        """Takes the handlers of all RPCs, as generated code gives them, and leaves the newer one out."""

        def __init__(self, server: Any) -> None:
            self._server = server

        def add_generic_rpc_handlers(self, _handlers: Any) -> None: ...

        def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
            older = {name: handler for name, handler in handlers.items() if name != "KeepLease"}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, older),))

    def add(servicer: Any, server: Any) -> None:
        registry_pb2_grpc.add_RegistryServicer_to_server(servicer, Older(server))  # type: ignore[no-untyped-call]

    async def never(_number: int, _requests: Any, _answer: Any) -> None:
        raise AssertionError("an older registry has no such RPC")

    async with scripted(local_mesh, never, add=add) as registry:
        await registry.called("Heartbeat", 5)
        assert registry.calls["Register"] == 1


async def test_an_older_process_learns_that_its_time_is_over(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry()
    older = await local_mesh.runner(of(registry), service={"wall_ms": lambda: 1000})
    await local_mesh.record(registry, "r1", ready)
    newer = await local_mesh.runner(of(registry), service={"wall_ms": lambda: 2000})
    error = await older.wait_failed()
    assert isinstance(error, StaleIncarnationError)
    assert "2000" in error.message
    await older.stop(0.0)
    record = await local_mesh.record(registry, "r1", ready)
    assert (record.runner.incarnation, record.runner.address) == (2000, newer.address)


async def test_a_machine_that_slept_comes_back_as_a_new_incarnation(local_mesh: LocalMesh) -> None:
    registry = await local_mesh.registry()
    asleep_s = [5.0]
    await local_mesh.runner(of(registry), service={"asleep": lambda: asleep_s[0], "wall_ms": lambda: 1000})
    await local_mesh.record(registry, "r1", ready)
    asleep_s[0] = 3605.0
    record = await local_mesh.record(registry, "r1", lambda record: record.runner.incarnation > 1000)
    assert record.runner.incarnation == 1001, "greater than before even though the clock didn't move"


async def test_every_address_of_a_name_gets_a_lease(local_mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = await local_mesh.registry(), await local_mesh.registry()
    known = {first.address}

    async def resolve(endpoint: Endpoint) -> frozenset[Endpoint]:
        if not known:
            raise OSError("no such name")
        return frozenset(replace(Endpoint.parse(address), name=endpoint.name) for address in known)

    monkeypatch.setattr(registrations, "resolve", resolve)
    monkeypatch.setattr(registrations, "_RESOLVE_INTERVAL_S", 0.02)
    await local_mesh.runner("registry@headless:7101")
    await local_mesh.record(first, "r1", ready)
    known.add(second.address)
    await local_mesh.record(second, "r1", ready)
    known.clear()  # a resolver that is down changes nothing
    await local_mesh.record(first, "r1", ready)
    known.add(second.address)
    await first.stop()  # and is not looked for any more, since no name leads there
    await local_mesh.record(second, "r1", ready)


async def test_a_name_that_is_looked_up_for_ever_holds_no_other_registry_up(
    local_mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await local_mesh.registry()

    async def slow(endpoint: Endpoint) -> frozenset[Endpoint]:
        if endpoint.host == "nowhere":
            await asyncio.Event().wait()
        return await resolve(endpoint)

    monkeypatch.setattr(registrations, "resolve", slow)
    await local_mesh.runner("registry@nowhere:7101", of(registry))
    await local_mesh.record(registry, "r1", ready)


async def test_a_name_of_both_kinds_is_dialled_once() -> None:
    assert await resolve(Endpoint("127.0.0.1", 1, "a")) == {Endpoint("127.0.0.1", 1, "a")}
    assert await resolve(Endpoint("localhost", 1, "a")) == {Endpoint("127.0.0.1", 1, "a")}


async def test_a_mesh_without_tls_works_on_loopback() -> None:
    mesh = {"insecure_loopback": True}
    registry = RegistryService(
        ChorusConfig.model_validate({"mesh": mesh, "registry": {"listen": "127.0.0.1:0", **FAST_REGISTRY}}),
        identity=None,
    )
    await registry.start()
    runner = RunnerService(
        ChorusConfig.model_validate(
            {"mesh": mesh, "runner": {"listen": "127.0.0.1:0", "registries": [registry.address]}}
        ),
        identity=None,
        engine=FakeEngine(),
        inventory=Inventory("test-node"),
        name="r1",
    )
    await runner.start()
    events = registry.board.watch(without_load=True)
    async for event in events:
        if isinstance(event, DeltaEvent) and ready(event.upserts[0].record):
            break
    await events.aclose()
    await runner.stop(0.0)
    assert len(registry.board.table) == 0
    await registry.stop()
