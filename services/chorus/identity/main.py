"""The process `chorus identity`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

import chorus
from chorus.config import ChorusConfig
from chorus.identity.service import IdentityService
from chorus.telemetry.metrics import new_registry
from chorus.transport.process import run_service


def run(config: ChorusConfig) -> int:
    """Runs an identity service until it is asked to stop; returns the exit code of the process."""

    def build(metrics: CollectorRegistry) -> IdentityService:
        return IdentityService(config, metrics=metrics)

    return run_service(
        "identity",
        build,
        log=config.log,
        metrics=new_registry(service="identity", version=chorus.__version__),
        metrics_listen=config.identity.metrics_listen,
    )
