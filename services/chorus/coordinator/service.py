"""One coordinator in one event loop: its registries, its channels, its server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

import chorus
from chorus.api.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from chorus.config import ChorusConfig
from chorus.config.secrets import read_secret
from chorus.config.sections import CoordinatorSettings
from chorus.coordinator.admission import Admission
from chorus.coordinator.auditing import Auditing
from chorus.coordinator.caching import AnswerCache
from chorus.coordinator.callers import Callers, read_pepper
from chorus.coordinator.channels import ChannelPool
from chorus.coordinator.costs import Costs
from chorus.coordinator.ensembles import Ensembles
from chorus.coordinator.entitlements import Entitlements
from chorus.coordinator.events import EventBoard
from chorus.coordinator.granting import Granting
from chorus.coordinator.hedging import Hedging
from chorus.coordinator.live import LiveDirectory
from chorus.coordinator.loading import Loading
from chorus.coordinator.oidc import TokenVerifier
from chorus.coordinator.placing import Placing
from chorus.coordinator.registries import Registries
from chorus.coordinator.remembering import Remembering
from chorus.coordinator.requests import Requests, Sink
from chorus.coordinator.semantic import SemanticHits
from chorus.coordinator.servicer import CoordinatorServicer
from chorus.coordinator.watching import Watching
from chorus.coordinator.webhooks import Webhook, Webhooks
from chorus.core.audit import Trail
from chorus.core.cache.budget import Budget
from chorus.core.ensemble.learning import Learner, LearningMode
from chorus.core.ensemble.planning import Policy
from chorus.core.errors import ChorusError, ConfigError, InternalError
from chorus.core.events import EventKind, EventLog
from chorus.core.events.stats import Stats
from chorus.core.identity import Role
from chorus.core.resilience.breakers import BreakerRules
from chorus.core.resilience.hedging import HedgeMode
from chorus.core.resilience.resuming import ResumePolicy
from chorus.store.answer_store import Answers, AnswerStore
from chorus.store.audit_log import open_trail
from chorus.store.callers import CallerStore, FileCallers, ValkeyCallers
from chorus.store.shared_answers import SharedAnswers
from chorus.store.valkey import Valkey
from chorus.telemetry.cache_metrics import CacheMetrics
from chorus.telemetry.event_metrics import EventMetrics
from chorus.telemetry.metrics import GenerationMetrics, RpcMetrics, admission_gauges, new_registry
from chorus.transport import Service, TlsIdentity, build_server
from chorus.transport.process import HostedService

_DESCRIPTOR = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]


class CoordinatorService(HostedService):
    """A coordinator; made, started and stopped on one event loop. Raises ConfigError for addresses that cannot be."""

    def __init__(
        self,
        config: ChorusConfig,
        *,
        identity: TlsIdentity | None,
        metrics: CollectorRegistry | None = None,
        rng: random.Random | None = None,
    ) -> None:
        settings, insecure = config.coordinator, config.mesh.insecure_loopback
        metrics = metrics if metrics is not None else new_registry(service="coordinator", version=chorus.__version__)
        generations = GenerationMetrics(metrics)
        clock = asyncio.get_running_loop().time
        epoch = time.time_ns()
        self.live = LiveDirectory(clock)
        self.events = EventBoard(EventLog(epoch), clock=clock, wall=time.time)
        self.live.on_change(self.events.follow)
        self._webhooks = _webhooks(settings, self.events)
        stats = Stats(clock())
        self.events.on_event(lambda event: stats.take(event, clock()))
        self.events.on_event(EventMetrics(metrics).take)
        self._trail = open_trail(config.audit, f"{Role.COORDINATOR}-{settings.name}")
        auditing = Auditing(self._trail, prompts=config.audit.prompts, clock=clock)
        self.events.on_event(auditing.take)
        self._costs = Costs(config.costs, self.live, name=settings.name)
        self.events.on_event(self._costs.take)
        self._pool = ChannelPool(self.live, identity=identity, insecure_loopback=insecure)
        self.live.on_change(self._pool.follow)
        self._placing = Placing(
            self.live,
            default_model=settings.default_model,
            max_attempts=settings.max_attempts,
            resume=ResumePolicy(wait_s=settings.resume_wait_s, fruitless=settings.max_attempts),
            breaker_rules=BreakerRules(
                failures=settings.breaker_failures,
                window_s=settings.breaker_window_s,
                open_s=settings.breaker_open_s,
            ),
            weights=settings.runner_weights,
            metrics=generations,
            events=self.events,
            coordinator=str(identity.spiffe_id) if identity is not None else "",
            purse=self._costs.purse,
            rng=rng,
        )
        self._registries = Registries(
            settings.registries, directory=self.live, identity=identity, insecure_loopback=insecure
        )
        self._watching = Watching(self.live, epoch=epoch)
        self._admission = Admission(
            self._placing, limit=settings.max_requests, max_queued=settings.max_queued, clock=clock
        )
        admission_gauges(metrics, running=lambda: self._admission.running, waiting=lambda: self._admission.waiting)
        # After placement's own listener: what the mesh has now decides whose turn it is.
        self.live.on_change(lambda _: self._admission.turn())
        self._hedging = Hedging(self._placing, HedgeMode(settings.hedging), clock=clock, metrics=generations)
        requests = Requests(
            self.live,
            self._placing,
            self._pool,
            admission=self._admission,
            hedging=self._hedging,
            costs=self._costs,
            events=self.events,
            connect_timeout_s=settings.connect_timeout_s,
            silence_wait_s=settings.resume_wait_s,
            metrics=generations,
        )
        policy = Policy(profile=config.ensemble.profile, threshold=config.ensemble.confidence_threshold)
        learner = Learner(LearningMode(config.ensemble.learning), rng if rng is not None else random.Random())
        ensembles = Ensembles(self.live, self._placing, requests, events=self.events, policy=policy, learner=learner)
        self._answers = _answer_cache(
            config,
            requests,
            ensembles,
            live=self.live,
            placing=self._placing,
            metrics=metrics,
            on_hit=self._costs.hit,
        )
        self._callers = _callers(config, self._trail, identity, clock)
        entitlements = Entitlements(self._callers, self._placing, auditing.denied)
        self._granting = Granting(
            self.live,
            self._placing,
            self._pool,
            self._admission,
            generations,
            events=self.events,
            entitlements=entitlements,
            identity=identity,
            ttl_s=settings.ticket_ttl_s,
            told_within_s=settings.connect_timeout_s,
        )
        self._loading = Loading(
            self.live,
            self._placing,
            self._pool,
            self._admission,
            self.events,
            busy_s=settings.replicate_busy_s,
            likelihood=settings.preload_likelihood,
            wall=time.time,
        )
        self._remembering = Remembering(
            settings.memory_file, patterns=self._loading.patterns, known=self._placing.known, wall=time.time
        )
        servicer = CoordinatorServicer(
            live=self.live,
            placing=self._placing,
            requests=requests,
            answers=self._answers,
            granting=self._granting,
            registries=self._registries,
            watching=self._watching,
            events=self.events,
            auditing=auditing,
            learner=learner,
            costs=self._costs,
            entitlements=entitlements,
            report=lambda: stats.report(clock()),
        )
        self._server = build_server(
            identity=identity,
            listen=[str(settings.listen)],
            services=[Service(_DESCRIPTOR, coordinator_pb2_grpc.add_CoordinatorServicer_to_server, servicer)],
            callers_listen=str(config.callers.listen) if config.callers.listen is not None else None,
            callers=self._callers,
            health_listen=str(settings.health_listen) if settings.health_listen is not None else None,
            admin_listen=str(settings.admin_listen) if settings.admin_listen is not None else None,
            observer=RpcMetrics(metrics),
            insecure_loopback=insecure,
            max_calls_per_caller=config.mesh.max_calls_per_caller,
            slow_reader_s=config.mesh.slow_reader_s,
            idle_connection_s=config.mesh.idle_connection_s,
        )
        self._watch: asyncio.Task[None] | None = None
        self._ready: asyncio.Task[None] | None = None
        self._loads: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where it serves, as `host:port`; known once started."""
        return self._server.addresses[0]

    @property
    def side_addresses(self) -> Mapping[str, str]:
        """Its other listeners by kind."""
        return self._server.side_addresses

    async def start(self) -> None:
        """Serves at once; healthy as soon as some registry has told of the mesh. Raises ConfigError where the ledger
        can't be had."""
        await self._costs.start()
        await self._remembering.start()
        if self._callers is not None:
            await self._callers.start()
        await self._server.start()
        self._watch = asyncio.create_task(self._registries.run())
        self._ready = asyncio.create_task(self._say_healthy())
        self._loads = asyncio.create_task(self._loading.run())
        self._webhooks.start()

    async def stop(self, grace_s: float) -> None:
        """Takes nothing new, lets requests finish within `grace_s` seconds, and ends."""
        for task in (self._ready, self._loads):
            if task is not None:
                task.cancel()
        self._watching.close()
        self.events.close()
        await self._server.stop(max(grace_s, _ENDING_S))
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        await self._remembering.stop()
        await self._answers.close()
        await self._costs.close()
        await self._granting.close()
        if self._callers is not None:
            await self._callers.close()
        await self._webhooks.stop()
        await self._pool.close()
        self._trail.close()

    async def wait_failed(self) -> ChorusError:
        """Returns once the registries cannot be watched any more, which is a wrong configuration or a defect."""
        assert self._watch is not None, "start() comes first"
        await asyncio.wait({self._watch})
        error: BaseException | None = None if self._watch.cancelled() else self._watch.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, ChorusError):
            return error
        failure = InternalError("the registries are watched no more")
        failure.__cause__ = error
        return failure

    async def _say_healthy(self) -> None:
        await self.live.wait_until(lambda _: bool(self.live.registries()))
        self._server.health.set_serving(True)


