"""The memory that models can be put into: the host's, and that of each graphics device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

HOST = "host"
"""The name of the host's own memory; every other device is a graphics device."""


class Use(StrEnum):
    """What a graphics device is for."""

    DYNAMIC = "dynamic"  # for any model
    DEDICATED = "dedicated"  # for one model
    RESERVED = "reserved"  # for foreign work, such as training; no model ever


@dataclass(frozen=True, slots=True)
class Device:
    """One memory as it is now, in bytes.

    `free_bytes` is what nobody uses, foreign programs included; `reserve_bytes` of it stay free. The models here may
    take `limit_bytes` together, however much is free. A device that `shares_host` has no memory of its own. `model` is
    whom a dedicated one is for.
    """

    name: str
    free_bytes: int
    limit_bytes: int
    reserve_bytes: int = 0
    use: Use = Use.DYNAMIC
    model: str = ""
    shares_host: bool = False

    def room(self, held: int, given_back: int = 0) -> int:
        """Bytes for one model more, where models hold `held` bytes after `given_back` more have been freed.

        What is free limits it, since others use this memory too, and so does the limit, since what was just loaded
        may not be seen in what is free yet. Negative where too much is taken already.
        """
        return min(self.free_bytes + given_back - self.reserve_bytes, self.limit_bytes - held)

    def takes(self, *names: str) -> bool:
        """Whether a model of one of these names may be put here."""
        return self.use is Use.DYNAMIC or (self.use is Use.DEDICATED and self.model in names)


@dataclass(frozen=True, slots=True)
class Machine:
    """The host's memory, and the graphics devices in the order in which the engine counts them."""

    host: Device
    gpus: tuple[Device, ...] = ()

    @property
    def devices(self) -> tuple[Device, ...]:
        """All of them."""
        return (self.host, *self.gpus)
