"""Tickets of direct mode: what a runner checks of one, and what it remembers so that each is taken once.

A coordinator grants a ticket for one generation by one caller on one life of one runner. The signature is checked
elsewhere (`transport/tickets.py`); here is what follows from what the ticket says. Times are seconds since 1970, by
which two machines' clocks are compared: `LEEWAY_S` is how far they may be apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

from chorus.core.errors import (
    OverloadedError,
    TicketCallerError,
    TicketExpiredError,
    TicketGrantorError,
    TicketRequestError,
    TicketRunnerError,
    TicketUsedError,
)
from chorus.core.identity.spiffe import Role, SpiffeId

LEEWAY_S = 5.0
# How long a grantor that lost its connection may take to ask what has become of its tickets.
KEPT_S = 60.0
# Tickets remembered at most. Forgetting one early would let it be used again, so beyond it none is taken.
MOST_KEPT = 65_536


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a ticket says; the fields are those of `chorus.api.identity.v1.Ticket`."""

    ticket_id: str
    caller: str
    runner_id: str
    incarnation: int
    spec_sha256: bytes
    artifact: str
    reserved_tokens: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class TicketUse:
    """What has become of a ticket that came; all but the id and `ended` is known at the end alone.

    `reason` is that of the error that the generation ended with, empty where it came to its end. Times are seconds
    since its arrival, `first_token_s` None where no token came.
    """

    ticket_id: str
    ended: bool = False
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0


def check_ticket(
    ticket: Ticket,
    grantor: SpiffeId,
    *,
    caller: SpiffeId,
    runner_id: str,
    incarnation: int,
    spec_sha256: bytes,
    now: float,
) -> None:
    """Returns if `caller` may have what the ticket grants on this runner. Raises the TicketError that says why not."""
    if grantor.role is not Role.COORDINATOR:
        raise TicketGrantorError(f"{grantor} signed the ticket, and only coordinators grant any")
    if ticket.caller != str(caller):
        raise TicketCallerError(f"the ticket was granted to {ticket.caller}, and {caller} shows it")
    if ticket.runner_id != runner_id:
        raise TicketRunnerError(f"the ticket is for the runner {ticket.runner_id}, and this is {runner_id}")
    if ticket.incarnation != incarnation:
        raise TicketRunnerError(f"the runner {runner_id} was started anew since the ticket was granted; get another")
    if ticket.spec_sha256 != spec_sha256:
        raise TicketRequestError("the ticket was granted for another request: `spec` must be what Place was given")
    late_s = now - ticket.expires_at
    if late_s > LEEWAY_S:
        raise TicketExpiredError(
            f"the ticket expired {late_s:.0f} s ago by this machine's clock; get another one, and set the clocks if it "
            "happens again"
        )


class TicketLedger:
    """The tickets that came to this life of a runner: each is taken once, and its grantor can ask what became of it."""

    def __init__(self, *, most: int = MOST_KEPT, kept_s: float = KEPT_S) -> None:
        self._most = most
        self._kept_s = kept_s
        self._uses: dict[str, TicketUse] = {}
        self._tickets: dict[str, tuple[Ticket, str]] = {}
        self._forgettable: list[tuple[float, str]] = []
        self._forgotten_until = float("-inf")  # the latest expiry of a ticket that was forgotten

    def __len__(self) -> int:
        return len(self._tickets)

    def redeem(self, ticket: Ticket, grantor: str, now: float) -> TicketUse:
        """Takes a ticket that is in order; `ended` must follow.

        Raises TicketUsedError where it was taken before, TicketExpiredError where that can't be known any more,
        OverloadedError where too many are remembered.
        """
        self._forget(now)
        if ticket.ticket_id in self._tickets:
            raise TicketUsedError("the ticket was used before; each is good for one call, get another one")
        if ticket.expires_at <= self._forgotten_until:  # a clock was put back
            raise TicketExpiredError("the ticket is older than others that are forgotten by now; get another one")
        if len(self._tickets) >= self._most:
            raise OverloadedError(f"this runner remembers {self._most} tickets, and can't take more", retry_after_s=1.0)
        self._tickets[ticket.ticket_id] = (ticket, grantor)
        use = self._uses[ticket.ticket_id] = TicketUse(ticket.ticket_id)
        return use

    def ended(self, use: TicketUse, now: float) -> str:
        """The generation of a ticket that was taken has ended; returns the ticket's grantor."""
        ticket, grantor = self._tickets[use.ticket_id]
        self._uses[use.ticket_id] = use
        heappush(self._forgettable, (max(ticket.expires_at + LEEWAY_S, now + self._kept_s), use.ticket_id))
        return grantor

    def uses(self, grantor: str) -> Mapping[str, TicketUse]:
        """What became of a grantor's tickets, as far as that is remembered, by their ids."""
        return {key: self._uses[key] for key, (_, by) in self._tickets.items() if by == grantor}

    def _forget(self, now: float) -> None:
        while self._forgettable and self._forgettable[0][0] < now:
            _, ticket_id = heappop(self._forgettable)
            ticket, _ = self._tickets.pop(ticket_id)
            del self._uses[ticket_id]
            self._forgotten_until = max(self._forgotten_until, ticket.expires_at)
