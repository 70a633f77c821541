"""A second machine, as far as the network knows: a namespace with an address and a home of its own joins."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from chorus.config import ChorusConfig
from chorus.core.fleet.records import RunnerState
from chorus.core.identity import Role
from chorus.registry.service import RegistryService
from tests.identity.identity_mesh import DOMAIN, identity_mesh

ROOT = Path(__file__).parents[2]
HERE, THERE = "10.77.13.1", "10.77.13.2"


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def namespace() -> Iterator[str]:
    name, near, far = f"chorus-{os.getpid()}", f"ch{os.getpid() % 100_000}a", f"ch{os.getpid() % 100_000}b"
    if shutil.which("ip") is None or not _ip("netns", "add", name):
        pytest.skip("no network namespace can be made here")
    try:
        made = all(
            (
                _ip("link", "add", near, "type", "veth", "peer", "name", far),
                _ip("link", "set", far, "netns", name),
                _ip("addr", "add", f"{HERE}/30", "dev", near),
                _ip("link", "set", near, "up"),
                _ip("netns", "exec", name, "ip", "addr", "add", f"{THERE}/30", "dev", far),
                _ip("netns", "exec", name, "ip", "link", "set", far, "up"),
                _ip("netns", "exec", name, "ip", "link", "set", "lo", "up"),
            )
        )
        if not made:
            pytest.skip("no network can be made between here and a namespace")
        yield name
    finally:
        _ip("link", "del", near)
        _ip("netns", "del", name)


@asynccontextmanager
async def machine(namespace: str, home: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`chorus join` in the namespace, with nothing in its home but what it left there itself."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT / "services")}
    command = (sys.executable, "-m", "chorus.cli.main", "join", *arguments)
    process = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", namespace, *command, env=environ, cwd=home, stderr=asyncio.subprocess.DEVNULL
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


async def test_it_joins_by_the_line_serves_and_is_back_after_a_restart(namespace: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    async with asyncio.timeout(120), identity_mesh(tmp_path / "certs", join_listen=f"{HERE}:0") as mesh:
        registry = RegistryService(
            ChorusConfig.model_validate({"mesh": {"trust_domain": DOMAIN}, "registry": {"listen": f"{HERE}:0"}}),
            identity=mesh.identity(Role.REGISTRY, "registry"),
        )
        await registry.start()
        mesh.tell(registries=[f"registry@{registry.address}"])
        line = await mesh.token()
        where = mesh.where.authority
        async with machine(namespace, home, where, "--token", str(line), "--engine", "fake", "--name", "guest"):
            assert await listed(registry) == f"{THERE}:7201"
        await gone(registry)
        async with machine(namespace, home):  # as its unit starts it
            assert await listed(registry) == f"{THERE}:7201"
        await registry.stop()
