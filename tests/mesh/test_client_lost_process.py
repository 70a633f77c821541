"""Coordinators as processes that are killed or stopped under streams: every answer is whole, and nothing stale."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from chorus.client import AttemptChanged, ClientEvent, Generation, MeshClient
from chorus.config import Endpoint
from chorus.core.errors import UnavailableError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from tests.mesh.child import COORDINATOR, Child, child, configured
from tests.mesh.conftest import TRUST_DOMAIN
from tests.mesh.test_coordinator_lost_process import changes, check_whole, raw, until_token


@dataclass
class Coordinators:
    """Two coordinators in processes of their own; the rest of the mesh is in this one."""

    mesh: InProcessMesh
    processes: dict[str, Child]
    endpoints: list[str]
    client: MeshClient


@pytest.fixture
async def coordinators(certificates: MeshCertificates, tmp_path: Path) -> AsyncIterator[Coordinators]:
    engine = FakeEngine(tokens_per_second=12, slots=32)
    async with (
        InProcessMesh(runners=[engine], certificates=certificates, coordinators=0) as mesh,
        AsyncExitStack() as stack,
    ):
        processes, endpoints = {}, []
        for name in ("one", "two"):
            certificates.leaf(Role.COORDINATOR, name).write(tmp_path)
            settings = {"name": name, "listen": "127.0.0.1:0", "registries": mesh._registry_endpoints}
            process = await stack.enter_async_context(
                child(COORDINATOR, configured(tmp_path, TRUST_DOMAIN, coordinator=settings))
            )
            serving = await process.event("service.ready")
            endpoints.append(f"{name}@{serving['address']}")
            processes[endpoints[-1]] = process
        client = await stack.enter_async_context(
            MeshClient(
                [Endpoint.parse(text) for text in endpoints],
                identity=certificates.identity(Role.CLIENT, "client-1"),
                direct="never",
            )
        )
        yield Coordinators(mesh, processes, endpoints, client)


async def read(generation: Generation, into: list[ClientEvent], noticed: asyncio.Event) -> None:
    """Reads on to the end, and tells when another coordinator goes on."""
    async for event in generation:
        into.append(event)
        if isinstance(event, AttemptChanged):
            noticed.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
async def test_one_is_lost_under_many_streams(coordinators: Coordinators, number: signal.Signals) -> None:
    client = coordinators.client
    lost, other = coordinators.endpoints
    texts = [f"question {place}" for place in range(4)]
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(client.generate(raw(text))) for text in texts]
        begun = await asyncio.gather(*(until_token(stream, 4) for stream in streams))
        coordinators.processes[lost].signal(number)
        rests: list[list[ClientEvent]] = [[] for _ in streams]
        noticed = asyncio.Event()
        reading = [
            asyncio.create_task(read(stream, into, noticed)) for stream, into in zip(streams, rests, strict=True)
        ]
        if number is signal.SIGSTOP:
            await noticed.wait()
            coordinators.processes[lost].signal(signal.SIGCONT)  # it has more to say, to nobody
        await asyncio.gather(*reading)
    for text, events, rest in zip(texts, begun, rests, strict=True):
        await check_whole(text, events + rest)
    moved = [change for rest in rests for change in changes(rest)]
    if number is not signal.SIGTERM:  # told to stop, it lets its streams end
        assert len(moved) == 2
        assert {change.coordinator for change in moved} == {other}
    if number is signal.SIGSTOP:
        # It is asked again once it answers: four at once go to both.
        await asyncio.gather(*(client.complete(raw(text)) for text in texts))


async def test_nobody_is_left(coordinators: Coordinators) -> None:
    for process in coordinators.processes.values():
        process.signal(signal.SIGKILL)
        await process.ended()
    with pytest.raises(UnavailableError, match="no coordinator answers"):
        await coordinators.client.complete(raw("hello"))
