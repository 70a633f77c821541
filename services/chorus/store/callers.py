"""What coordinators share of callers without a certificate: API keys and what was used. One SQLite file, or Valkey.

Whatever keeps a store from answering is an UnavailableError; callers decide what that means.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, TypeVar

from chorus.core.callers import Account, ApiKey, KeyRing, Limits, Refusal, Usage
from chorus.core.callers.grants import scopes_of
from chorus.core.errors import UnavailableError
from chorus.store.file_thread import FileThread
from chorus.store.sqlite import open_shared
from chorus.store.valkey import Valkey

T = TypeVar("T")

_BUSY_S = 2.0
_CREATE = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS keys (key_id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY, state TEXT NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('revision', 0);
"""


class CallerStore(Protocol):
    """Keys and accounts, the same for every coordinator that shares it. Every method raises UnavailableError."""

    async def pepper_mark(self, mark: bytes) -> bytes:
        """The mark of the pepper with which keys are kept here: the one that was given first."""

    async def ring(self, revision: int) -> KeyRing | None:
        """All keys; None where they are as in that revision."""

    async def put(self, key: ApiKey) -> None:
        """Keeps a key, a new one or one that was changed."""

    async def take(self, account: str, reservation: str, limits: Limits, tokens: int) -> Refusal | None:
        """As Account's."""

    async def settle(self, account: str, reservation: str, *, begun: bool, prompt: int, output: int) -> None:
        """As Account's."""

    async def renew(self, account: str, reservations: Sequence[str]) -> None:
        """As Account's."""

    async def usage(self, account: str) -> Usage:
        """As Account's."""

    async def close(self) -> None:
        """Ends it."""