def _answer_cache(
    config: ChorusConfig,
    requests: Requests,
    ensembles: Ensembles,
    *,
    live: LiveDirectory,
    placing: Placing,
    metrics: CollectorRegistry,
    on_hit: Callable[[str, int], None],
) -> AnswerCache:
    """The cache as configured, in front of one model and several; nothing is opened before it is used.

    Raises ConfigError.
    """
    settings, store = config.cache, _answer_store(config)

    async def generate(request: coordinator_pb2.GenerateRequest, sink: Sink, admitted_within_s: float | None) -> None:
        if request.HasField("ensemble"):
            await ensembles.generate(request, sink)
        else:
            await requests.generate(request, sink, admitted_within_s=admitted_within_s)

    semantic = SemanticHits(
        requests.embed,
        placing=placing,
        store=store,
        model=settings.embedding_model,
        budget=Budget(wrong=settings.wrong_share),
    )
    return AnswerCache(
        settings,
        generate,
        live=live,
        placing=placing,
        semantic=semantic,
        store=store,
        metrics=CacheMetrics(metrics),
        on_hit=on_hit,
    )


def _answer_store(config: ChorusConfig) -> Answers:
    settings, max_bytes = config.cache, config.cache.max_mib << 20
    if not settings.is_shared:
        return AnswerStore(settings.file, max_entries=settings.max_entries, max_bytes=max_bytes)
    valkey = _valkey(config, "cache.store")
    return SharedAnswers(valkey, ttl_s=settings.ttl_s, max_entries=settings.max_entries, max_bytes=max_bytes)


