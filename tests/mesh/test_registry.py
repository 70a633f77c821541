"""The registry over mutual TLS on loopback: whose lease it is, what watchers hear, how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from chorus.api.registry.v1 import registry_pb2 as pb
from chorus.api.registry.v1 import registry_pb2_grpc
from chorus.api.runner.v1 import resources_pb2
from chorus.config import ChorusConfig
from chorus.core.errors import (
    ChorusError,
    DrainingError,
    InvalidRequestError,
    PermissionDeniedError,
    StaleIncarnationError,
    UnknownLeaseError,
)
from chorus.core.fleet.events import BookmarkEvent, DeltaEvent, DirectoryEvent, RemovalReason, SnapshotEvent
from chorus.core.fleet.leases import Watcher
from chorus.core.fleet.records import Load, RunnerRecord, RunnerState
from chorus.core.identity import Role
from chorus.registry.service import RegistryService
from chorus.transport import open_channel
from chorus.wire.directory import decode_directory_event
from chorus.wire.errors import from_rpc_error
from chorus.wire.resources import encode_load, encode_runner_record
from tests.core.fleet_records import model, node, record
from tests.mesh.conftest import TRUST_DOMAIN, Identities

LONG_S = 20.0


def runner_record(runner_id: str = "r1", incarnation: int = 1, sequence: int = 1, **more: Any) -> RunnerRecord:
    """A record as the runner of that certificate would send it."""
    made = record(runner_id, incarnation, sequence, **more)
    object.__setattr__(made.runner, "server_name", f"{runner_id}.runner.{TRUST_DOMAIN}")
    return made


class Clock:
    """Monotonic time that stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Mesh:
    """A registry, and stubs of whoever calls it."""

    def __init__(self, service: RegistryService, identity_of: Identities, stack: AsyncExitStack) -> None:
        self.service = service
        self.metrics: CollectorRegistry
        self._identity_of = identity_of
        self._stack = stack

    async def stub(self, role: Role, name: str) -> registry_pb2_grpc.RegistryAsyncStub:
        channel = open_channel(
            self.service.address,
            identity=self._identity_of(role, name),
            server=self._identity_of(Role.REGISTRY, "registry").spiffe_id,
        )
        await self._stack.enter_async_context(channel)
        return registry_pb2_grpc.RegistryStub(channel)  # type: ignore[return-value]

    async def register(self, made: RunnerRecord) -> pb.RegisterResponse:
        stub = await self.stub(Role.RUNNER, made.runner.runner_id)
        return await stub.Register(pb.RegisterRequest(record=encode_runner_record(made)))

    async def watch(self, *, without_load: bool = False) -> AsyncIterator[DirectoryEvent]:
        stub = await self.stub(Role.COORDINATOR, "c")
        async for response in stub.WatchNodes(pb.WatchNodesRequest(without_load=without_load)):
            yield decode_directory_event(response.event)


def config(**registry: Any) -> ChorusConfig:
    return ChorusConfig.model_validate(
        {
            "mesh": {"trust_domain": TRUST_DOMAIN},
            "registry": {"listen": "127.0.0.1:0", "watch_flush_interval_s": 0.01, **registry},
        }
    )


@pytest.fixture
async def start(identity_of: Identities) -> AsyncIterator[Callable[..., Awaitable[Mesh]]]:
    """Starts registries; those and their callers end with the test."""
    async with AsyncExitStack() as stack:

        async def started(clock: Callable[[], float] | None = None, **registry: Any) -> Mesh:
            metrics = CollectorRegistry()
            more = {} if clock is None else {"clock": clock}
            service = RegistryService(
                config(**registry), identity=identity_of(Role.REGISTRY, "registry"), metrics=metrics, epoch=7, **more
            )
            stack.push_async_callback(service.stop)
            await service.start()
            mesh = Mesh(service, identity_of, stack)
            mesh.metrics = metrics
            return mesh

        yield started


@pytest.fixture
async def mesh(start: Callable[..., Awaitable[Mesh]]) -> Mesh:
    return await start()


