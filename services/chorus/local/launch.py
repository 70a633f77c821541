"""Bringing a local mesh up: everything between what the user asked for and a supervisor that runs."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import platformdirs
from filelock import FileLock, Timeout

from chorus.config import LoadedConfig, RunnerSettings
from chorus.core.errors import ConfigError
from chorus.core.identity import Role, SpiffeId
from chorus.core.resilience.restarts import RestartPolicy
from chorus.core.resilience.silence import SILENT_S, ProbePolicy
from chorus.hardware import node_id
from chorus.hardware.cpu import read_cpu
from chorus.local.answer import first_answer
from chorus.local.certificates import CLIENT_NAME, ensure_authority, ensure_leaves
from chorus.local.home import MeshHome
from chorus.local.models import WatchPull, ensure_models
from chorus.local.plan import LOOPBACK, MeshPlan, UpOptions, make_plan
from chorus.local.ports import check_free
from chorus.local.state import MeshState
from chorus.local.stop import stop_mesh
from chorus.local.supervisor import FirstAnswer, Report, Supervisor
from chorus.transport.process import load_identity

_NOT_A_LABEL = re.compile(r"[^a-z0-9]+")
_LEFT_OVER_S = 5.0

_Result = TypeVar("_Result")


class AlreadyUpError(ConfigError):
    """A mesh is up, or coming up, in this folder; `state` is what its supervisor last wrote, if it has yet."""

    def __init__(self, home: MeshHome, state: MeshState | None) -> None:
        pid = f" (supervisor: process {state.supervisor.pid})" if state is not None else ""
        super().__init__(f"a mesh is up in {home.root} already{pid}")
        self.state = state


@dataclass(frozen=True, slots=True)
class Prepared:
    """A mesh that can be started. `issued` counts the certificates that were made for it now."""

    plan: MeshPlan
    issued: int
    left_over: tuple[str, ...]


@contextlib.contextmanager
def locked(home: MeshHome) -> Iterator[None]:
    """Holds the right to start or supervise the mesh in `home`. Raises AlreadyUpError where somebody else has it."""
    home.make()
    lock = FileLock(home.lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AlreadyUpError(home, MeshState.read(home.state_file)) from None
    except OSError as error:
        raise ConfigError(f"{home.lock_file} cannot be locked: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def prepare(options: UpOptions, base: LoadedConfig, watch_pull: WatchPull) -> Prepared:
    """Makes what the mesh needs: the plan, free ports, certificates, models. Call it with the lock held.

    `watch_pull` shows the progress of each model to fetch. Raises ConfigError where a port is taken or the
    configuration cannot be, CertificateError, and as `ensure_models`.
    """
    # With the lock in hand, whatever the state file tells of is what a supervisor that was killed has left.
    left_over = stop_mesh(options.home, timeout_s=_LEFT_OVER_S).left_over
    plan = make_plan(options, base, physical_cores=read_cpu().physical_cores, host_label=host_label())
    check_free(plan.listen_host, plan.ports)
    check_free(LOOPBACK, plan.metrics_ports)
    issued: list[SpiffeId] = []
    if not plan.insecure:
        authority = ensure_authority(plan.certs_dir, trust_domain=plan.trust_domain)
        issued = ensure_leaves(
            plan.certs_dir,
            authority,
            plan.certificates(),
            renewed=plan.leaf_lifetime,
            node=machine_id(base.config.runner),
        )
        plan = plan.with_trust_domain(authority.trust_domain)
    if plan.needs_model_files:
        stored = ensure_models(plan.models, base.config.runner, watch_pull)
        plan = plan.with_models(list(dict.fromkeys(model.artifact.name for model in stored)))
    return Prepared(plan, issued=len(issued), left_over=left_over)


async def supervise(plan: MeshPlan, report: Report) -> None:
    """Runs the mesh until it is asked to stop. Call it with the lock held, on the main thread. Raises as `run`."""
    await _supervisor(plan, report, first_answer(plan.client)).run()


async def while_up(plan: MeshPlan, report: Report, work: Callable[[], Awaitable[_Result]]) -> _Result:
    """Runs the mesh for as long as `work` takes, which is called once the mesh answers; returns its result.

    Call it with the lock held, on the main thread. Raises what `work` raises, KeyboardInterrupt where somebody stopped
    the mesh before it was done, and as `Supervisor.run`.
    """
    results: list[_Result] = []

    async def answer_and_work() -> tuple[str, ...]:
        models = await first_answer(plan.client)()
        results.append(await work())
        supervisor.stop()
        return models

    supervisor = _supervisor(plan, report, answer_and_work)
    await supervisor.run()
    if not results:
        raise KeyboardInterrupt
    return results[0]


def host_label() -> str:
    """This machine's name as a DNS label."""
    name = _NOT_A_LABEL.sub("-", socket.gethostname().partition(".")[0].lower()).strip("-")
    return name[:48].strip("-") or "host"


def machine_id(settings: RunnerSettings) -> str:
    """The id of this machine as its runners state it. Raises ConfigError where it has none, and none can be kept."""
    return node_id(platformdirs.user_state_path("chorus"), override=settings.node_id)


def _supervisor(plan: MeshPlan, report: Report, answer: FirstAnswer) -> Supervisor:
    return Supervisor(
        plan,
        identity=load_identity(plan.client.mesh, Role.CLIENT, CLIENT_NAME),
        policy=RestartPolicy(supervised=plan.options.supervised),
        # Without supervision nothing is started again, so nothing is killed either.
        probes=ProbePolicy(silent_s=plan.options.silent_s if plan.options.supervised else 0),
        report=report,
        first_answer=answer,
    )


def supervisor_arguments(options: UpOptions, config_file: Path | None) -> list[str]:
    """The arguments of `chorus up` that mean the same mesh, for a supervisor in the background."""
    arguments = ["--runners", str(options.runners)]
    if (
        options.home.chosen
    ):  # naming the user's own folder would make it a chosen one, which keeps certificates elsewhere
        arguments += ["--dir", str(options.home.root)]
    if not options.supervised:
        arguments.append("--no-supervise")
    if options.lan_ip is not None:
        arguments += ["--lan", "--lan-address", options.lan_ip]
    if options.port_base is not None:
        arguments += ["--port-base", str(options.port_base)]
    if options.silent_s != SILENT_S:
        arguments += ["--silent-after", f"{options.silent_s:g}"]
    for model in options.models:
        arguments += ["--model", model]
    if config_file is not None:
        arguments += ["--config", str(config_file.absolute())]
    return arguments
