"""What a supervisor tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from chorus.core.resilience.restarts import Decision
from chorus.local.state import MeshState


@dataclass(frozen=True, slots=True)
class Started:
    """A process runs; it need not serve yet. `again` where it ran before."""

    name: str
    pid: int
    again: bool


@dataclass(frozen=True, slots=True)
class Serving:
    """A process says that it serves."""

    name: str


@dataclass(frozen=True, slots=True)
class Silent:
    """A process that lives has answered nothing for so long that it is stopped, or hangs; it is killed now."""

    name: str
    pid: int
    silent_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A process ended though nobody asked it to. `how` reads on from its name; `log_lines` are its last words."""

    name: str
    how: str
    decision: Decision
    log: str
    log_lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The mesh answers."""

    state: MeshState


@dataclass(frozen=True, slots=True)
class Stopping:
    """A process was asked to end; what it is answering may take `grace_s` more."""

    name: str
    grace_s: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """A process has ended as asked; `politely` False where it had to be killed."""

    name: str
    politely: bool


SupervisorEvent: TypeAlias = Started | Serving | Silent | Ended | Ready | Stopping | Stopped
