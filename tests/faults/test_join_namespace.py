"""A second machine, as far as the network knows: a namespace with an address and a home of its own joins."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from chorus.config import ChorusConfig
from chorus.core.fleet.records import RunnerState
from chorus.core.identity import Role
from chorus.registry.service import RegistryService
from chorus.testing.namespace import Namespace, Network, NoNamespaceError, network
from tests.identity.identity_mesh import DOMAIN, identity_mesh

ROOT = Path(__file__).parents[2]


@pytest.fixture
def net() -> Iterator[Network]:
    try:
        with network() as made:
            yield made
    except NoNamespaceError as error:
        pytest.skip(str(error))


@asynccontextmanager
async def machine(namespace: Namespace, home: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`chorus join` in the namespace, with nothing in its home but what it left there itself."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT / "services")}
    command = (sys.executable, "-m", "chorus.cli.main", "join", *arguments)
    process = await asyncio.create_subprocess_exec(
        *namespace.command(*command), env=environ, cwd=home, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def listed(registry: RegistryService) -> str:
    """Waits until the runner is ready; returns where it is."""
    async for _ in registry.board.watch(without_load=False):
        for entry in registry.board.table.leased(registry.board.now):
            if entry.record.state is RunnerState.READY:
                return entry.record.runner.address
    raise AssertionError("the watch ended")


async def gone(registry: RegistryService) -> None:
    """Waits until nobody has a lease."""
    async for _ in registry.board.watch(without_load=False):
        if not registry.board.table.leased(registry.board.now):
            return


async def test_it_joins_by_the_line_serves_and_is_back_after_a_restart(net: Network, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    async with asyncio.timeout(120), identity_mesh(tmp_path / "certs", join_listen=f"{net.here}:0") as mesh:
        registry = RegistryService(
            ChorusConfig.model_validate({"mesh": {"trust_domain": DOMAIN}, "registry": {"listen": f"{net.here}:0"}}),
            identity=mesh.identity(Role.REGISTRY, "registry"),
        )
        await registry.start()
        mesh.tell(registries=[f"registry@{registry.address}"])
        line = await mesh.token()
        where = mesh.where.authority
        with net.second_machine() as namespace:
            async with machine(namespace, home, where, "--token", str(line), "--engine", "fake", "--name", "guest"):
                assert await listed(registry) == f"{net.there}:7201"
        await gone(registry)
        with net.second_machine() as namespace:
            async with machine(namespace, home):  # as its unit starts it
                assert await listed(registry) == f"{net.there}:7201"
        await registry.stop()
