"""`chorus up` as a process of its own, followed by the lines of JSON that it prints."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from chorus.client import MeshClient
from chorus.local.connect import client_config
from chorus.local.home import MeshHome
from chorus.local.ports import find_base
from chorus.local.state import MeshState, ProcessState
from chorus.testing.service import TOKENS_PER_SECOND_ENV

DEADLINE_S = 60.0
"""Nothing here takes so long, unless it never comes."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "chorus.cli.main", *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's own, without what would configure Chorus, with the fake engine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CHORUS_")}
    return kept | {"CHORUS_RUNNER__ENGINE": "fake", TOKENS_PER_SECOND_ENV: "20"} | more


def chorus(*arguments: str, timeout_s: float = DEADLINE_S, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end."""
    return subprocess.run(
        command(*arguments), env=environment(**more), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def free_base() -> int:
    """A base from which all ports of a mesh are free; another process of tests looks elsewhere."""
    return find_base("127.0.0.1", 3, range(20000 + os.getpid() % 40 * 900, 60000, 300))


class UpProcess:
    """Use it as `with`; whatever still runs at its end is killed."""

    def __init__(self, root: Path, *arguments: str, base: int | None = None, **env: str) -> None:
        self.home = MeshHome(root, chosen=True)
        self.base = base if base is not None else free_base()
        self.process = subprocess.Popen(
            command("up", "--dir", str(root), "--json", "--port-base", str(self.base), *arguments),
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.events: list[dict[str, Any]] = []
        self.stderr = ""
        self._arrived: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._hear, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        processes = self.everybody()
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for reader in self._readers:
            reader.join(DEADLINE_S)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """The next event of this kind with these values; those before it are passed over (and kept in `events`)."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            arrived = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            if arrived is None:
                raise AssertionError(f"chorus up ended before {event} {fields}: {self.events[-3:]} {self.stderr}")
            self.events.append(arrived)
            if arrived["event"] == event and all(arrived[key] == value for key, value in fields.items()):
                return arrived

    def wait_ready(self) -> Self:
        """Returns once the mesh answers."""
        self.wait_for("ready")
        return self

    @property
    def state(self) -> MeshState:
        """What the state file says now."""
        state = MeshState.read(self.home.state_file)
        assert state is not None
        return state

    def process_of(self, name: str) -> ProcessState:
        """One process as the state file has it."""
        return next(process for process in self.state.processes if process.name == name)

    def kill(self, name: str) -> int:
        """Ends a process the hard way; returns its pid."""
        ref = self.process_of(name).process
        assert ref is not None
        os.kill(ref.pid, signal.SIGKILL)
        return ref.pid

    def everybody(self) -> list[psutil.Process]:
        """The supervisor and all that descends from it."""
        try:
            supervisor = psutil.Process(self.process.pid)
            return [*supervisor.children(recursive=True), supervisor]
        except psutil.NoSuchProcess:
            return []

    def start_by_hand(self, name: str) -> subprocess.Popen[bytes]:
        """Starts one process as a person would who was told its configuration."""
        arguments = (self.process_of(name).role, "--config", str(self.home.config_file(name)))
        return subprocess.Popen(
            command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def client(self) -> MeshClient:
        """A client of the mesh, for the running event loop."""
        return MeshClient.from_config(client_config(self.home))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._arrived.put(json.loads(line))
        self._arrived.put(None)

    def _hear(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line


def wait_gone(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Waits for processes to end; returns those that did not."""
    _, alive = psutil.wait_procs(list(processes), timeout=DEADLINE_S)
    return list(alive)
