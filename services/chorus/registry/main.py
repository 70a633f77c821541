"""The process `chorus registry`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

import chorus
from chorus.config import ChorusConfig
from chorus.core.identity import Role
from chorus.registry.service import RegistryService
from chorus.telemetry.metrics import new_registry
from chorus.transport.keeping import keep_identity
from chorus.transport.process import run_service


def run(config: ChorusConfig) -> int:
    """Runs a registry until it is asked to stop; returns the exit code of the process."""

    async def build(metrics: CollectorRegistry) -> RegistryService:
        identity = await keep_identity(config.mesh, Role.REGISTRY, config.registry.name)
        return RegistryService(config, identity=identity, metrics=metrics)

    return run_service(
        "registry",
        build,
        log=config.log,
        metrics=new_registry(service="registry", version=chorus.__version__),
        metrics_listen=config.registry.metrics_listen,
    )
