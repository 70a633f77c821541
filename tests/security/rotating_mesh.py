"""A mesh whose members joined by tokens, each kept as its process keeps it: by a CertificateKeeper over its folder."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from cryptography import x509

from chorus.client import MeshClient
from chorus.config import ChorusConfig, Endpoint
from chorus.coordinator.service import CoordinatorService
from chorus.core.identity import Role
from chorus.hardware import Inventory
from chorus.registry.service import RegistryService
from chorus.runner.service import RunnerService
from chorus.testing.engine_fake import FakeEngine
from chorus.transport import TlsIdentity
from chorus.transport.keeping import CertificateKeeper
from tests.identity.identity_mesh import DOMAIN, IdentityMesh


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

    async def identity(self, role: Role, name: str, node: str = "") -> TlsIdentity:
        """Somebody who joined and keeps what they got."""
        home = self._folder / f"{role}-{name}"
        await self.at.join(home, await self.at.token(role), name=name, node=node)
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
                identity=await self.identity(Role.RUNNER, name, f"node-{number}"),
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