async def refusal(call: Awaitable[Any]) -> ChorusError:
    """The error with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def heartbeat(runner_id: str = "r1", incarnation: int = 1, sequence: int = 2) -> pb.HeartbeatRequest:
    return pb.HeartbeatRequest(
        runner_id=runner_id,
        incarnation=incarnation,
        sequence=sequence,
        state=resources_pb2.RUNNER_STATE_READY,
        load=encode_load(Load(cpu_utilization=0.5)),
    )


async def test_a_runner_gets_a_lease_on_the_registrys_terms(mesh: Mesh) -> None:
    granted = await mesh.register(runner_record())
    assert (granted.ttl.ToTimedelta().total_seconds(), granted.epoch) == (2.0, 7)
    assert granted.heartbeat_interval.ToTimedelta().total_seconds() == 0.5
    runner = await mesh.stub(Role.RUNNER, "r1")
    renewed = await runner.Heartbeat(heartbeat())
    assert renewed.ttl == granted.ttl
    assert renewed.heartbeat_interval == granted.heartbeat_interval
    assert mesh.metrics.get_sample_value("chorus_registry_registrations_total") == 1.0


async def test_a_runner_may_speak_for_itself_alone(mesh: Mesh) -> None:
    await mesh.register(runner_record("r2"))
    impostor = await mesh.stub(Role.RUNNER, "r1")
    register = impostor.Register(pb.RegisterRequest(record=encode_runner_record(runner_record("r2", 9))))
    assert isinstance(await refusal(register), PermissionDeniedError)
    assert isinstance(await refusal(impostor.Heartbeat(heartbeat("r2"))), PermissionDeniedError)
    deregister = impostor.Deregister(pb.DeregisterRequest(runner_id="r2", incarnation=1))
    assert isinstance(await refusal(deregister), PermissionDeniedError)
    assert mesh.service.board.table.incarnation_of("r2") == 1


async def test_a_runner_cannot_have_itself_dialled_as_somebody_else(mesh: Mesh) -> None:
    posing = record("r1")  # its server name is of another trust domain
    assert isinstance(await refusal(mesh.register(posing)), PermissionDeniedError)


@pytest.mark.parametrize("address", ["0.0.0.0:7201", "[::]:7201", "nowhere", "r1@127.0.0.1:7201", "127.0.0.1:0"])
async def test_an_address_that_nobody_can_dial_is_refused(mesh: Mesh, address: str) -> None:
    made = runner_record()
    object.__setattr__(made.runner, "address", address)
    error = await refusal(mesh.register(made))
    assert isinstance(error, InvalidRequestError)
    assert error.metadata["field"] == "record.runner.address"


async def test_errors_of_the_table_reach_the_runner(mesh: Mesh) -> None:
    runner = await mesh.stub(Role.RUNNER, "r1")
    assert isinstance(await refusal(runner.Heartbeat(heartbeat())), UnknownLeaseError)
    await mesh.register(runner_record(incarnation=5))
    assert isinstance(await refusal(mesh.register(runner_record(incarnation=4))), StaleIncarnationError)
    assert isinstance(await refusal(runner.Heartbeat(heartbeat(incarnation=4))), StaleIncarnationError)
    nothing = pb.HeartbeatRequest(runner_id="r1", incarnation=5)
    assert isinstance(await refusal(runner.Heartbeat(nothing)), InvalidRequestError)


def beat(*args: Any, **more: Any) -> pb.KeepLeaseRequest:
    return pb.KeepLeaseRequest(heartbeat=heartbeat(*args, **more))


async def exchange(stream: Any, *beats: pb.KeepLeaseRequest) -> list[pb.KeepLeaseResponse]:
    """The answers to heartbeats sent one after another. Raises what the stream ends with."""
    answers = []
    for one in beats:
        await stream.write(one)
        answers.append(await stream.read())
    return answers


async def test_a_stream_of_heartbeats_is_answered_as_each_of_them_alone_would_be(mesh: Mesh) -> None:
    async with asyncio.timeout(LONG_S):
        await mesh.register(runner_record())
        runner = await mesh.stub(Role.RUNNER, "r1")
        stream = runner.KeepLease()
        answers = await exchange(stream, beat(sequence=2), beat(sequence=3), beat(sequence=3))
        alone = await runner.Heartbeat(heartbeat(sequence=4))
        assert [answer.lease for answer in answers] == [alone] * 3
        (leased,) = mesh.service.board.table.leased(0.0)
        assert (leased.record.sequence, leased.record.load.cpu_utilization) == (4, 0.5)
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK
        assert len(mesh.service.board.table) == 1, "the end of a stream is no lapse of the lease"


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (beat("r2"), PermissionDeniedError),
        (beat(incarnation=4), StaleIncarnationError),
        (beat(incarnation=6), UnknownLeaseError),
        (pb.KeepLeaseRequest(heartbeat=pb.HeartbeatRequest(runner_id="r1", incarnation=5)), InvalidRequestError),
        (pb.KeepLeaseRequest(), PermissionDeniedError),
    ],
)
async def test_a_heartbeat_with_an_error_ends_its_stream(
    mesh: Mesh, second: pb.KeepLeaseRequest, expected: type[ChorusError]
) -> None:
    async with asyncio.timeout(LONG_S):
        await mesh.register(runner_record("r1", 5))
        await mesh.register(runner_record("r2"))
        before = mesh.service.board.table.leased(0.0)[1].record
        stream = (await mesh.stub(Role.RUNNER, "r1")).KeepLease()
        await exchange(stream, beat(incarnation=5))
        assert isinstance(await refusal(exchange(stream, second)), expected)
        assert mesh.service.board.table.leased(0.0)[1].record == before


async def test_a_stream_outlives_no_certificate(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.timeout(LONG_S):
        await mesh.register(runner_record())
        stream = (await mesh.stub(Role.RUNNER, "r1")).KeepLease()
        await exchange(stream, beat())
        monkeypatch.setattr("chorus.transport.open_calls._now", lambda: 1e11)
        error = await refusal(stream.read())
        assert isinstance(error, DrainingError)
        assert "has expired since" in error.message


async def test_a_stopping_registry_ends_its_streams_of_heartbeats_as_unavailable(mesh: Mesh) -> None:
    async with asyncio.timeout(LONG_S):
        await mesh.register(runner_record())
        stream = (await mesh.stub(Role.RUNNER, "r1")).KeepLease()
        await exchange(stream, beat())
        await mesh.service.stop()
        with pytest.raises(grpc.RpcError) as caught:
            await stream.read()
        assert isinstance(from_rpc_error(caught.value), DrainingError)
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE


async def test_who_floods_a_stream_is_read_slowly_and_holds_nobody_up(start: Callable[..., Awaitable[Mesh]]) -> None:
    # A heartbeat each 250 s is asked for, so what comes within 25 s of the one before waits for longer than this test.
    mesh = await start(Clock(), lease_ttl_s=600.0, heartbeat_interval_s=250.0)
    async with asyncio.timeout(LONG_S):
        await mesh.register(runner_record("r1"))
        await mesh.register(runner_record("r2"))
        flood = (await mesh.stub(Role.RUNNER, "r1")).KeepLease()
        await exchange(flood, beat("r1", sequence=2), beat("r1", sequence=3))  # an early one is answered at once
        for sequence in range(4, 100):
            await flood.write(beat("r1", sequence=sequence))
        other = await mesh.stub(Role.RUNNER, "r2")
        for sequence in range(2, 30):
            await other.Heartbeat(heartbeat("r2", sequence=sequence))
        sequences = [leased.record.sequence for leased in mesh.service.board.table.leased(0.0)]
        assert sequences == [3, 29]
        flood.cancel()


async def test_admins_may_end_any_lease_and_runners_their_own(mesh: Mesh) -> None:
    await mesh.register(runner_record("r1", 5))
    await mesh.register(runner_record("r2", 5))
    admin = await mesh.stub(Role.ADMIN, "kim")
    await admin.Deregister(pb.DeregisterRequest(runner_id="r1"))
    await admin.Deregister(pb.DeregisterRequest(runner_id="nobody"))
    runner = await mesh.stub(Role.RUNNER, "r2")
    assert isinstance(await refusal(runner.Deregister(pb.DeregisterRequest(runner_id="r2"))), InvalidRequestError)
    await runner.Deregister(pb.DeregisterRequest(runner_id="r2", incarnation=4))
    assert len(mesh.service.board.table) == 1
    await runner.Deregister(pb.DeregisterRequest(runner_id="r2", incarnation=5))
    assert len(mesh.service.board.table) == 0


async def test_nodes_are_listed_by_pages_and_filters(mesh: Mesh) -> None:
    for name in ("r1", "r2", "r3"):
        await mesh.register(runner_record(name, machine=node(f"n-{name}"), models=(model(f"{name}.gguf", name),)))
    client = await mesh.stub(Role.CLIENT, "cli")
    first = await client.ListNodes(pb.ListNodesRequest(page_size=2))
    assert [entry.node.node_id for entry in first.nodes] == ["n-r1", "n-r2"]
    assert (first.epoch, first.revision, first.synced) == (7, 3, False)
    assert first.nodes[0].runners[0].HasField("lease_age")
    second = await client.ListNodes(pb.ListNodesRequest(page_size=2, page_token=first.next_page_token))
    assert [entry.node.node_id for entry in second.nodes] == ["n-r3"]
    assert second.next_page_token == ""
    one = await client.ListNodes(pb.ListNodesRequest(filter=pb.NodeFilter(model="r2")))
    assert [entry.node.node_id for entry in one.nodes] == ["n-r2"]
    foreign = await refusal(client.ListNodes(pb.ListNodesRequest(page_token="x")))
    assert isinstance(foreign, InvalidRequestError)


async def test_a_watch_tells_everything_in_order(mesh: Mesh) -> None:
    async with asyncio.timeout(LONG_S):
        await mesh.register(runner_record("r1"))
        events = mesh.watch()
        first = await anext(events)
        assert isinstance(first, SnapshotEvent)
        assert [leased.record.runner.runner_id for leased in first.runners] == ["r1"]
        await mesh.register(runner_record("r2"))
        second = await next_change(events)
        assert [leased.record.runner.runner_id for leased in second.upserts] == ["r2"]
        runner = await mesh.stub(Role.RUNNER, "r1")
        await runner.Heartbeat(heartbeat())
        third = await next_change(events)
        assert [leased.record.load.cpu_utilization for leased in third.upserts] == [0.5]
        await runner.Deregister(pb.DeregisterRequest(runner_id="r1", incarnation=1))
        fourth = await next_change(events)
        assert [(gone.runner_id, gone.reason) for gone in fourth.removals] == [("r1", RemovalReason.DEREGISTERED)]
        assert first.revision < second.revision < third.revision < fourth.revision


async def next_change(events: AsyncIterator[DirectoryEvent]) -> DeltaEvent:
    """The next event that is no bookmark."""
    async for event in events:
        if not isinstance(event, BookmarkEvent):
            assert isinstance(event, DeltaEvent)
            return event
    raise AssertionError("the watch ended")


async def test_a_watch_without_load_passes_over_heartbeats(mesh: Mesh) -> None:
    async with asyncio.timeout(LONG_S):
        await mesh.register(runner_record("r1"))
        events = mesh.watch(without_load=True)
        await anext(events)
        runner = await mesh.stub(Role.RUNNER, "r1")
        await runner.Heartbeat(heartbeat())
        assert isinstance(await anext(events), BookmarkEvent)
        await mesh.register(runner_record("r1", sequence=3, state=RunnerState.DRAINING))
        (leased,) = (await next_change(events)).upserts
        assert leased.record.state is RunnerState.DRAINING


async def test_a_silent_runner_expires_and_the_registry_turns_synced(
    start: Callable[..., Awaitable[Mesh]],
) -> None:
    mesh = await start(lease_ttl_s=0.5, heartbeat_interval_s=0.1)
    async with asyncio.timeout(LONG_S):
        await mesh.register(runner_record("r1"))
        events = mesh.watch()
        assert not (await anext(events)).synced
        delta = await next_change(events)
        assert [(gone.runner_id, gone.reason) for gone in delta.removals] == [("r1", RemovalReason.EXPIRED)]
        assert delta.synced
    assert mesh.metrics.get_sample_value("chorus_registry_lease_expirations_total") == 1.0


async def test_changes_that_follow_closely_come_together(start: Callable[..., Awaitable[Mesh]]) -> None:
    clock = Clock()  # at a standstill, so that the flush interval never ends by itself
    mesh = await start(clock, watch_flush_interval_s=0.5)
    async with asyncio.timeout(LONG_S):
        events = mesh.watch()
        await anext(events)
        board = mesh.service.board
        for number in range(50):
            board.register(runner_record(f"r{number % 5}", sequence=number + 1))
        delta = await next_change(events)
        assert sorted(leased.record.version for leased in delta.upserts) == [(1, number) for number in range(46, 51)]


async def test_a_stopping_registry_ends_its_watches_as_unavailable(mesh: Mesh) -> None:
    async with asyncio.timeout(LONG_S):
        stub = await mesh.stub(Role.COORDINATOR, "c")
        watch = stub.WatchNodes(pb.WatchNodesRequest())
        events = aiter(watch)
        assert (await anext(events)).event.HasField("snapshot")
        await mesh.service.stop()
        assert isinstance(await refusal(read_all(events)), DrainingError)
        assert await watch.code() is grpc.StatusCode.UNAVAILABLE


async def read_all(events: AsyncIterator[Any]) -> None:
    async for _ in events:
        pass


async def test_a_watcher_that_goes_away_is_forgotten(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    table, forgotten = mesh.service.board.table, asyncio.Event()
    unwatch = table.unwatch

    def noted(watcher: Watcher) -> None:
        unwatch(watcher)
        forgotten.set()

    monkeypatch.setattr(table, "unwatch", noted)
    async with asyncio.timeout(LONG_S):
        stub = await mesh.stub(Role.COORDINATOR, "c")
        watch = stub.WatchNodes(pb.WatchNodesRequest())
        await watch.read()
        assert len(table._watchers) == 1
        watch.cancel()
        await forgotten.wait()
        assert not table._watchers
