"""Answers in a Valkey or Redis server that several coordinators share, with the vectors of their questions.

The server has the answers, each a hash that ends by itself after its time; in this process there are only the signs of
the questions' vectors, read out of a stream to which whoever keeps an answer adds. A sign is a hint: whatever is gone
from the server meanwhile, since it was cleared, too old or made room, is found to be gone when it is asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from chorus.core.cache.nearest import Nearest, Vector, signs
from chorus.core.errors import UnavailableError
from chorus.store.answers import CANDIDATES, Kept, NewAnswer, cosines, group_of, size_of
from chorus.store.valkey import Valkey

# Signs read from the stream at once.
_READ_AT_ONCE = 4096
# Answers forgotten in one script, for which everybody else has to wait.
_CLEARED_AT_ONCE = 1000
# A server that can't be reached is left alone for so long: each question would wait for its timeout.
_REST_S = 2.0

# `meta` has what is known of an answer beside itself, so that the books stay right when the server lets it end.
_BOOKS = """
local base = ARGV[1]
local function drop(member)
  redis.call('ZREM', base .. 'used', member)
  redis.call('ZREM', base .. 'made', member)
  local meta = redis.call('HGET', base .. 'meta', member)
  if not meta then return end
  local size, caller = string.match(meta, '^(%d+) (.*)$')
  local key, sha256 = string.match(member, '^(.*):(.*)$')
  redis.call('HDEL', base .. 'meta', member)
  redis.call('DECRBY', base .. 'bytes', size)
  redis.call('SREM', base .. 'of:' .. caller, member)
  redis.call('SREM', base .. 'by:' .. key, sha256)
  redis.call('DEL', base .. 'entry:' .. member)
end
local function sweep(before)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', base .. 'made', '-inf', before, 'LIMIT', 0, 100)) do
    drop(member)
  end
end
"""
_PUT = (
    _BOOKS
    + """
local member, now, ttl_s, size, entries, bytes, caller, group, bits = unpack(ARGV, 2, 10)
local key, sha256 = string.match(member, '^(.*):(.*)$')
sweep(now - ttl_s)
drop(member)
redis.call('HSET', base .. 'entry:' .. member, unpack(ARGV, 11))
redis.call('PEXPIRE', base .. 'entry:' .. member, math.ceil(ttl_s * 1000))
redis.call('HSET', base .. 'meta', member, size .. ' ' .. caller)
redis.call('INCRBY', base .. 'bytes', size)
redis.call('ZADD', base .. 'used', now, member)
redis.call('ZADD', base .. 'made', now, member)
redis.call('SADD', base .. 'of:' .. caller, member)
redis.call('SADD', base .. 'by:' .. key, sha256)
while redis.call('ZCARD', base .. 'used') > tonumber(entries)
    or tonumber(redis.call('GET', base .. 'bytes') or '0') > tonumber(bytes) do
  local least = redis.call('ZRANGE', base .. 'used', 0, 1)
  if least[1] == member then least[1] = least[2] end
  if not least[1] then break end
  drop(least[1])
end
if bits ~= '' then
  redis.call('XADD', base .. 'questions', 'MAXLEN', '~', entries, '*', 'member', member, 'group', group, 'bits', bits)
end
"""
)
_CLEAR = (
    _BOOKS
    + """
local members
if ARGV[2] == '' then members = redis.call('ZRANGE', base .. 'used', 0, ARGV[4] - 1)
else members = redis.call('SRANDMEMBER', base .. 'of:' .. ARGV[3], ARGV[4]) end
for _, member in ipairs(members) do drop(member) end
return #members
"""
)
_COUNT = (
    _BOOKS
    + """
sweep(ARGV[4])
if ARGV[2] == '' then return {redis.call('ZCARD', base .. 'used'), redis.call('GET', base .. 'bytes') or '0'} end
local members, bytes = redis.call('SMEMBERS', base .. 'of:' .. ARGV[3]), 0
for _, member in ipairs(members) do
  local meta = redis.call('HGET', base .. 'meta', member)
  if meta then bytes = bytes + tonumber(string.match(meta, '^%d+')) end
