"""A runner that serves: an engine behind the ModelRunner service, with a lease at every registry."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry

import chorus
from chorus.api.runner.v1 import runner_pb2, runner_pb2_grpc
from chorus.config import ChorusConfig
from chorus.core.errors import ChorusError, InternalError
from chorus.core.fleet.records import Runner, RunnerState
from chorus.core.identity import Role
from chorus.engine.base import Engine
from chorus.hardware import Inventory
from chorus.runner.auditing import Auditing
from chorus.runner.orca import ACCESS as ORCA_ACCESS
from chorus.runner.orca import LoadReporter, orca_service
from chorus.runner.presence import Presence
from chorus.runner.registrations import Registrations
from chorus.runner.servicer import RunnerServicer
from chorus.runner.tickets import TicketDesk
from chorus.runner.vitals import seconds_asleep, watch_vitals
from chorus.runner.work import Work
from chorus.store.audit_log import open_trail
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import GenerationMetrics, MachineMetrics, RpcMetrics
from chorus.transport import Service, TlsIdentity, build_server
from chorus.transport.process import HostedService

DESCRIPTOR = runner_pb2.DESCRIPTOR.services_by_name["ModelRunner"]

_ENDING_S = 1.0
"""What the last answers may take to reach their callers once the engine has stopped."""

_REFRESH_S = 3.0
"""How long a model that was pulled on this machine may wait to be seen."""

_log = get_logger()


class RunnerService(HostedService):
    """One process's runner, called `name`. Made, started and stopped on one event loop.

    `models` are loaded at the start, one after the other; the runner is ready once each is loaded or has failed.
    `refresh` is called every few seconds, for models that came to this machine or left it meanwhile; `broken` returns
    once the engine cannot go on in this process.
    `wall_ms` is the wall clock in milliseconds, `asleep` how long the machine has been suspended so far, in seconds.
    """

    def __init__(
        self,
        config: ChorusConfig,
        *,
        identity: TlsIdentity | None,
        engine: Engine,
        inventory: Inventory,
        name: str,
        models: Iterable[str] = (),
        refresh: Callable[[], Awaitable[None]] | None = None,
        broken: Callable[[], Awaitable[ChorusError]] | None = None,
        metrics: CollectorRegistry | None = None,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        asleep: Callable[[], float] = seconds_asleep,
    ) -> None:
        registry = metrics if metrics is not None else CollectorRegistry()
        settings = config.runner
        self._settings = settings
        self._engine = engine
        self._inventory = inventory
        self._models = tuple(models)
        self._refresh = refresh
        self._broken = broken
        self._asleep = asleep
        self._metrics = GenerationMetrics(registry)
        self._work = Work()
        node = inventory.node()
        self.presence = Presence(
            Runner(
                runner_id=name,
                incarnation=0,
                node_id=node.node_id,
                address="",
                server_name=identity.spiffe_id.dns_name
                if identity is not None
                else f"{name}.runner.{config.mesh.trust_domain}",
                version=chorus.__version__,
                engines=(),
                models=(),
                labels=settings.labels,
            ),
            node,
            engine,
            wall_ms=wall_ms,
        )
        self._machine = MachineMetrics(registry)
        reporter = LoadReporter(self.presence)
        self._desk = TicketDesk(
            self.presence, identity, wall=lambda: wall_ms() / 1000, clock=asyncio.get_running_loop().time
        )
        self._trail = open_trail(config.audit, f"{Role.RUNNER}-{name}")
        own = str(identity.spiffe_id) if identity is not None else ""
        self._auditing = Auditing(self._trail, own, engine.models)
        servicer = RunnerServicer(
            engine,
            self.presence,
            self._work,
            self._metrics,
            reporter,
            self._desk,
            self._auditing,
            allow_load=settings.allow_load,
        )
        self._server = build_server(
            identity=identity,
            listen=[str(settings.listen)],
            services=[
                Service(DESCRIPTOR, runner_pb2_grpc.add_ModelRunnerServicer_to_server, servicer),
                orca_service(reporter),
            ],
            extra_access=ORCA_ACCESS,
            health_listen=None if settings.health_listen is None else str(settings.health_listen),
            admin_listen=None if settings.admin_listen is None else str(settings.admin_listen),
            observer=RpcMetrics(registry),
            insecure_loopback=config.mesh.insecure_loopback,
            max_calls_per_caller=config.mesh.max_calls_per_caller,
            slow_reader_s=config.mesh.slow_reader_s,
        )
        self._registrations = Registrations(
            settings.registries,
            self.presence,
            identity=identity,
            insecure_loopback=config.mesh.insecure_loopback,
            jitter=random.Random().random,  # the global generator belongs to whoever embeds this
        )
        self._essential: set[asyncio.Task[None]] = set()
        self._breaking: asyncio.Task[ChorusError] | None = None
        self._looking_after: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where it serves, as `host:port`; known once started."""
        return self._server.addresses[0]

    @property
    def side_addresses(self) -> Mapping[str, str]:
        """Its health and admin listeners, where it has them."""
        return self._server.side_addresses

    async def start(self) -> None:
        """Serves and registers, while the models still load. Raises ConfigError, or what the engine raises."""
        await self._engine.start()
        self._engine.on_change(self.presence.models_changed)
        self._engine.on_change(self._auditing.look)
        self._auditing.look()
        await self._server.start()
        self.presence.set_address(self._settings.dial_address(self._server.port).authority)
        vitals = watch_vitals(
            self.presence,
            self._inventory,
            load_report=self._engine.load_report,
            metrics=self._metrics,
            machine=self._machine,
            asleep=self._asleep,
        )
        self._essential = {
            asyncio.create_task(self._registrations.run(), name="registrations"),
            asyncio.create_task(vitals, name="vitals"),
        }
        self._looking_after = asyncio.create_task(self._look_after_models(), name="models")
        if self._broken is not None:
            self._breaking = asyncio.create_task(_awaited(self._broken()), name="engine")

    async def stop(self, grace_s: float) -> None:
        """Drains: tells everybody, lets running requests finish within `grace_s`, and leaves. May be called again."""
        self._work.drain()
        self._server.drain()
        self.presence.set_state(RunnerState.DRAINING)
        await _cancel({self._looking_after} if self._looking_after is not None else set())
        if not await self._work.finished(grace_s):
            _log.warning("runner.cut_off", running=self._work.count, after_s=grace_s)
        if self._breaking is not None and not self._breaking.done():
            await _cancel({self._breaking})
        await _cancel(self._essential)
        await self._registrations.close(goodbye=True)
        # What still runs is ended by the engine, so that its callers learn that another runner would take it.
        await self._engine.stop()
        await self._work.finished(_ENDING_S)
        self._desk.close()
        await self._server.stop(_ENDING_S)
        self._inventory.close()
        self._trail.close()

    @property
    def leaves_threads(self) -> bool:
        """Whether the engine has a thread that may never end."""
        return self._breaking is not None and self._breaking.done() and not self._breaking.cancelled()

    async def wait_failed(self) -> ChorusError:
        """Returns once a newer process of this runner has taken its place, its engine broke, or something else did."""
        parts: set[asyncio.Task[Any]] = {*self._essential, *({self._breaking} if self._breaking is not None else ())}
        done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        first = next(iter(done))
        error = first.exception()
        if isinstance(error, ChorusError):
            return error
        if error is None and first is self._breaking:
            return self._breaking.result()
        _log.error("runner.broken", exc_info=error)
        return InternalError(f"a part of the runner ended: {error!r}")

    async def _look_after_models(self) -> None:
        for model in self._models:
            try:
                await self._engine.load(model)
            except ChorusError as error:
                _log.error("model.load_failed", model=model, reason=error.reason, why=error.message)
        self.presence.set_state(RunnerState.READY)
        self._server.health.set_serving(True)
        while self._refresh is not None:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self._refresh()
            except (ChorusError, OSError) as error:
                _log.warning("models.not_refreshed", why=str(error))


async def _awaited(error: Awaitable[ChorusError]) -> ChorusError:
    return await error


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
