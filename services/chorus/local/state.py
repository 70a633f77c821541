"""What runs now, as a file: written by the supervisor at every change, read by everybody else."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

from chorus.core.errors import ConfigError

_VERSION = 1
# What the system says of a process's start is rounded to clock ticks, by some systems to whole seconds.
_SAME_START_S = 1.5


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process beyond doubt: a pid is used again sooner or later, but not with the same start time."""

    pid: int
    started_at: float  # seconds since the epoch, as the system tells it

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """Returns the process that has this pid now, or None."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.Error:
            return None

    def find(self) -> psutil.Process | None:
        """Returns the process if it is still the same one and has not ended."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started_at) > _SAME_START_S:
                return None
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.Error:
            return None

    @property
    def alive(self) -> bool:
        """Whether it runs still."""
        return self.find() is not None


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process of the mesh as its supervisor sees it. `phase` is a ProcessPhase's value."""

    name: str
    role: str
    address: str
    phase: str
    log: str
    config: str
    process: ProcessRef | None = None
    failures: int = 0
    starts: int = 0
    last_end: str = ""  # how it ended the last time, for people


@dataclass(frozen=True, slots=True)
class MeshState:
    """A local mesh. `phase` is `starting`, `ready` or `stopping`."""

    supervisor: ProcessRef
    phase: str
    supervised: bool
    trust_domain: str
    certs_dir: str
    coordinator: str  # NAME@HOST:PORT
    identity: str  # folder of the client certificate under certs_dir
    insecure_loopback: bool = False
    models: tuple[str, ...] = ()
    processes: tuple[ProcessState, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether its supervisor runs."""
        return self.supervisor.alive

    def with_process(self, state: ProcessState) -> MeshState:
        """Returns the mesh with one process's state replaced."""
        return replace(
            self, processes=tuple(state if process.name == state.name else process for process in self.processes)
        )

    def write(self, path: Path) -> None:
        """Writes the file, all at once."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n", "utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> MeshState | None:
        """Returns what the file says, or None where there is none. Raises ConfigError where it is not ours."""
        try:
            data = json.loads(path.read_text("utf-8"))
            if data.pop("version") != _VERSION:
                raise ValueError("written by another version of Chorus")
            return cls._from_json(data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; stop what runs there, then remove the file") from error

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> MeshState:
        processes = tuple(
            ProcessState(
                **_known(ProcessState, item) | {"process": ProcessRef(**item["process"]) if item["process"] else None}
            )
            for item in data.pop("processes")
        )
        supervisor = ProcessRef(**data.pop("supervisor"))
        known = _known(cls, data) | {"models": tuple(data["models"])}
        return cls(**known | {"supervisor": supervisor, "processes": processes})


def _known(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    """What of `data` this version has a field for: a mesh started by a newer one can still be seen, and stopped."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def this_process() -> ProcessRef:
    """The process that this code runs in."""
    return ProcessRef(os.getpid(), psutil.Process().create_time())