class FileCallers:
    """In a SQLite file that coordinators on one machine share; a thread waits for the disk.

    `wall` is seconds since 1970."""

    def __init__(self, path: Path, *, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall = wall
        self._thread = FileThread(self._open, name="callers")

    async def pepper_mark(self, mark: bytes) -> bytes:
        """The mark of the pepper with which keys are kept here."""

        def kept(db: sqlite3.Connection) -> bytes:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('pepper', ?)", (mark,))
            return bytes(db.execute("SELECT value FROM meta WHERE name = 'pepper'").fetchone()[0])

        return await self._write(kept)

    async def ring(self, revision: int) -> KeyRing | None:
        """All keys; None where they are as in that revision."""

        def read(db: sqlite3.Connection) -> KeyRing | None:
            (now,) = db.execute("SELECT value FROM meta WHERE name = 'revision'").fetchone()
            if now == revision:
                return None
            return KeyRing((decode_key(row) for (row,) in db.execute("SELECT record FROM keys")), now)

        # In a transaction, so that revision and keys are of one moment.
        return await self._write(read, begin="BEGIN")

    async def put(self, key: ApiKey) -> None:
        """Keeps a key."""

        def write(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (key.key_id, encode_key(key)))
            db.execute("UPDATE meta SET value = value + 1 WHERE name = 'revision'")

        await self._write(write)

    async def take(self, account: str, reservation: str, limits: Limits, tokens: int) -> Refusal | None:
        """As Account's."""
        return await self._change(account, lambda state, now: state.take(reservation, now, limits, tokens))

    async def settle(self, account: str, reservation: str, *, begun: bool, prompt: int, output: int) -> None:
        """As Account's."""
        await self._change(
            account, lambda state, now: state.settle(reservation, now, begun=begun, prompt=prompt, output=output)
        )

    async def renew(self, account: str, reservations: Sequence[str]) -> None:
        """As Account's."""
        await self._change(account, lambda state, now: state.renew(reservations, now))

    async def usage(self, account: str) -> Usage:
        """As Account's."""
        return await self._change(account, lambda state, now: state.usage(now))

    async def close(self) -> None:
        """Closes the file, once what was begun has ended."""
        await self._thread.close(lambda _: None)

    async def _change(self, account: str, what: Callable[[Account, int], T]) -> T:
        def run(db: sqlite3.Connection) -> T:
            row = db.execute("SELECT state FROM accounts WHERE account = ?", (account,)).fetchone()
            held = Account(json.loads(row[0]) if row is not None else None)
            answer = what(held, round(self._wall() * 1000))
            state = json.dumps(held.state, separators=(",", ":"))
            db.execute("INSERT OR REPLACE INTO accounts VALUES (?, ?)", (account, state))
            return answer

        return await self._write(run)

    async def _write(self, what: Callable[[sqlite3.Connection], T], begin: str = "BEGIN IMMEDIATE") -> T:
        def run(db: sqlite3.Connection) -> T:
            db.execute(begin)  # others wait here, so that what is read is not changed before it is written
            try:
                answer = what(db)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
            return answer

        try:
            return await self._thread.run(run)
        except (OSError, sqlite3.Error, ValueError, KeyError) as error:
            raise UnavailableError(f"the keys' file {self._path} can't be used: {error}") from error

    def _open(self) -> sqlite3.Connection:
        db = open_shared(self._path, synchronous="NORMAL", busy_s=_BUSY_S)
        db.executescript(_CREATE)
        return db


class ValkeyCallers:
    """At a Valkey or Redis server that all coordinators share. Time is the server's own, so that no clocks differ."""

    def __init__(self, valkey: Valkey, *, wall: Callable[[], float] | None = None) -> None:
        """`wall`, in seconds, replaces the server's clock."""
        self._valkey = valkey
        self._wall = wall
        self._quota = valkey.script(files("chorus.store").joinpath("quota.lua").read_text("utf-8"))
        self._keys, self._revision = valkey.key("callers", "keys"), valkey.key("callers", "revision")

    async def pepper_mark(self, mark: bytes) -> bytes:
        """The mark of the pepper with which keys are kept here."""
        name = self._valkey.key("callers", "pepper")
        async with self._valkey.reached() as client:
            await client.set(name, mark, nx=True)
            kept: bytes | str | None = await client.get(name)
            return mark if kept is None else bytes(kept) if isinstance(kept, bytes) else kept.encode()

    async def ring(self, revision: int) -> KeyRing | None:
        """All keys; None where they are as in that revision."""
        async with self._valkey.reached() as client:
            if int(await client.get(self._revision) or 0) == revision:
                return None
            pipeline = client.pipeline(transaction=True)
            pipeline.get(self._revision)
            pipeline.hvals(self._keys)
            now, rows = await pipeline.execute()
            return KeyRing(map(decode_key, rows), int(now or 0))

    async def put(self, key: ApiKey) -> None:
        """Keeps a key."""
        async with self._valkey.reached() as client:
            pipeline = client.pipeline(transaction=True)
            pipeline.hset(self._keys, key.key_id, encode_key(key))
            pipeline.incr(self._revision)
            await pipeline.execute()

    async def take(self, account: str, reservation: str, limits: Limits, tokens: int) -> Refusal | None:
        """As Account's."""
        most = (limits.requests_per_minute, limits.tokens_per_minute, limits.tokens_per_day)
        told = await self._change(account, "take", reservation, tokens, *most, limits.concurrent, limits.total_tokens)
        if not told:
            return None
        return Refusal(told[0].decode(), int(told[1]), int(told[2]) if int(told[2]) >= 0 else None)

    async def settle(self, account: str, reservation: str, *, begun: bool, prompt: int, output: int) -> None:
        """As Account's."""
        await self._change(account, "settle", reservation, int(begun), prompt, output)

    async def renew(self, account: str, reservations: Sequence[str]) -> None:
        """As Account's."""
        await self._change(account, "renew", *reservations)

    async def usage(self, account: str) -> Usage:
        """As Account's."""
        async with self._valkey.reached() as client:
            raw = await client.get(self._account(account))
            seconds, micros = await client.time()
        now = self._wall() if self._wall is not None else seconds + micros / 1e6
        return Account(json.loads(raw) if raw is not None else None).usage(int(now * 1000))

    async def close(self) -> None:
        """Closes the connections."""
        await self._valkey.close()

    def _account(self, name: str) -> str:
        return self._valkey.key("callers", "account", name)

    async def _change(self, account: str, what: str, *args: str | int) -> Any:
        now = round(self._wall() * 1000) if self._wall is not None else ""
        return await self._quota([self._account(account)], [what, now, *args])


def encode_key(key: ApiKey) -> str:
    """What is kept of a key, as JSON."""
    limits, scopes = key.limits, key.scopes
    return json.dumps(
        {
            "key_id": key.key_id,
            "name": key.name,
            "digest": key.digest.hex(),
            "created_at": key.created_at,
            "created_by": key.created_by,
            "expires_at": key.expires_at,
            "revoked_at": key.revoked_at,
            "client": key.client,
            "scopes": {
                "models": scopes.models,
                "strategies": sorted(scopes.strategies),
                "priorities": sorted(scopes.priorities),
            },
            "limits": {name: getattr(limits, name) for name in limits.__slots__},
        }
    )


def decode_key(text: str | bytes) -> ApiKey:
    """A key that was kept. Raises ValueError, KeyError where it is damaged."""
    row = json.loads(text)
    scopes, limits = scopes_of(**row.pop("scopes")), Limits(**row.pop("limits"))
    return ApiKey(**{**row, "digest": bytes.fromhex(row["digest"])}, scopes=scopes, limits=limits)
