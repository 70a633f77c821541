"""`chorus runner` as a process: it registers, dies or leaves, and the registry notices."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from chorus.core.fleet.events import DeltaEvent, RemovalReason
from chorus.core.fleet.records import RunnerState
from chorus.core.identity import Role
from chorus.registry.service import RegistryService
from chorus.testing.certificates import MeshCertificates
from tests.mesh.child import RUNNER, child, configured
from tests.mesh.conftest import TRUST_DOMAIN
from tests.mesh.local_mesh import LocalMesh


@pytest.fixture
def certs_dir(certificates: MeshCertificates, tmp_path: Path) -> Path:
    """A folder with the runner's certificate, as `chorus certs issue` writes it."""
    certificates.leaf(Role.RUNNER, "r1").write(tmp_path)
    return tmp_path


def with_runner(certs_dir: Path, registry: RegistryService, **runner: Any) -> str:
    settings = {"name": "r1", "listen": "127.0.0.1:0", "registries": [f"registry@{registry.address}"], **runner}
    return configured(certs_dir, TRUST_DOMAIN, runner=settings)


async def removal(local_mesh: LocalMesh, registry: RegistryService, ready: asyncio.Event) -> RemovalReason:
    """Why the first runner that leaves does; `ready` is set once one is ready."""
    async for event in local_mesh.watch(registry):
        if isinstance(event, DeltaEvent):
            if event.removals:
                return event.removals[0].reason
            if any(leased.record.state is RunnerState.READY for leased in event.upserts):
                ready.set()
    raise AssertionError("the watch ended")


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGTERM, 0, RemovalReason.DEREGISTERED), (signal.SIGKILL, -9, RemovalReason.EXPIRED)],
)
async def test_it_registers_and_its_end_is_noticed(
    local_mesh: LocalMesh, certs_dir: Path, number: signal.Signals, code: int, reason: RemovalReason
) -> None:
    registry, ready = await local_mesh.registry(), asyncio.Event()
    left = asyncio.ensure_future(removal(local_mesh, registry, ready))
    async with child(RUNNER, with_runner(certs_dir, registry)) as process:
        await process.event("service.ready")
        await ready.wait()
        process.signal(number)
        assert await process.ended() == code
        assert await left is reason
        assert process.plain == []


async def test_a_second_process_of_the_same_name_ends_the_first(local_mesh: LocalMesh, certs_dir: Path) -> None:
    registry = await local_mesh.registry()
    settings = with_runner(certs_dir, registry)
    async with child(RUNNER, settings) as first:
        await first.event("registry.found")
        async with child(RUNNER, settings) as second:
            await second.event("registry.found")
            failing = await first.event("service.failing")
            assert failing["reason"] == "STALE_INCARNATION"
            assert await first.ended() == 1
            (line,) = first.plain
            assert line.startswith("chorus runner: ")
            assert "newer process" in line


async def test_an_address_that_nobody_can_dial_is_refused_with_the_fix(local_mesh: LocalMesh, certs_dir: Path) -> None:
    registry = await local_mesh.registry()
    async with child(RUNNER, with_runner(certs_dir, registry, listen="0.0.0.0:0")) as process:
        assert await process.ended() == 2
        (line,) = process.plain
        assert "runner.advertise" in line
