"""Tickets at a runner: it serves clients whom a coordinator sent, and tells that one what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager

from chorus.api.runner.v1 import runner_pb2 as pb
from chorus.core.errors import DrainingError, TicketError, TicketRequiredError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.tickets import Ticket, TicketLedger, TicketUse, check_ticket
from chorus.runner.generating import Account, reason_of
from chorus.runner.presence import Presence
from chorus.telemetry.logs import get_logger
from chorus.transport import TlsIdentity
from chorus.transport.tickets import TicketVerifier
from chorus.wire.tickets import spec_sha256

_log = get_logger()


class TicketDesk:
    """Who may generate here. Used from one event loop; `wall` is seconds since 1970, `clock` monotonic seconds."""

    def __init__(
        self,
        presence: Presence,
        identity: TlsIdentity | None,
        *,
        wall: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._presence = presence
        self._verifier = TicketVerifier(identity) if identity is not None else None
        self._wall = wall
        self._clock = clock
        self._ledger = TicketLedger()
        self._watches: set[_Watch] = set()
        self._closed = False

    @contextmanager
    def admitted(self, request: pb.GenerateRequest, caller: SpiffeId | None) -> Iterator[_Usage]:
        """Lets a caller generate; a client's ticket is used up, and its artifact put into the request.

        What the block notes as usage is told to who granted the ticket. Raises TicketErrors.
        """
        usage = _Usage()
        if caller is None or caller.role is not Role.CLIENT:
            with self._presence.serving(caller):
                yield usage
            return
        arrived = self._clock()
        ticket, grantor, use = self._redeem(request, caller)
        request.spec.model = ticket.artifact
        try:
            with self._presence.serving(grantor):
                yield usage
        except BaseException as error:
            self._ended(use, usage, reason_of(error, finished=usage.finished), arrived)
            raise
        self._ended(use, usage, "", arrived)

    async def watch(self, grantor: SpiffeId | None) -> AsyncGenerator[Sequence[TicketUse]]:
        """What becomes of a grantor's tickets, those that are remembered first. Raises DrainingError at the end."""
        if grantor is None:
            raise TicketError("in a mesh without certificates there are no tickets")
        watch = _Watch(str(grantor))
        watch.pending.update(self._ledger.uses(watch.grantor))
        self._watches.add(watch)
        first = True
        try:
            while True:
                if watch.pending or first:
                    told, watch.pending = tuple(watch.pending.values()), {}
                    first = False
                    yield told
                    continue
                if self._closed:
                    raise DrainingError("this runner is shutting down")
                watch.woken.clear()
                await watch.woken.wait()
        finally:
            self._watches.discard(watch)

    def close(self) -> None:
        """Ends every watch once all is told."""
        self._closed = True
        for watch in self._watches:
            watch.woken.set()

    def _redeem(self, request: pb.GenerateRequest, caller: SpiffeId) -> tuple[Ticket, SpiffeId, TicketUse]:
        if not request.ticket:
            raise TicketRequiredError(
                f"{caller} needs a ticket to ask a runner directly: put that of Coordinator.Place into `ticket`, or "
                "let a coordinator relay (Coordinator.Generate)"
            )
        assert self._verifier is not None, "who has a name in a certificate came to a listener that has one"
        now, presence = self._wall(), self._presence
        try:
            ticket, grantor = self._verifier.open(request.ticket, now)
            check_ticket(
                ticket,
                grantor,
                caller=caller,
                runner_id=presence.runner_id,
                incarnation=presence.incarnation,
                spec_sha256=spec_sha256(request.spec),
                now=now,
            )
            use = self._ledger.redeem(ticket, str(grantor), now)
        except TicketError as error:
            _log.warning("ticket.refused", caller=str(caller), reason=error.reason, why=error.message)
            raise
        self._tell(str(grantor), use)
        return ticket, grantor, use

    def _ended(self, use: TicketUse, usage: _Usage, reason: str, arrived: float) -> None:
        account = usage.account
        told = TicketUse(
            use.ticket_id,
            ended=True,
            reason=reason,
            prompt_tokens=account.prompt_tokens if account is not None else 0,
            cached_tokens=account.cached_tokens if account is not None else 0,
            output_tokens=account.output_tokens if account is not None else 0,
            first_token_s=account.first_token_s if account is not None else None,
            seconds=self._clock() - arrived,
        )
        self._tell(self._ledger.ended(told, self._wall()), told)

    def _tell(self, grantor: str, use: TicketUse) -> None:
        for watch in self._watches:
            if watch.grantor == grantor:
                watch.pending[use.ticket_id] = use
                watch.woken.set()


class _Usage:
    """Where the generation's account is put once there is one."""

    def __init__(self) -> None:
        self.account: Account | None = None

    @property
    def finished(self) -> bool:
        return self.account is not None and self.account.finished


class _Watch:
    """One coordinator that wants to know; `pending` is what it has not been told."""

    def __init__(self, grantor: str) -> None:
        self.grantor = grantor
        self.pending: dict[str, TicketUse] = {}
        self.woken = asyncio.Event()
