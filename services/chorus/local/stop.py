"""Stopping a local mesh from outside, as `chorus down` does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from chorus.core.errors import ConfigError
from chorus.local.home import MeshHome
from chorus.local.state import MeshState, ProcessRef

_LOOK_INTERVAL_S = 0.1
_KILL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class StopReport:
    """What was stopped. `killed` had to be ended the hard way; `left_over` ran on without a supervisor."""

    was_up: bool
    stopped: tuple[str, ...] = ()
    killed: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()


def stop_mesh(
    home: MeshHome, *, timeout_s: float, on_change: Callable[[MeshState], None] = lambda _: None
) -> StopReport:
    """Stops the mesh in `home` and waits until nothing of it runs; what has not ended after `timeout_s` is killed.

    `on_change` sees the state file each time it looks. A mesh that isn't up is no error. Raises ConfigError where a
    process of it is another user's.
    """
    state = MeshState.read(home.state_file)
    if state is None:
        return StopReport(was_up=False)
    supervisor = state.supervisor.find()
    running = _running(state)
    try:
        if supervisor is not None:
            supervisor.terminate()
            _wait(home, supervisor, timeout_s, on_change)
        killed = _kill({"supervisor": state.supervisor.find()}) if supervisor is not None else ()
        # A supervisor that ended in order has ended its children; of one that was killed the kernel ends them, at once.
        left = _kill({name: ref.find() for name, ref in _running(MeshState.read(home.state_file) or state).items()})
    except psutil.AccessDenied as error:
        raise ConfigError(f"process {error.pid} of this mesh belongs to another user; ask them to stop it") from error
    home.state_file.unlink(missing_ok=True)
    if supervisor is None:
        return StopReport(was_up=False, left_over=left)
    return StopReport(was_up=True, stopped=tuple(name for name in running if name not in left), killed=(*killed, *left))


def _running(state: MeshState) -> dict[str, ProcessRef]:
    return {p.name: p.process for p in state.processes if p.process is not None and p.process.alive}


def _wait(home: MeshHome, supervisor: psutil.Process, timeout_s: float, on_change: Callable[[MeshState], None]) -> None:
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        try:
            supervisor.wait(_LOOK_INTERVAL_S)
            return
        except psutil.TimeoutExpired:
            with contextlib.suppress(ConfigError):
                state = MeshState.read(home.state_file)
                if state is not None:
                    on_change(state)


def _kill(processes: dict[str, psutil.Process | None]) -> tuple[str, ...]:
    """Kills those that still run and waits for them; returns their names."""
    there = {name: process for name, process in processes.items() if process is not None}
    for process in there.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(there.values()), timeout=_KILL_WAIT_S)
    return tuple(there)
