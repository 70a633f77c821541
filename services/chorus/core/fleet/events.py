"""What a registry says of its directory: a snapshot, what changed since, or that nothing did.

The order, and what `synced` means, is the contract of registry.v1's DirectoryEvent. A delta names each runner once: as
an upsert or as a removal.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from chorus.core.fleet.records import RunnerRecord


class RemovalReason(StrEnum):
    """Why a runner left."""

    EXPIRED = "expired"
    DEREGISTERED = "deregistered"


@dataclass(frozen=True, slots=True)
class LeasedRecord:
    """A runner with its lease, both in seconds and relative to when this was made, so that no two clocks are compared.

    `lease_age_s` is the age of its last sign of life. `lease_expires_in_s` may be negative between a lapse and the next
    sweep, and is None where the sender is not the one who holds the lease.
    """

    record: RunnerRecord
    lease_age_s: float = 0.0
    lease_expires_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class Removal:
    """A runner that left; a newer incarnation of it stays."""

    runner_id: str
    incarnation: int
    reason: RemovalReason


@dataclass(frozen=True, slots=True)
class SnapshotEvent:
    """The whole directory of one registry; removes nobody unless `synced`."""

    epoch: int
    revision: int
    synced: bool
    runners: tuple[LeasedRecord, ...]


@dataclass(frozen=True, slots=True)
class DeltaEvent:
    """What changed since the event before."""

    epoch: int
    revision: int
    synced: bool
    upserts: tuple[LeasedRecord, ...] = ()
    removals: tuple[Removal, ...] = ()


@dataclass(frozen=True, slots=True)
class BookmarkEvent:
    """Nothing changed (but `synced` may have); the registry lives."""

    epoch: int
    revision: int
    synced: bool


DirectoryEvent: TypeAlias = SnapshotEvent | DeltaEvent | BookmarkEvent
