"""The process `chorus runner`."""

from __future__ import annotations

import asyncio
import re
import socket
import sys

import platformdirs
from prometheus_client import CollectorRegistry

import chorus
from chorus.config import ChorusConfig, RunnerSettings
from chorus.core.identity import Role
from chorus.hardware import Inventory, node_id
from chorus.runner.engines import EngineFactory, configured_engine
from chorus.runner.service import RunnerService
from chorus.telemetry.metrics import new_registry
from chorus.transport.keeping import keep_identity
from chorus.transport.process import keep_what_there_is, run_service

_SWITCH_INTERVAL_S = 0.0005
"""How long an engine's thread, back from a step, may wait for the event loop's; Python's own default is 5 ms."""

_NOT_IN_A_LABEL = re.compile(r"[^a-z0-9-]+")


def runner_name(settings: RunnerSettings) -> str:
    """The runner's name: as configured, else this machine's host name as a DNS label."""
    if settings.name is not None:
        return settings.name
    host = socket.gethostname().partition(".")[0].lower()
    return _NOT_IN_A_LABEL.sub("-", host)[:63].strip("-") or "runner"


def run(config: ChorusConfig, *, make_engine: EngineFactory = configured_engine) -> int:
    """Runs a runner until it is asked to stop; returns the exit code of the process."""
    settings = config.runner
    sys.setswitchinterval(_SWITCH_INTERVAL_S)

    async def build(metrics: CollectorRegistry) -> RunnerService:
        name = runner_name(settings)
        node = node_id(platformdirs.user_state_path("chorus"), override=settings.node_id)
        identity = await keep_identity(config.mesh, Role.RUNNER, name, node=node)
        if identity is not None and identity.node is not None and settings.node_id is None:
            node = identity.node  # it can state no other one, though the machine's own id may have changed
        hosted = await asyncio.to_thread(make_engine, settings)
        keep_what_there_is()
        return RunnerService(
            config,
            identity=identity,
            engine=hosted.engine,
            inventory=Inventory(node, gpu_support=hosted.gpu_support),
            name=name,
            models=hosted.models,
            refresh=hosted.refresh,
            broken=hosted.broken,
            metrics=metrics,
        )

    return run_service(
        "runner",
        build,
        log=config.log,
        metrics=new_registry(service="runner", version=chorus.__version__),
        metrics_listen=settings.metrics_listen,
        grace_s=settings.drain_grace_s,
    )
