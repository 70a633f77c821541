"""A mesh whose certificates live for seconds: it rotates under streams, and an admin shuts a stolen runner out.

Each service is kept as its process keeps it, by a CertificateKeeper over its own folder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509

from chorus.client import MeshClient
from chorus.config import ChorusConfig, Endpoint
from chorus.coordinator.service import CoordinatorService
from chorus.core.errors import ChorusError
from chorus.core.identity import Role
from chorus.hardware import Inventory
from chorus.registry.service import RegistryService
from chorus.runner.service import RunnerService
from chorus.testing.engine_fake import FakeEngine
from chorus.transport import TlsIdentity
from chorus.transport.keeping import CertificateKeeper
from tests.identity.identity_mesh import DOMAIN, IdentityMesh, identity_mesh

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIFE_S = 12.0


class RotatingMesh:
    """A registry, a coordinator and runners that joined, each renewing by itself."""

    def __init__(self, at: IdentityMesh, folder: Path, stack: AsyncExitStack) -> None:
        self.at = at
        self._folder = folder
        self._stack = stack
        self.kept: dict[str, TlsIdentity] = {}
        self.serials: dict[str, set[int]] = {}
        self.registry = ""
        self.coordinator = ""

    async def identity(self, role: Role, name: str) -> TlsIdentity:
        """Somebody who joined and keeps what they got."""
        home = self._folder / f"{role}-{name}"
        await self.at.join(home, await self.at.token(role), name=name)
        directory = home / "certs" / f"{role}-{name}"
        identity = TlsIdentity.load(directory)
        self.kept[f"{role}-{name}"] = identity
        seen = self.serials[f"{role}-{name}"] = set()

        def note() -> None:
            seen.add(x509.load_pem_x509_certificate(identity.cert_pem).serial_number)

        note()
        identity.on_change(note)
        keeper = CertificateKeeper(
            identity, directory, renewal=self.at.where.named("identity"), service=self.at.endpoint
        )
        task = asyncio.create_task(keeper.run())
        self._stack.push_async_callback(_ended, task)
        return identity

    async def start(self, runners: int) -> None:
        """Starts the services and waits until all runners are ready."""
        registry = RegistryService(
            self._config(registry={"listen": "127.0.0.1:0"}), identity=await self.identity(Role.REGISTRY, "registry")
        )
        await self._run(registry)
        self.registry = registry.address
        for number in range(1, runners + 1):
            name = f"runner-{number}"
            listen = {"listen": "127.0.0.1:0", "registries": [self.registry]}
            runner = RunnerService(
                self._config(runner=listen),
                identity=await self.identity(Role.RUNNER, name),
                engine=FakeEngine(),
                inventory=Inventory(f"node-{number}"),
                name=name,
            )
            await self._run(runner)
        coordinator = CoordinatorService(
            self._config(coordinator={"listen": "127.0.0.1:0", "registries": [self.registry]}),
            identity=await self.identity(Role.COORDINATOR, "coordinator"),
        )
        await self._run(coordinator)
        self.coordinator = coordinator.address
        self.live = coordinator.live
        await coordinator.live.wait_until(lambda directory: len(directory.entries) == runners)

    def client(self, identity: TlsIdentity, **options: Any) -> MeshClient:
        """A client of the coordinator."""
        endpoint = Endpoint.parse(self.coordinator).named("coordinator")
        return MeshClient([endpoint], identity=identity, timeout_s=30, **options)

    def _config(self, **sections: Any) -> ChorusConfig:
        return ChorusConfig.model_validate({"mesh": {"trust_domain": DOMAIN}, **sections})

    async def _run(self, service: Any) -> None:
        self._stack.push_async_callback(service.stop, 0.0)
        await service.start()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RotatingMesh]:
    folder = tmp_path_factory.mktemp("rotating")
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(identity_mesh(folder / "certs", leaf_lifetime_s=LIFE_S))
        rotating = RotatingMesh(at, folder, stack)
        await rotating.start(runners=2)
        yield rotating


async def test_streams_go_on_while_every_certificate_is_replaced_again_and_again(mesh: RotatingMesh) -> None:
    me = await mesh.identity(Role.CLIENT, "kim")
    answers = 0
    async with mesh.client(me) as client:
        while min(len(seen) for seen in mesh.serials.values()) < 2:
            text = f"answer {answers} of a mesh that never stops"
            completion = await client.complete(f"echo:{text}")
            assert completion.text == text
            answers += 1
    async with mesh.client(me, direct="always") as client:
        assert (await client.complete("echo:and direct")).text == "and direct"
    assert answers > 0


async def test_who_was_away_past_its_end_comes_back(mesh: RotatingMesh, tmp_path: Path) -> None:
    await mesh.at.join(tmp_path, await mesh.at.token(Role.CLIENT), name="sleeper")
    directory = tmp_path / "certs" / "client-sleeper"
    identity = TlsIdentity.load(directory)
    await asyncio.sleep(identity.not_after.timestamp() - time.time() + 0.1)  # it sleeps, as TLS counts
    async with mesh.client(identity) as client:
        with pytest.raises(ChorusError):
            await client.complete("echo:hello", timeout_s=2)
        await CertificateKeeper(identity, directory, renewal=mesh.at.where.named("identity")).renew()
        assert (await client.complete("echo:hello")).text == "hello"


async def test_a_stolen_runner_is_out_everywhere_and_its_streams_go_on_elsewhere(mesh: RotatingMesh) -> None:
    me = await mesh.identity(Role.CLIENT, "pat")
    stolen = mesh.kept["runner-runner-1"]
    async with mesh.client(me) as client, mesh.at.admin() as admin:
        await admin.revoke(stolen.spiffe_id, "stolen")
        await mesh.live.wait_until(lambda directory: directory.get("runner-1") is None)
        for service in ("registry-registry", "coordinator-coordinator", "runner-runner-2"):
            identity, told = mesh.kept[service], asyncio.Event()
            identity.on_change(told.set)
            while identity.revoked.of(stolen.spiffe_id, 1) is None:
                await told.wait()
                told.clear()
        assert (await client.complete("echo:still here")).text == "still here"
