"""Quotas: one account's use, and whether it may have more.

Rates are counted over sliding windows: a window is cut into 240 cells, what is taken is counted in the cell of its
time, and what has been taken within the window is the sum of the cells that the window touches (basic windows, as of
Y. Zhu and D. Shasha, StatStream, 2002). So no window of 60 s, wherever it begins, ever holds more than the limit, and
what was taken comes back 60.00 to 60.25 s later. GCRA (ITU-T I.371) would need one number in place of cells, but lets
twice the limit pass in a minute that begins with a full bucket, which is not what "a minute" says; and a request's
tokens, known at its end alone, could not be put right where they were counted.

A request reserves before it begins (`take`) and is settled at its end (`settle`), in the cell in which it reserved.
Whoever holds a reservation renews it; what is not renewed lapses: its place is free again, and its tokens stay counted,
since nobody knows what became of them.

An account is plain data (`state`): numbers, text and mappings, as JSON has them, times in milliseconds since 1970. A
shared store may carry the same decisions out itself; `chorus/store/quota.lua` does, and a test holds it to this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chorus.core.callers.grants import Limits

CELLS = 240
MINUTE_MS = 60_000
DAY_MS = 86_400_000
LEASE_MS = 30_000
"""How long a reservation is kept that nobody renews."""

# By the name of the window in an account: its length, and what it counts.
_WINDOWS = (
    ("r", "requests_per_minute", MINUTE_MS),
    ("t", "tokens_per_minute", MINUTE_MS),
    ("d", "tokens_per_day", DAY_MS),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is nothing to be had. `retry_ms`: when there is; None where waiting is of no use."""

    quota: str
    limit: int
    retry_ms: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """What an account has used: for ever, in the last minute and day, and now. Reserved tokens count as used."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    requests_this_minute: int = 0
    tokens_this_minute: int = 0
    tokens_this_day: int = 0
    concurrent: int = 0


class Account:
    """One account. Times rise, but for what several clocks differ."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """`state` is what `Account.state` was before; None begins anew."""
        self.state: dict[str, Any] = (
            dict(state)
            if state
            else {
                "r": {},
                "t": {},
                "d": {},
                "open": {},
                "requests": 0,
                "tokens": 0,
                "prompt": 0,
                "output": 0,
            }
        )

    def take(self, reservation: str, now_ms: int, limits: Limits, tokens: int) -> Refusal | None:
        """Reserves one request of so many tokens, under a name of its own; None: it may begin. Asked twice, it is one.

        Nothing is taken where it is refused.
        """
        state = self.state
        self._lapse(now_ms)
        if reservation in state["open"]:
            return None
        refusal = self._refusal(now_ms, limits, tokens)
        if refusal is not None:
            return refusal
        for window, _, length_ms in _WINDOWS:
            amount = 1 if window == "r" else tokens
            cell = str(now_ms // (length_ms // CELLS))
            state[window][cell] = state[window].get(cell, 0) + amount
        state["requests"] += 1
        state["tokens"] += tokens
        state["open"][reservation] = [now_ms + LEASE_MS, tokens, now_ms]
        return None

    def settle(self, reservation: str, now_ms: int, *, begun: bool, prompt: int, output: int) -> None:
        """What became of a reservation: it used so much; or, not `begun`, it was never a request. Safe to ask twice."""
        state = self.state
        self._lapse(now_ms)
        reserved = state["open"].pop(reservation, None)
        if reserved is None:
            return
        _, tokens, at_ms = reserved
        used = prompt + output
        for window, _, length_ms in _WINDOWS:
            change = used - tokens if window != "r" else 0 if begun else -1
            cell = str(at_ms // (length_ms // CELLS))
            if cell in state[window]:
                state[window][cell] += change
        state["requests"] += 0 if begun else -1
        state["tokens"] += used - tokens
        state["prompt"] += prompt
        state["output"] += output

    def renew(self, reservations: Iterable[str], now_ms: int) -> None:
        """Those are still under way."""
        self._lapse(now_ms)
        for reservation in reservations:
            if reservation in self.state["open"]:
                self.state["open"][reservation][0] = now_ms + LEASE_MS

    def usage(self, now_ms: int) -> Usage:
        """What was used."""
        state = self.state
        self._lapse(now_ms)
        return Usage(
            requests=state["requests"],
            prompt_tokens=state["prompt"],
            output_tokens=state["output"],
            total_tokens=state["tokens"],
            requests_this_minute=sum(state["r"].values()),
            tokens_this_minute=sum(state["t"].values()),
            tokens_this_day=sum(state["d"].values()),
            concurrent=len(state["open"]),
        )

    def _lapse(self, now_ms: int) -> None:
        """Forgets the cells that no window touches any more, and reservations that nobody renewed."""
        for window, _, length_ms in _WINDOWS:
            oldest = (now_ms - length_ms) // (length_ms // CELLS)
            self.state[window] = {cell: n for cell, n in self.state[window].items() if int(cell) >= oldest}
        self.state["open"] = {name: held for name, held in self.state["open"].items() if held[0] > now_ms}

    def _refusal(self, now_ms: int, limits: Limits, tokens: int) -> Refusal | None:
        if limits.total_tokens and self.state["tokens"] + tokens > limits.total_tokens:
            return Refusal("total_tokens", limits.total_tokens, None)
        worst: Refusal | None = None
        for window, name, length_ms in _WINDOWS:
            limit: int = getattr(limits, name)
            if not limit:
                continue
            refusal = self._window_refusal(now_ms, window, name, length_ms, limit, 1 if window == "r" else tokens)
            if refusal is not None and refusal.retry_ms is None:
                return refusal
            if refusal is not None and (worst is None or (refusal.retry_ms or 0) > (worst.retry_ms or 0)):
                worst = refusal
        if worst is None and limits.concurrent and len(self.state["open"]) >= limits.concurrent:
            return Refusal("concurrent", limits.concurrent, _CONCURRENT_RETRY_MS)
        return worst

    def _window_refusal(
        self, now_ms: int, window: str, name: str, length_ms: int, limit: int, amount: int
    ) -> Refusal | None:
        if amount > limit:
            return Refusal(name, limit, None)
        cells: dict[str, int] = self.state[window]
        excess = sum(cells.values()) + amount - limit
        if excess <= 0:
            return None
        cell_ms = length_ms // CELLS
        for cell in sorted(map(int, cells)):
            excess -= cells[str(cell)]
            if excess <= 0:  # once the window begins after this cell
                return Refusal(name, limit, max(1, (cell + 1) * cell_ms + length_ms - now_ms))
        return Refusal(name, limit, length_ms)


_CONCURRENT_RETRY_MS = 500
