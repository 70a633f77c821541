"""What is noted, and by whom it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

Fact: TypeAlias = str | int | bool


class DeedKind(StrEnum):
    """What somebody did. The values are in files that outlive a version: new ones come, none is changed."""

    TOKEN_CREATED = "token.created"  # noqa: S105
    TOKEN_REVOKED = "token.revoked"  # noqa: S105
    TOKEN_USED = "token.used"  # noqa: S105
    MEMBER_JOINED = "member.joined"
    MEMBER_RENEWED = "member.renewed"
    MEMBER_REVOKED = "member.revoked"
    MEMBER_RESTORED = "member.restored"
    AUTHORITY_ROTATED = "authority.rotated"
    KEY_CREATED = "key.created"
    KEY_REVOKED = "key.revoked"
    REQUEST_RECEIVED = "request.received"
    REQUEST_FINISHED = "request.finished"
    REQUEST_REFUSED = "request.refused"
    CACHE_CLEARED = "cache.cleared"
    LOAD_ASKED = "model.load_asked"
    UNLOAD_ASKED = "model.unload_asked"
    MODEL_LOADED = "model.loaded"
    MODEL_UNLOADED = "model.unloaded"
    LOG_OPENED = "log.opened"
    LOG_LOST = "log.lost"


@dataclass(frozen=True, slots=True)
class Deed:
    """`by` did `kind` to `target` at `at` (seconds since 1970).

    `by` is a SPIFFE id, or empty where nobody can be named; `target` a model, a token's id or a SPIFFE id. `kind`
    may be one of a later version, where it was read.
    """

    at: float
    by: str
    kind: str
    target: str = ""
    facts: Mapping[str, Fact] = field(default_factory=dict)


class Trail(Protocol):
    """Where deeds are noted. Noting one is quick and never fails."""

    def note(self, kind: DeedKind, *, by: str, target: str = "", **facts: Fact) -> None:
        """It has been done, just now."""

    def flush(self) -> bool:
        """Waits until what was noted is kept; whether it is."""

    def close(self) -> None:
        """Keeps what is left, and ends. May be called again."""


class NoTrail:
    """The trail of a service that keeps none."""

    def note(self, kind: DeedKind, *, by: str, target: str = "", **facts: Fact) -> None:
        """Forgets it."""

    def flush(self) -> bool:
        """Nothing is kept, and nothing is lacking."""
        return True

    def close(self) -> None:
        """There is nothing to end."""
