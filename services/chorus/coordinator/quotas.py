"""Quotas at work: reserved before a request begins, renewed while it runs, settled at its end."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from chorus.coordinator.spending import Spending, spends
from chorus.core.callers import UNLIMITED, Grant, Refusal, Usage
from chorus.core.errors import (
    ChorusError,
    DrainingError,
    OverloadedError,
    QuotaExceededError,
    RunnersUnavailableError,
    UnavailableError,
)
from chorus.store.callers import CallerStore
from chorus.telemetry.logs import get_logger

RENEW_S = 10.0
"""How often reservations are renewed, which lapse after 30 s."""
_AWAY_RETRY_S = 1.0
# A caller who goes on asking is refused without asking the store, for so long: what comes back does so in 0.25 s.
_REFUSED_FOR_S = 0.1
# So many refusals an account has at once in a second; the others come later by that.
_PROMPT_REFUSALS = 10
_HELD_BACK_S = 0.5
# Requests that the mesh refused for want of room, or of runners, are not counted.
_NOT_SERVED = (OverloadedError, DrainingError, RunnersUnavailableError, UnavailableError)
# By how much of it an account's margin is less after each request that was guessed right.
_FADING = 0.98
_ACCOUNTS_MAX = 10_000
_WORDS = {
    "requests_per_minute": "requests in a minute",
    "tokens_per_minute": "tokens in a minute",
    "tokens_per_day": "tokens in a day",
    "concurrent": "requests at once",
    "total_tokens": "tokens in all",
}

_log = get_logger()


class Quotas:
    """One coordinator's reservations at a store. Used from one event loop; `clock` is monotonic seconds.

    While the store can't be asked, accounts with limits are refused (UnavailableError): what they have used at other
    coordinators is not known then, and a limit is a promise. What runs goes on, and is settled when the store is back,
    within 30 s; after that what it had reserved stays counted. Accounts without limits are served, and their use is
    told when it can be.
    """

    def __init__(self, store: CallerStore, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._open: set[Spending] = set()
        self._unsettled: dict[Spending, bool] = {}
        self._refused: dict[str, tuple[float, QuotaExceededError]] = {}
        self._refusals: dict[str, tuple[int, int]] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._margins: dict[str, float] = {}

    @asynccontextmanager
    async def reserved(self, grant: Grant, tokens: int) -> AsyncIterator[Spending]:
        """Holds a reservation while the block runs, and settles it by what was spent in it. Raises as `reserve`."""
        spending = await self.reserve(grant, tokens)
        spends(spending)
        begun = True
        try:
            yield spending
        except ChorusError as error:
            begun = not isinstance(error, _NOT_SERVED) or bool(spending.prompt + spending.output)
            raise
        finally:
            spends(None)
            # However this task ends; where it just ends, its caller finds everything counted with its last message.
            await asyncio.shield(self.settle(spending, begun=begun))

    async def reserve(self, grant: Grant, tokens: int) -> Spending:
        """Reserves one request of so many tokens; `settle` or `leave` must follow.

        Raises QuotaExceededError, and UnavailableError where that can't be found out.
        """
        spending = Spending(grant, tokens, self._late)
        if (known := self._known_refusal(grant.account)) is not None:
            await self._hold_back(grant.account)
            raise known
        if grant.limits.any:
            try:
                held = self._with_margin(grant, tokens)
                refusal = await self._store.take(grant.account, spending.reservation, grant.limits, held)
            except UnavailableError as error:
                raise UnavailableError(
                    f"quotas can't be counted now, so this key has to wait: {error.message}",
                    retry_after_s=_AWAY_RETRY_S,
                ) from error
            if refusal is not None:
                await self._hold_back(grant.account)
                raise self._refusal(grant.account, refusal)
        self._open.add(spending)
        return spending

    def settle(self, spending: Spending, *, begun: bool) -> asyncio.Task[None]:
        """Tells the store what was used; `begun` False: it was no request. Need not be waited for."""
        self._open.discard(spending)
        self._learn(spending)
        task = asyncio.get_running_loop().create_task(self._settle(spending, begun))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    def leave(self, spending: Spending) -> None:
        """Nobody knows what was used: what was reserved stays counted."""
        self._open.discard(spending)

    async def usage(self, account: str) -> Usage:
        """What an account has used. Raises UnavailableError."""
        return await self._store.usage(account)

    async def run(self) -> None:
        """Renews what is under way and settles what could not be, until cancelled."""
        while True:
            await asyncio.sleep(RENEW_S)
            now = self._clock()
            self._refusals = {account: kept for account, kept in self._refusals.items() if kept[0] >= now - RENEW_S}
            self._refused = {account: kept for account, kept in self._refused.items() if kept[0] > now}
            try:
                for spending, begun in tuple(self._unsettled.items()):
                    await self._told(spending, begun)
                    del self._unsettled[spending]
                accounts: defaultdict[str, list[str]] = defaultdict(list)
                for spending in self._open:
                    if spending.grant.limits.any:
                        accounts[spending.grant.account].append(spending.reservation)
                for account, reservations in accounts.items():
                    await self._store.renew(account, reservations)
            except UnavailableError as error:
                _log.warning("quotas.store_away", why=error.message)

    async def close(self) -> None:
        """Waits for what is being settled."""
        if self._settling:
            await asyncio.wait(self._settling)

    def _learn(self, spending: Spending) -> None:
        """Notes how much more was used than was estimated: a template's tokens, a language that takes more of them."""
        if spending.grant.limits.any and spending.prompt:
            account = spending.grant.account
            short = spending.prompt + spending.output - spending.tokens
            self._margins[account] = max(float(short), _FADING * self._margins.get(account, 0.0), 0.0)
            if len(self._margins) > _ACCOUNTS_MAX:
                del self._margins[next(iter(self._margins))]

    def _with_margin(self, grant: Grant, tokens: int) -> int:
        """What is reserved, so that requests under way at once don't overdraw together by what each was guessed short;
        what is not used is free at their end. Nobody is refused for good because of it."""
        held = tokens + math.ceil(self._margins.get(grant.account, 0.0))
        limits = grant.limits
        bounds = [most for most in (limits.tokens_per_minute, limits.tokens_per_day, limits.total_tokens) if most]
        return max(tokens, min(held, *bounds)) if bounds else tokens

    def _late(self, grant: Grant, prompt: int, output: int) -> None:
        spending = Spending(grant, 0, self._late, prompt=prompt, output=output, settled=True)
        self.settle(spending, begun=False)

    async def _settle(self, spending: Spending, begun: bool) -> None:
        try:
            await self._told(spending, begun)
        except UnavailableError as error:
            self._unsettled[spending] = begun
            _log.warning("quotas.store_away", why=error.message)

    async def _told(self, spending: Spending, begun: bool) -> None:
        account, name = spending.grant.account, spending.reservation
        if spending.settled or not spending.grant.limits.any:
            # Nothing is reserved: it is counted as of now.
            await self._store.take(account, name, UNLIMITED, 0)
        prompt, output, spending.settled = spending.prompt, spending.output, True
        await self._store.settle(account, name, begun=begun, prompt=prompt, output=output)

    def _known_refusal(self, account: str) -> QuotaExceededError | None:
        known = self._refused.get(account)
        if known is None or known[0] <= self._clock():
            return None
        said = known[1]
        return QuotaExceededError(said.message, metadata=said.metadata, retry_after_s=said.retry_after_s)

    async def _hold_back(self, account: str) -> None:
        """Lets an account that is refused again and again wait for its refusals, so that a flood of them is a trickle.

        Nobody who is let through ever waits here.
        """
        second = int(self._clock())
        since, count = self._refusals.get(account, (second, 0))
        count = count + 1 if since == second else max(1, count - _PROMPT_REFUSALS)
        self._refusals[account] = (second, count)
        if count > _PROMPT_REFUSALS:
            await asyncio.sleep(_HELD_BACK_S)

    def _refusal(self, account: str, refusal: Refusal) -> QuotaExceededError:
        wait_s = None if refusal.retry_ms is None else refusal.retry_ms / 1000
        when = "which is more than there ever is" if wait_s is None else f"there is more in {wait_s:.1f} s"
        if refusal.quota == "total_tokens":
            when = "and there is no more; ask whoever runs the mesh"
        error = QuotaExceededError(
            f"this key may have {refusal.limit} {_WORDS[refusal.quota]}; {when}",
            metadata={"quota": refusal.quota, "limit": str(refusal.limit), "account": account},
            retry_after_s=wait_s,
        )
        if refusal.quota == "requests_per_minute" and wait_s is not None:
            self._refused[account] = (self._clock() + min(wait_s, _REFUSED_FOR_S), error)
        return error
