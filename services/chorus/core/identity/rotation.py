"""One authority takes over from another, so that nobody is ever shown what he can't check yet.

First everybody is to believe both, which they learn with their next certificate, while the old one goes on signing
(spreading). Then the new one signs, and both are believed (overlapping). Once nobody has a certificate of the old one
any more, it is forgotten. Who is away is waited for: while spreading, for as long as his certificate is good; while
overlapping, for as long as he might renew it.

Pure; times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from chorus.core.identity.renewal import GRACE_S

if TYPE_CHECKING:
    from chorus.core.identity.ledger import Member
    from chorus.core.identity.spiffe import SpiffeId


class Phase(StrEnum):
    """How far it is."""

    SPREADING = "spreading"
    OVERLAPPING = "overlapping"


@dataclass(frozen=True, slots=True)
class Rotation:
    """One that is under way: when everybody began to be told of the new authority, and when it began to sign."""

    began_at: float
    switched_at: float | None = None

    @property
    def phase(self) -> Phase:
        """How far it is."""
        return Phase.SPREADING if self.switched_at is None else Phase.OVERLAPPING

    @property
    def since(self) -> float:
        """When the phase began."""
        return self.began_at if self.switched_at is None else self.switched_at


def waits_for(rotation: Rotation, members: Iterable[Member], now: float) -> tuple[SpiffeId, ...]:
    """Who has got no certificate since the phase began, and has to before the next one."""
    patience_s = 0.0 if rotation.phase is Phase.SPREADING else GRACE_S
    return tuple(
        member.identity
        for member in members
        if member.renewed_at <= rotation.since and now <= member.not_after + patience_s
    )


def is_due(rotation: Rotation, members: Iterable[Member], now: float, *, life_s: float) -> bool:
    """Whether the next phase may begin. `life_s`: how long certificates live, within which services renew that nobody
    has noted yet."""
    return now >= rotation.since + life_s and not waits_for(rotation, members, now)