end
return {#members, tostring(bytes)}
"""
)
_JUDGED = """
local entry = ARGV[1] .. 'entry:' .. ARGV[2]
if redis.call('EXISTS', entry) == 1 then redis.call('HINCRBY', entry, ARGV[3], 1) end
"""


class SharedAnswers:
    """What keeps answers, as `AnswerStore` does, for all coordinators of the same server and prefix.

    Every method raises UnavailableError where the server can't be asked. Answers end `ttl_s` after they were made, also
    those that could still be given where nobody can make a new one. `wall` is seconds since the epoch, which the
    coordinators' clocks have to agree on as far as the age of answers is to be right.
    """

    def __init__(
        self,
        valkey: Valkey,
        *,
        ttl_s: float,
        max_entries: int,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._valkey = valkey
        self._ttl_s, self._max_entries, self._max_bytes = ttl_s, max_entries, max_bytes
        self._clock, self._wall = clock, wall
        self._base = valkey.key("answers", "")
        self._put, self._clear, self._count, self._judged = map(valkey.script, (_PUT, _CLEAR, _COUNT, _JUDGED))
        self._away_until = float("-inf")
        self._questions = Questions(max_entries)
        self._reading: asyncio.Task[None] | None = None
        self._touching: set[asyncio.Task[None]] = set()

    async def find(self, key: str, sha256s: Sequence[str] | None, *, since: float, now: float) -> Kept | None:
        """The newest answer to a request by one of these artifacts (None: whichever), made after `since`."""
        async with self._reached() as client:
            if sha256s is None:
                sha256s = [sha256.decode() for sha256 in await client.smembers(f"{self._base}by:{key}")]
            pipeline = client.pipeline(transaction=False)
            for sha256 in sha256s:
                pipeline.hmget(self._entry(f"{key}:{sha256}"), "answer", "tokens", "made")
            # In the same round trip; another artifact's answer to the same request lives longer by it, too.
            for sha256 in sha256s:
                pipeline.zadd(f"{self._base}used", {f"{key}:{sha256}": now}, xx=True)
            rows = await pipeline.execute() if sha256s else []
        found = [
            Kept(0, sha256, answer, int(tokens), float(made))
            for sha256, (answer, tokens, made) in zip(sha256s, rows[: len(sha256s)], strict=True)
            if answer is not None and float(made) > since
        ]
        return max(found, key=lambda kept: kept.made, default=None)

    async def near(
        self, bucket: str, sha256s: Sequence[str], vector: Vector, *, since: float, limit: int
    ) -> list[Kept]:
        """The answers to the nearest questions of a bucket, the nearest first."""
        await self._read_on()
        numbers = self._questions.near(group_of(bucket), signs(vector))
        members = [self._questions.member(number) for number in numbers]
        rows = await self._rows(members, "vector", "bucket", "sha256", "made")
        there = []
        for number, (blob, in_bucket, sha256, made) in zip(numbers, rows, strict=True):
            if blob is None:
                self._questions.remove(number)
            elif in_bucket.decode() == bucket and sha256.decode() in sha256s and float(made) > since:
                there.append((number, blob))
        if not there:
            return []
        alike = dict(zip((number for number, _ in there), cosines([blob for _, blob in there], vector), strict=True))
        best = sorted(alike, key=lambda number: -alike[number])[:limit]
        whole = await self._rows(
            [self._questions.member(number) for number in best],
            *("sha256", "answer", "tokens", "made", "question", "right", "wrong"),
        )
        return [
            replace(_kept(number, row), cosine=alike[number])
            for number, row in zip(best, whole, strict=True)
            if row[0] is not None
        ]

    def touch(self, row: int, now: float) -> None:
        """The answer to a question that `near` found was given: it is not the next one to make room."""
        task = asyncio.get_running_loop().create_task(self._touch(self._questions.member(row), now))
        self._touching.add(task)
        task.add_done_callback(self._touching.discard)

    async def judged(self, row: int, *, right: bool) -> None:
        """A hit of it was compared with a new answer."""
        member = self._questions.member(row)
        await self._run(lambda: self._judged([], [self._base, member, "right" if right else "wrong"]))

    async def put(self, new: NewAnswer, now: float) -> None:
        """Keeps an answer in place of an earlier one to the same request; those least used make room."""
        size = size_of(new)
        if size > self._max_bytes:
            return
        fields: dict[str, str | bytes | int | float] = {
            "answer": new.answer,
            "sha256": new.sha256,
            "tokens": new.tokens,
            "made": now,
            "right": 0,
            "wrong": 0,
        }
        group, bits = 0, b""
        if new.vector is not None and new.bucket is not None:
            group, bits = group_of(new.bucket), signs(new.vector).tobytes()
            fields |= {
                "question": new.question or "",
                "bucket": new.bucket,
                "vector": new.vector.astype(np.float16).tobytes(),
            }
        books: list[str | bytes | int | float] = [f"{new.key}:{new.sha256}", now, self._ttl_s, size]
        books += [self._max_entries, self._max_bytes, new.caller, group, bits]
        flat = [part for field in fields.items() for part in field]
        await self._run(lambda: self._put([], [self._base, *books, *flat]))

    async def clear(self, caller: str | None) -> int:
        """Forgets one caller's answers, or (None) everybody's, for all coordinators; returns how many."""
        forgotten = 0
        while True:
            gone = int(await self._run(lambda: self._clear([], self._of(caller, _CLEARED_AT_ONCE))))
            forgotten += gone
            if gone < _CLEARED_AT_ONCE:
                return forgotten

    async def count(self, caller: str | None) -> tuple[int, int]:
        """How many answers there are of one caller, or of everybody, and their bytes."""
        told = self._of(caller, self._wall() - self._ttl_s)
        entries, size = await self._run(lambda: self._count([], told))
        return int(entries), int(size)

    async def close(self) -> None:
        """Ends it. May be called again."""
        tasks = [*self._touching, *([self._reading] if self._reading is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._valkey.close()

    # --- the server -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _reached(self) -> AsyncIterator[Any]:
        if self._clock() < self._away_until:
            raise UnavailableError("the shared store (Valkey) could not be reached a moment ago")
        try:
            async with self._valkey.reached() as client:
                yield client
        except UnavailableError:
            self._away_until = self._clock() + _REST_S
            raise

    async def _run(self, script: Callable[[], Any]) -> Any:
        async with self._reached():
            return await script()

    async def _rows(self, members: Sequence[str], *fields: str) -> list[Any]:
        if not members:
            return []
        async with self._reached() as client:
            pipeline = client.pipeline(transaction=False)
            for member in members:
                pipeline.hmget(self._entry(member), *fields)
            return list(await pipeline.execute())

    async def _touch(self, member: str, now: float) -> None:
        with suppress(UnavailableError):
            async with self._reached() as client:
                await client.zadd(f"{self._base}used", {member: now}, xx=True)

    def _of(self, caller: str | None, number: float) -> list[str | float]:
        return [self._base, "" if caller is None else "one", caller or "", number]

    def _entry(self, member: str) -> str:
        return f"{self._base}entry:{member}"

    # --- the questions ----------------------------------------------------------------------------------------------

    async def _read_on(self) -> None:
        """Reads what others have kept meanwhile; where that is much, as after a start, the rest in the background."""
        if self._reading is not None and not self._reading.done():
            return
        if await self._read_some():
            self._reading = asyncio.get_running_loop().create_task(self._read_all())

    async def _read_all(self) -> None:
        with suppress(UnavailableError):
            while await self._read_some():
                pass

    async def _read_some(self) -> bool:
        """Whether there is more."""
        async with self._reached() as client:
            after = f"({self._questions.read_to}" if self._questions.read_to else "-"
            rows = await client.xrange(f"{self._base}questions", min=after, count=_READ_AT_ONCE)
        for place, row in rows:
            self._questions.add(row[b"member"].decode(), int(row[b"group"]), row[b"bits"])
            self._questions.read_to = place.decode()
        return len(rows) == _READ_AT_ONCE


class Questions:
    """The signs of questions that were read out of the stream up to `read_to`, numbered as they came."""

    def __init__(self, most: int) -> None:
        self.read_to = ""
        self._most = most
        self._next = 1
        self._members: dict[int, tuple[str, int]] = {}  # with how many words of signs
        self._numbers: dict[str, int] = {}
        self._nearest: dict[int, Nearest] = {}

    def add(self, member: str, group: int, bits: bytes) -> None:
        """A question was kept, or another one in its place; the oldest makes room."""
        known = self._numbers.get(member)
        if known is not None:
            self.remove(known)
        words = len(bits) // 8
        self._members[self._next], self._numbers[member] = (member, words), self._next
        self._nearest.setdefault(words, Nearest(words)).add(self._next, group, np.frombuffer(bits, np.uint64))
        self._next += 1
        if len(self._members) > self._most:
            self.remove(next(iter(self._members)))

    def remove(self, number: int) -> None:
        """It is gone."""
        member, words = self._members.pop(number, ("", 0))
        if words:
            del self._numbers[member]
            self._nearest[words].remove(number)

    def near(self, group: int, bits: Any) -> list[int]:
        """The numbers of the nearest of a group."""
        nearest = self._nearest.get(len(bits))
        return nearest.near(group, bits, CANDIDATES) if nearest is not None else []

    def member(self, number: int) -> str:
        """What it is kept as; empty where it is gone."""
        return self._members.get(number, ("", 0))[0]


def _kept(number: int, row: Sequence[bytes]) -> Kept:
    sha256, answer, tokens, made, question, right, wrong = row
    return Kept(number, sha256.decode(), answer, int(tokens), float(made), question.decode(), int(right), int(wrong))
