"""The process `chorus registry`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

import chorus
from chorus.config import ChorusConfig
from chorus.core.identity import Role
from chorus.registry.service import RegistryService
from chorus.telemetry.metrics import new_registry
from chorus.transport.keeping import keep_identity
from chorus.transport.process import keep_what_there_is, run_service

_NEW_OBJECTS = 10_000
"""After so many more objects the garbage collector looks at the new ones: with 1,000 runners a few times a second."""


def run(config: ChorusConfig) -> int:
    """Runs a registry until it is asked to stop; returns the exit code of the process."""

    async def build(metrics: CollectorRegistry) -> RegistryService:
        identity = await keep_identity(config.mesh, Role.REGISTRY, config.registry.name)
        # A thousand records a second come and go, without cycles: looking for those at Python's own rate, and through
        # all modules and classes each time, takes a tenth of what our own code does with a heartbeat.
        keep_what_there_is(new_objects=_NEW_OBJECTS)
        return RegistryService(config, identity=identity, metrics=metrics)

    return run_service(
        "registry",
        build,
        log=config.log,
        metrics=new_registry(service="registry", version=chorus.__version__),
        metrics_listen=config.registry.metrics_listen,
    )
