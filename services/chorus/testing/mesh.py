"""A whole mesh in one event loop, over real mutual TLS on loopback: registries, runners of fake engines, coordinators.

    async with InProcessMesh(runners=2) as mesh:
        answer = await mesh.client().complete("hello")

Nothing in here sleeps or polls: what a test waits for is a condition on a coordinator's directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry

from chorus.client import MeshClient
from chorus.client.direct import DirectMode
from chorus.config import ChorusConfig, Endpoint
from chorus.coordinator.service import CoordinatorService
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import RunnerState
from chorus.core.identity import Role
from chorus.engine.base import Engine
from chorus.hardware import Inventory
from chorus.registry.service import RegistryService
from chorus.runner.service import RunnerService
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine

_LOOPBACK = "127.0.0.1:0"
# A tenth of the ordinary times: who dies is missed sooner.
QUICK_REGISTRY: Mapping[str, Any] = {
    "lease_ttl_s": 1.0,
    "heartbeat_interval_s": 0.1,
    "watch_flush_interval_s": 0.01,
}


class InProcessMesh:
    """Use it as `async with`. Services are named `registry-1`, `runner-1`, `coordinator-1` and so on; so are the lists.

    `runners` is a number of runners with fake engines, or their engines. The mappings are settings of every service of
    a kind. `certificates` may be shared by several meshes, one after the other, to save the time of making them.
    """

    def __init__(
        self,
        *,
        runners: int | Sequence[Engine] = 1,
        registries: int = 1,
        coordinators: int = 1,
        registry: Mapping[str, Any] | None = None,
        runner: Mapping[str, Any] | None = None,
        coordinator: Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
        audit: Mapping[str, Any] | None = None,
        ensemble: Mapping[str, Any] | None = None,
        mesh: Mapping[str, Any] | None = None,
        callers: Mapping[str, Any] | None = None,
        valkey: Mapping[str, Any] | None = None,
        costs: Mapping[str, Any] | None = None,
        certificates: MeshCertificates | None = None,
    ) -> None:
        self.certificates = certificates if certificates is not None else MeshCertificates()
        self.registries: list[RegistryService] = []
        self.runners: list[RunnerService] = []
        self.coordinators: list[CoordinatorService] = []
        self.coordinator_metrics: list[CollectorRegistry] = []
        self._engines = [FakeEngine() for _ in range(runners)] if isinstance(runners, int) else list(runners)
        self._counts = (registries, coordinators)
        self._registry_settings = {**QUICK_REGISTRY, **(registry or {})}
        self._runner_settings = dict(runner or {})
        self._coordinator_settings = dict(coordinator or {})
        self._cache_settings = dict(cache or {})
        self._audit_settings = dict(audit or {})
        self._ensemble_settings = dict(ensemble or {})
        self._mesh_settings = dict(mesh or {})
        self._caller_settings = {"listen": _LOOPBACK, **callers} if callers is not None else {}
        self._valkey_settings = dict(valkey or {})
        self._costs_settings = dict(costs or {})
        self._registry_endpoints: list[str] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        registries, coordinators = self._counts
        try:
            for _ in range(registries):
                await self.add_registry()
            for engine in self._engines:
                await self.add_runner(engine)
            for _ in range(coordinators):
                await self.add_coordinator()
            for index in range(coordinators):
                await self.until(self._everybody_is_ready, coordinator=index)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # --- services ---------------------------------------------------------------------------------------------------

    async def add_registry(self) -> RegistryService:
        """Starts another registry; services that run already do not know of it."""
        name = f"registry-{len(self.registries) + 1}"
        service = await self._start_registry(name, _LOOPBACK)
        self.registries.append(service)
        self._registry_endpoints.append(f"{name}@{service.address}")
        return service

    async def restart_registry(self, index: int = 0) -> RegistryService:
        """Ends a registry and starts another life of it at the same address."""
        old = self.registries[index]
        address = old.address
        await old.stop(0.0)
        self.registries[index] = await self._start_registry(f"registry-{index + 1}", address)
        return self.registries[index]

    async def add_runner(
        self, engine: Engine | None = None, *, name: str = "", models: Sequence[str] = (), **settings: Any
    ) -> RunnerService:
        """Starts another runner, on a node of its own; it is in the directory soon."""
        name = name or f"runner-{len(self.runners) + 1}"
        config = self._config(
            runner={
                "listen": _LOOPBACK,
                "registries": self._registry_endpoints,
                **self._runner_settings,
                **settings,
            }
        )
        service = RunnerService(
            config,
            identity=self.certificates.identity(Role.RUNNER, name),
            engine=engine if engine is not None else FakeEngine(),
            inventory=Inventory(f"node-of-{name}"),
            name=name,
            models=models,
        )
        self._stack.push_async_callback(service.stop, 0.0)
        await service.start()
        self.runners.append(service)
        return service

    async def kill_runner(self, index: int = 0) -> None:
        """Ends a runner as a kill would: no farewell to registries, and its connections break."""
        await self.silence_runner(index)
        await self.runners[index]._server.stop(0)

    async def silence_runner(self, index: int = 0) -> None:
        """Ends a runner's heartbeats alone: its connections stay open, as those of a process that stands still do."""
        service = self.runners[index]
        for task in service._essential:
            task.cancel()
        await service._registrations.close(goodbye=False)

    async def add_coordinator(self, **settings: Any) -> CoordinatorService:
        """Starts another coordinator; it may not know anybody yet."""
        name = f"coordinator-{len(self.coordinators) + 1}"
        service, metrics = await self._start_coordinator(name, settings)
        self.coordinator_metrics.append(metrics)
        self.coordinators.append(service)
        return service

    async def kill_coordinator(self, index: int = 0) -> None:
        """Ends a coordinator as a kill would: its connections break, and nothing listens there any more."""
        await self.coordinators[index]._server.stop(0)

    async def restart_coordinator(self, index: int = 0) -> CoordinatorService:
        """Ends a coordinator and starts another life of it at the same address; what it counts begins anew."""
        old = self.coordinators[index]
        address = old.address
        await old.stop(0.0)
        self.coordinators[index], self.coordinator_metrics[index] = await self._start_coordinator(
            f"coordinator-{index + 1}", {"listen": address}
        )
        return self.coordinators[index]

    # --- using it ---------------------------------------------------------------------------------------------------

    def client(
        self,
        *,
        role: Role = Role.CLIENT,
        name: str = "client-1",
        timeout_s: float = 30.0,
        coordinators: Sequence[int] | None = None,
        direct: DirectMode = "never",
    ) -> MeshClient:
        """A client of every coordinator, or of some by index, closed with the mesh.

        It goes through coordinators unless told otherwise: a test that looks at what they do sees every request.
        """
        endpoints = self.coordinator_endpoints()
        if coordinators is not None:
            endpoints = [endpoints[index] for index in coordinators]
        client = MeshClient(
            [Endpoint.parse(text) for text in endpoints],
            identity=self.certificates.identity(role, name),
            timeout_s=timeout_s,
            direct=direct,
        )
        self._stack.push_async_callback(client.aclose)
        return client

    def key_client(
        self, api_key_file: Path, *, ca: str, timeout_s: float = 30.0, coordinators: Sequence[int] | None = None
    ) -> MeshClient:
        """A client that shows a key, of every coordinator or of some by index, closed with the mesh. It blocks where
        `ca` is a fingerprint: use a thread then."""
        chosen = range(len(self.coordinators)) if coordinators is None else coordinators
        endpoints = [
            f"coordinator-{index + 1}@{self.coordinators[index].side_addresses['callers']}" for index in chosen
        ]
        client = MeshClient.with_key(*endpoints, api_key_file=api_key_file, ca=ca, timeout_s=timeout_s)
        self._stack.push_async_callback(client.aclose)
        return client

    def coordinator_endpoints(self) -> list[str]:
        """The coordinators, as a client's configuration names them."""
        return [f"coordinator-{number}@{service.address}" for number, service in enumerate(self.coordinators, start=1)]

    def client_config(self, certs_dir: Path, *, name: str = "cli") -> ChorusConfig:
        """The configuration of a client, whose certificate is written to a folder in `certs_dir`."""
        identity = self.certificates.leaf(Role.CLIENT, name).write(certs_dir).name
        return ChorusConfig.model_validate(
            {
                "mesh": {"trust_domain": self._trust_domain, "certs_dir": certs_dir},
                "client": {"coordinators": self.coordinator_endpoints(), "identity": identity},
            }
        )

    async def until(self, condition: Callable[[Directory], bool], *, coordinator: int = 0) -> Directory:
        """Waits until a condition holds of a coordinator's directory."""
        return await self.coordinators[coordinator].live.wait_until(condition)

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _trust_domain(self) -> str:
        return self.certificates.authority.trust_domain

    def _config(self, **sections: Mapping[str, Any]) -> ChorusConfig:
        own = {"audit": self._audit_settings, "ensemble": self._ensemble_settings}
        mesh = {"trust_domain": self._trust_domain, **self._mesh_settings}
        return ChorusConfig.model_validate({"mesh": mesh, **own, **sections})

    async def _start_registry(self, name: str, listen: str) -> RegistryService:
        config = self._config(registry={"name": name, "listen": listen, **self._registry_settings})
        service = RegistryService(config, identity=self.certificates.identity(Role.REGISTRY, name))
        self._stack.push_async_callback(service.stop, 0.0)
        await service.start()
        return service

    async def _start_coordinator(
        self, name: str, settings: Mapping[str, Any]
    ) -> tuple[CoordinatorService, CollectorRegistry]:
        config = self._config(
            coordinator={
                "name": name,
                "listen": _LOOPBACK,
                "registries": self._registry_endpoints,
                **self._coordinator_settings,
                **settings,
            },
            cache=self._cache_settings,
            callers=self._caller_settings,
            valkey=self._valkey_settings,
            costs=self._costs_settings,
        )
        metrics = CollectorRegistry()
        service = CoordinatorService(
            config, identity=self.certificates.identity(Role.COORDINATOR, name), metrics=metrics
        )
        self._stack.push_async_callback(service.stop, 0.0)
        await service.start()
        return service, metrics

    def _everybody_is_ready(self, directory: Directory) -> bool:
        entries = [directory.get(service.presence.runner_id) for service in self.runners]
        return all(entry is not None and entry.record.state is RunnerState.READY for entry in entries)
