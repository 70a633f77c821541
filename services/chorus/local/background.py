"""A supervisor in the background, for `chorus up --detach`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from chorus.core.errors import ConfigError, UnavailableError
from chorus.core.resilience.restarts import ProcessPhase
from chorus.local.home import MeshHome
from chorus.local.process import log_tail
from chorus.local.state import MeshState

SUPERVISOR = "supervisor"
_LOOK_INTERVAL_S = 0.05


def start_in_background(
    home: MeshHome, arguments: Sequence[str], *, on_change: Callable[[MeshState], None] = lambda _: None
) -> MeshState:
    """Starts `chorus up ARGUMENTS` as a process of its own session and waits until its mesh answers.

    The lock must be free. Raises UnavailableError with the supervisor's last words where it ends before that.
    """
    log_file = home.log_file(SUPERVISOR)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            [sys.executable, "-m", "chorus.cli.main", "up", "--json", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)
    try:
        return _wait_ready(home, process, on_change)
    except KeyboardInterrupt:
        process.terminate()  # who gave up waiting does not want a mesh that comes up later
        raise


def _wait_ready(home: MeshHome, process: subprocess.Popen[bytes], on_change: Callable[[MeshState], None]) -> MeshState:
    while process.poll() is None:
        try:
            state = MeshState.read(home.state_file)
        except ConfigError:
            state = None
        if state is not None and state.supervisor.pid == process.pid:
            on_change(state)
            if state.phase == "ready":
                return state
        time.sleep(_LOOK_INTERVAL_S)
    words = [line for line in log_tail(home.log_file(SUPERVISOR), 6) if not line.startswith("{")]
    problem = " ".join(line.removeprefix("error: ") for line in words) or f"exit code {process.returncode}"
    raise UnavailableError(f"{problem} (log: {home.log_file(SUPERVISOR)})")


def start_what_is_down(home: MeshHome, state: MeshState, *, timeout_s: float = 10.0) -> MeshState:
    """Has the supervisor start what was left down; returns the state once nothing is down any more, or time is up."""
    os.kill(state.supervisor.pid, signal.SIGUSR1)
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        state = MeshState.read(home.state_file) or state
        if all(process.phase != ProcessPhase.DOWN for process in state.processes):
            break
        time.sleep(_LOOK_INTERVAL_S)
    return state