def _valkey(config: ChorusConfig, key: str) -> Valkey:
    """The server that `key` says is used. Raises ConfigError where none is configured."""
    valkey = Valkey.configured(config.valkey)
    if valkey is None:
        raise ConfigError(
            f"{key}: is valkey, and valkey.url_file says nothing of where that is", metadata={"keys": key}
        )
    return valkey


def _callers(
    config: ChorusConfig, trail: Trail, identity: TlsIdentity | None, clock: Callable[[], float]
) -> Callers | None:
    """Those without a certificate, where they are served. Raises ConfigError."""
    settings = config.callers
    if settings.listen is None or identity is None:
        return None
    store: CallerStore = FileCallers(settings.dir / "callers.db")
    if settings.store == "valkey":
        store = ValkeyCallers(_valkey(config, "callers.store"))
    return Callers(
        store,
        read_pepper(settings.dir),
        trust_domain=identity.spiffe_id.trust_domain,
        verifier=TokenVerifier.configured(settings, clock=clock),
        trail=trail,
        wall=time.time,
        clock=clock,
    )


def _webhooks(settings: CoordinatorSettings, board: EventBoard) -> Webhooks:
    """The webhooks as configured. Raises ConfigError where the secret can't be read."""
    if not settings.webhooks:
        return Webhooks([])
    path = settings.webhook_secret_file
    secret = read_secret(path, key="coordinator.webhook_secret_file") if path is not None else None
    kinds = [EventKind(kind) for kind in settings.webhook_kinds]
    return Webhooks(
        [
            Webhook(
                url,
                name=settings.name,
                kinds=kinds,
                secret=secret,
                board=board,
                wall=time.time,
                rng=random.Random(),
            )
            for url in settings.webhooks
        ]
    )


_ENDING_S = 0.5
"""What ending the watches may take before their connections are cut."""
