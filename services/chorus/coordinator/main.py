"""The process `chorus coordinator`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

import chorus
from chorus.config import ChorusConfig
from chorus.coordinator.service import CoordinatorService
from chorus.core.identity import Role
from chorus.telemetry.metrics import new_registry
from chorus.transport.keeping import keep_identity
from chorus.transport.process import keep_what_there_is, run_service

_NEW_OBJECTS = 10_000
"""After so many more objects the garbage collector looks at the new ones. What requests leave has no cycles, and at
Python's own rate one cached answer in a hundred waits some milliseconds for a look at all objects."""


def run(config: ChorusConfig) -> int:
    """Runs a coordinator until it is asked to stop; returns the exit code of the process."""

    async def build(metrics: CollectorRegistry) -> CoordinatorService:
        identity = await keep_identity(config.mesh, Role.COORDINATOR, config.coordinator.name)
        keep_what_there_is(new_objects=_NEW_OBJECTS)
        return CoordinatorService(config, identity=identity, metrics=metrics)

    return run_service(
        "coordinator",
        build,
        log=config.log,
        metrics=new_registry(service="coordinator", version=chorus.__version__),
        metrics_listen=config.coordinator.metrics_listen,
        grace_s=config.coordinator.drain_grace_s,
    )
