"""`chorus registry|runner|coordinator|identity`: one service in this process, by flags, environment and file."""

from __future__ import annotations

import os

import typer

from chorus.cli.options import configured
from chorus.config import ChorusConfig
from chorus.local.lifeline import follow_supervisor
from chorus.telemetry.corelog import prepare_core


def _prepare() -> None:
    """What comes before anything imports gRPC."""
    follow_supervisor(os.environ)
    prepare_core()


def run_registry(config: ChorusConfig) -> None:
    """Runs a registry, and ends the command with its exit code."""
    _prepare()
    from chorus.registry.main import run

    raise typer.Exit(run(config))


def run_runner(config: ChorusConfig) -> None:
    """Runs a runner, and ends the command with its exit code."""
    _prepare()
    from chorus.runner.main import run

    if config.runner.engine == "fake":
        from chorus.testing.service import make_fake_engine

        raise typer.Exit(run(config, make_engine=make_fake_engine))
    if config.runner.engine == "faulty":
        from chorus.testing.engine_faulty import make_faulty_engine

        raise typer.Exit(run(config, make_engine=make_faulty_engine))
    raise typer.Exit(run(config))


def run_coordinator(config: ChorusConfig) -> None:
    """Runs a coordinator, and ends the command with its exit code."""
    _prepare()
    from chorus.coordinator.main import run

    raise typer.Exit(run(config))


def run_identity(config: ChorusConfig) -> None:
    """Runs an identity service, and ends the command with its exit code."""
    _prepare()
    from chorus.identity.main import run

    raise typer.Exit(run(config))


registry = configured(
    "registry",
    ("registry", "mesh", "log"),
    "Run a registry: it knows which runners live.\n\nCtrl-C or SIGTERM stops it; runners find it again by themselves.",
    run_registry,
)
runner = configured(
    "runner",
    ("runner", "mesh", "log", "audit"),
    "Run a runner: it makes this machine's models answer.\n\nCtrl-C or SIGTERM lets running answers finish first.",
    run_runner,
)
coordinator = configured(
    "coordinator",
    ("coordinator", "cache", "callers", "valkey", "costs", "mesh", "log", "audit"),
    "Run a coordinator: it picks who answers.\n\nCtrl-C or SIGTERM lets running answers finish first.",
    run_coordinator,
)
identity = configured(
    "identity",
    ("identity", "mesh", "log", "audit"),
    "Run the identity service: it has the authority's key, lets machines join and shuts them out.\n\n"
    "One for a mesh, on the machine where `chorus certs init` was run. Back up its certificates folder.",
    run_identity,
)
