"""Alerts: what happens at this coordinator, posted to HTTP servers as JSON.

A webhook is one more reader of the event log. So nothing waits for it: while its server is slow or gone, events stay in
the ring, and what falls out of it meanwhile is told as `lost`.

Each request has `Chorus-Delivery`, the same at every try, by which a receiver knows what it has got already, and, where
there is a secret, `Chorus-Signature: t=SECONDS,v1=HEX`: HMAC-SHA256 over SECONDS, a dot and the body. The time is in it
so that a recorded request can't be played again for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from urllib.parse import urlsplit

import httpx

from chorus.coordinator.events import EventBoard
from chorus.core.errors import DrainingError
from chorus.core.events import Batch, Bookmark, Cursor, Event, EventFilter, EventKind, Lost
from chorus.core.events.deliveries import Again, Arrived, fate_of
from chorus.telemetry.logs import get_logger
from chorus.wire.mesh_events import event_json

TIMEOUT_S = 10.0
_ENDING_S = 2.0

_log = get_logger()


def signature(secret: bytes, body: bytes, at: int) -> str:
    """The value of Chorus-Signature for a body sent at `at` seconds since the Unix epoch."""
    digest = hmac.new(secret, b"%d." % at + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class Webhook:
    """Posts events of some kinds to one URL, in order and at least once, for as long as `run` runs."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        kinds: Iterable[EventKind],
        secret: bytes | None,
        board: EventBoard,
        wall: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """`name` is the coordinator's."""
        self._url = url
        self._host = urlsplit(url).hostname or ""  # all that is logged of the URL: its path may be a secret
        self._name = name
        self._filter = EventFilter(frozenset(kinds))
        self._secret = secret
        self._board = board
        self._wall = wall
        self._rng = rng
        self._told_down = False

    async def run(self) -> None:
        """Posts what happens until the board closes, then what is left of it."""
        watch = self._board.watch(self._filter, after=Cursor(self._board.log.epoch, 0))
        lost = 0
        try:
            async with httpx.AsyncClient(timeout=TIMEOUT_S) as client, aclosing(watch) as messages:
                async for told in messages:
                    if isinstance(told, Lost):
                        lost += told.count
                    if isinstance(told, Bookmark) and not lost:
                        continue
                    events = told.events if isinstance(told, Batch) else ()
                    await self._deliver(client, told.cursor, events, lost)
                    lost = 0
        except DrainingError:
            return

    async def _deliver(self, client: httpx.AsyncClient, cursor: Cursor, events: Sequence[Event], lost: int) -> None:
        content = {"coordinator": self._name, "events": [event_json(event) for event in events], "lost": lost}
        body = json.dumps(content, ensure_ascii=False).encode()
        tries = 0
        while True:
            tries += 1
            status, asked_s, problem = await self._post(client, body, delivery=f"{cursor.epoch}-{cursor.sequence}")
            fate = fate_of(status, tries, rng=self._rng, retry_after_s=asked_s)
            if isinstance(fate, Again):
                if not self._told_down:
                    _log.warning("webhook.unreachable", host=self._host, why=problem)
                self._told_down = True
                await asyncio.sleep(fate.pause_s)
                continue
            if isinstance(fate, Arrived):
                self._told_down = False
            else:
                _log.error("webhook.given_up", host=self._host, why=problem, tries=tries, events=len(events))
            return

    async def _post(
        self, client: httpx.AsyncClient, body: bytes, *, delivery: str
    ) -> tuple[int | None, float | None, str]:
        """Sends it once; the status, after how many seconds the receiver wants it again, and what is wrong."""
        headers = {"content-type": "application/json", "chorus-delivery": delivery}
        if self._secret is not None:
            headers["chorus-signature"] = signature(self._secret, body, int(self._wall()))
        try:
            answer = await client.post(self._url, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return None, None, type(error).__name__  # its text would show the URL
        return answer.status_code, _seconds(answer.headers.get("retry-after")), f"it answers {answer.status_code}"


class Webhooks:
    """The webhooks of a coordinator, started and stopped together."""

    def __init__(self, webhooks: Sequence[Webhook]) -> None:
        self._webhooks = webhooks
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to report."""
        self._tasks = [asyncio.create_task(webhook.run()) for webhook in self._webhooks]

    async def stop(self) -> None:
        """Ends once all has been sent, or a moment later. The board must have been closed."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=_ENDING_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, would compare two clocks."""
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None
