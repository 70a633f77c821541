"""What becomes of a message to a webhook after an answer, or none: it arrived, is sent again, or is given up.

Sent again with a pause that doubles, less a share by chance, so that coordinators which lost the same server don't
come back to it together (M. Brooker, "Exponential Backoff And Jitter", 2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

TRIES = 8
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
# What the receiver asks for itself is obeyed up to here; events are lost only once the ring has gone round.
LONGEST_ASKED_S = 300.0
# Of the client errors these pass by themselves: Request Timeout, Too Early, Too Many Requests.
_PASSING = frozenset({408, 425, 429})


class Rng(Protocol):
    """Chance."""

    def random(self) -> float:
        """A number from 0 to 1."""
        ...


@dataclass(frozen=True, slots=True)
class Arrived:
    """The receiver has it."""


@dataclass(frozen=True, slots=True)
class Again:
    """To be sent once more, after so many seconds."""

    pause_s: float


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Not to be sent again."""


Fate: TypeAlias = Arrived | Again | GivenUp


def fate_of(status: int | None, tries: int, *, rng: Rng, retry_after_s: float | None = None) -> Fate:
    """What follows from an HTTP status (None: no answer) after so many tries; `retry_after_s` is the receiver's wish.

    An answer that says that the request itself is wrong, or belongs elsewhere, would be the same the next time.
    """
    if status is not None and 200 <= status < 300:
        return Arrived()
    if tries >= TRIES or (status is not None and status < 500 and status not in _PASSING):
        return GivenUp()
    pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (tries - 1))
    pause_s *= 0.5 + 0.5 * rng.random()
    if retry_after_s is not None and retry_after_s > 0:
        pause_s = max(pause_s, min(retry_after_s, LONGEST_ASKED_S))
    return Again(pause_s)
