"""The books of direct mode: places that a coordinator keeps for generations that it doesn't see.

A grant is open from its ticket on. It is closed by the first of these: the runner tells of the end; nobody has come
with the ticket by the time that it lapses; the client gives it back; the runner's process is gone; or nothing was heard
of the runner for so long that the place can't be kept any more. Whatever the client does, every grant is closed, once;
but a ticket that was given back and is used all the same, for as long as it is good, opens its grant again.

A client that uses its ticket does so at once, and one that has gone away never will; a ticket lives longer than that,
since clocks differ. So the place of a ticket with which nobody has come is free again after a short while, and who
comes late is served all the same: the grant is open for as long as the ticket is good.

Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeAlias, TypeVar

from chorus.core.identity.tickets import TicketUse

T = TypeVar("T")

# A runner whose connection broke may come back and tell; its process is gone when it leaves the directory.
LOST_S = 30.0
# A client has to shake hands with the runner, over a slow Wi-Fi too, and the runner's word of it has to arrive.
HOLD_S = 3.0

RunnerLife: TypeAlias = tuple[str, int]
"""A runner's id and incarnation."""


class Closing(StrEnum):
    """Why a grant was closed."""

    ENDED = "ended"  # the runner told of the end
    UNUSED = "unused"  # nobody came
    RETURNED = "returned"  # the client gave it back
    LOST = "lost"  # the runner went, or was out of sight, while it may have been used


@dataclass(frozen=True, slots=True)
class Closed(Generic[T]):
    """A grant that is closed: what was `held` for it, and what the runner told of it, if it did."""

    held: T
    closing: Closing
    use: TicketUse | None = None


@dataclass(frozen=True, slots=True)
class Told(Generic[T]):
    """What follows from a runner's word: grants that are used after all, though they were overdue or given back, then
    the closed."""

    late: list[T]
    closed: list[Closed[T]]


@dataclass(slots=True)
class _Grant(Generic[T]):
    caller: str
    life: RunnerLife
    held: T
    due: float
    lapses_at: float
    begun: bool = False
    overdue: bool = False


class Grants(Generic[T]):
    """The open grants, by their tickets' ids. Everything that closes some returns them."""

    def __init__(self, *, hold_s: float = HOLD_S, lost_s: float = LOST_S) -> None:
        self._hold_s = hold_s
        self._lost_s = lost_s
        self._open: dict[str, _Grant[T]] = {}
        self._returned: dict[str, _Grant[T]] = {}  # their tickets may be good still
        self._unseen_since: dict[RunnerLife, float] = {}  # of lives with open grants that can't be heard now

    def __len__(self) -> int:
        return len(self._open)

    def grant(self, ticket_id: str, caller: str, life: RunnerLife, held: T, *, now: float, lapses_at: float) -> None:
        """A ticket was granted; nobody can come with it any more after `lapses_at`. Its runner can be heard now."""
        self._open[ticket_id] = _Grant(caller, life, held, now + self._hold_s, lapses_at)

    def told(self, life: RunnerLife, uses: Iterable[TicketUse], *, whole: bool = False) -> Told[T]:
        """A runner has told of tickets; `whole`: of all that came and are remembered there."""
        self._unseen_since.pop(life, None)
        late: list[T] = []
        closed: list[Closed[T]] = []
        seen: set[str] = set()
        for use in uses:
            seen.add(use.ticket_id)
            grant = self._open.get(use.ticket_id) or self._returned.get(use.ticket_id)
            if grant is None or grant.life != life:
                continue
            if self._returned.pop(use.ticket_id, None) is not None:
                self._open[use.ticket_id] = grant
            if grant.overdue and not grant.begun:
                late.append(grant.held)
            grant.begun = True
            if use.ended:
                closed.append(self._close(use.ticket_id, Closing.ENDED, use))
        if whole:  # its end was told while nobody listened, and is forgotten
            missing = [
                key for key, grant in self._open.items() if grant.life == life and grant.begun and key not in seen
            ]
            closed += [self._close(key, Closing.LOST) for key in missing]
        return Told(late, closed)

    def overdue(self, now: float) -> list[T]:
        """Those whose clients should have come by now, each once: their places are free. Call it before `sweep`."""
        found: list[T] = []
        for grant in self._open.values():
            if now >= grant.due and not (grant.begun or grant.overdue or grant.life in self._unseen_since):
                grant.overdue = True
                found.append(grant.held)
        return found

    def unheard(self, life: RunnerLife, now: float) -> None:
        """The connection over which a runner tells is gone."""
        if any(grant.life == life for grant in self._open.values()):
            self._unseen_since.setdefault(life, now)

    def gone(self, life: RunnerLife) -> list[Closed[T]]:
        """That life of a runner has ended."""
        self._unseen_since.pop(life, None)
        self._returned = {key: grant for key, grant in self._returned.items() if grant.life != life}
        keys = [key for key, grant in self._open.items() if grant.life == life]
        return [self._close(key, Closing.LOST if self._open[key].begun else Closing.UNUSED) for key in keys]

    def returned(self, ticket_id: str, caller: str) -> list[Closed[T]]:
        """A caller says that it won't use a ticket; one that was used, or is another's, stays as it is."""
        grant = self._open.get(ticket_id)
        if grant is None or grant.caller != caller or grant.begun:
            return []
        grant.overdue = True
        self._returned[ticket_id] = grant
        return [self._close(ticket_id, Closing.RETURNED)]

    def sweep(self, now: float) -> list[Closed[T]]:
        """Closes what has lapsed; call it now and then."""
        self._returned = {key: grant for key, grant in self._returned.items() if now < grant.lapses_at}
        closed: list[Closed[T]] = []
        for key, grant in tuple(self._open.items()):
            unseen_since = self._unseen_since.get(grant.life)
            lost = unseen_since is not None and now >= unseen_since + self._lost_s
            if grant.begun:
                if lost:
                    closed.append(self._close(key, Closing.LOST))
            elif now >= grant.lapses_at and (unseen_since is None or lost):
                closed.append(self._close(key, Closing.UNUSED if unseen_since is None else Closing.LOST))
        lives = {grant.life for grant in self._open.values()}
        self._unseen_since = {life: since for life, since in self._unseen_since.items() if life in lives}
        return closed

    def _close(self, ticket_id: str, closing: Closing, use: TicketUse | None = None) -> Closed[T]:
        return Closed(self._open.pop(ticket_id).held, closing, use)
