"""The cost ledger in SQLite: what was reserved for paid providers, what requests cost, and sums of both.

Synchronous, and used from one thread at a time; several processes of one machine may share a file. What has returned
is on the disk: neither a killed process nor a crash of the machine takes it back. An amount that is still reserved when
its coordinator starts anew, or long after its request must have ended, was perhaps spent, and is counted as if it was.

Times are seconds since the Unix epoch, days are counted from there in UTC, money is micro USD.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chorus.core.costs.budget import Books, Limits, Shortage, day_of, month_of, name_of, shortage
from chorus.core.costs.records import Entry, Grouping, Line, Where
from chorus.store.sqlite import open_shared

_SCHEMA = 1
_CREATE = """
CREATE TABLE about (ledger TEXT NOT NULL);
CREATE TABLE reserved (
  id TEXT PRIMARY KEY,
  owner TEXT NOT NULL,
  day INTEGER NOT NULL,
  caller TEXT NOT NULL,
  model TEXT NOT NULL,
  amount INTEGER NOT NULL,
  lapses REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE spent (
  day INTEGER NOT NULL,
  caller TEXT NOT NULL,
  model TEXT NOT NULL,
  amount INTEGER NOT NULL,
  PRIMARY KEY (day, caller, model)
) WITHOUT ROWID;
CREATE TABLE spent_a_day (day INTEGER PRIMARY KEY, amount INTEGER NOT NULL);
CREATE TABLE requests (
  id INTEGER PRIMARY KEY,
  at REAL NOT NULL,
  request TEXT NOT NULL,
  caller TEXT NOT NULL,
  model TEXT NOT NULL,
  place TEXT NOT NULL,
  completed INTEGER NOT NULL,
  prompt_tokens INTEGER NOT NULL,
  output_tokens INTEGER NOT NULL,
  spent INTEGER NOT NULL,
  avoided INTEGER NOT NULL
);
CREATE TABLE sums (
  day INTEGER NOT NULL,
  caller TEXT NOT NULL,
  model TEXT NOT NULL,
  place TEXT NOT NULL,
  requests INTEGER NOT NULL,
  prompt_tokens INTEGER NOT NULL,
  output_tokens INTEGER NOT NULL,
  avoided INTEGER NOT NULL,
  PRIMARY KEY (day, caller, model, place)
) WITHOUT ROWID;
"""
# Another coordinator writes for milliseconds.
_BUSY_S = 10.0
# Dropping some more than needed spares doing it with each request.
_DROPPED_AT_ONCE = 0.02
_NAMES = {
    Grouping.DAY: "day",
    Grouping.MONTH: "strftime('%Y-%m', day * 86400, 'unixepoch')",
    Grouping.MODEL: "model",
    Grouping.CALLER: "caller",
}


@dataclass(frozen=True, slots=True)
class Reservation:
    """An amount kept for a request to a paid provider. `lapses`: by then it has ended, whatever became of it."""

    id: str
    caller: str
    model: str
    amount: int
    lapses: float


class LedgerFile:
    """The ledger of one file; `path` None keeps it in memory. Raises OSError where the file can't be had.

    `owner` is the coordinator's name, by which it finds what an earlier life of it left reserved. Sums are kept for
    `keep_days`, single requests up to `max_requests`. Methods raise sqlite3.Error where the disk takes nothing.
    """

    def __init__(self, path: Path | None, *, owner: str, keep_days: int, max_requests: int, now: float) -> None:
        self._owner = owner
        self._keep_days = keep_days
        self._max_requests = max_requests
        self._pruned_on = -1
        self._db = _opened(path)
        (self.ledger_id,) = self._db.execute("SELECT ledger FROM about").fetchone()
        with self._writing():
            self._charge("owner = ?", owner)
        self.books(now)

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    # --- what paid providers may cost, and did ----------------------------------------------------------------------

    def reserve(self, asked: Reservation, limits: Limits, now: float) -> tuple[Books, Shortage | None]:
        """Keeps an amount, unless the limits have too little left. Returns the books as they are after it."""
        day = day_of(now)
        with self._writing():
            self._charge("lapses <= ?", now)
            lack = shortage(limits, self._books(day), asked.amount, now)
            if lack is None:
                self._db.execute(
                    "INSERT INTO reserved (id, owner, day, caller, model, amount, lapses) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (asked.id, self._owner, day, asked.caller, asked.model, asked.amount, asked.lapses),
                )
            return self._books(day), lack

    def settle(self, reservation_id: str, spent: int, now: float) -> Books:
        """A request has ended, and cost so much. One that has lapsed stays as it was counted."""
        with self._writing():
            row = self._db.execute(
                "DELETE FROM reserved WHERE id = ? RETURNING day, caller, model", (reservation_id,)
            ).fetchone()
            if row is not None:
                day, caller, model = row
                self._spend(day, caller, model, spent)
            return self._books(day_of(now))

    def books(self, now: float) -> Books:
        """How the budget stands, with what has lapsed counted."""
        with self._writing():
            self._charge("lapses <= ?", now)
            return self._books(day_of(now))

    def _charge(self, condition: str, value: str | float) -> None:
        """Counts reserved amounts as spent; what their requests really cost nobody knows any more."""
        rows = self._db.execute(
            f"DELETE FROM reserved WHERE {condition} RETURNING day, caller, model, amount",  # noqa: S608
            (value,),
        ).fetchall()
        for row in rows:
            self._spend(*row)

    def _spend(self, day: int, caller: str, model: str, amount: int) -> None:
        if not amount:
            return
        self._db.execute(
            "INSERT INTO spent (day, caller, model, amount) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET amount = amount + excluded.amount",
            (day, caller, model, amount),
        )
        self._db.execute(
            "INSERT INTO spent_a_day (day, amount) VALUES (?, ?) "
            "ON CONFLICT DO UPDATE SET amount = amount + excluded.amount",
            (day, amount),
        )

    def _books(self, day: int) -> Books:
        sums = [
            self._db.execute(
                f"SELECT coalesce(sum(amount), 0) FROM {table} WHERE day BETWEEN ? AND ?",  # noqa: S608
                (since, day),
            ).fetchone()[0]
            for since in (day, month_of(day))
            for table in ("spent_a_day", "reserved")
        ]
        return Books(day, *sums)

    # --- what became of requests ------------------------------------------------------------------------------------

    def note(self, entries: Sequence[Entry]) -> None:
        """Requests have ended."""
        if not entries:
            return
        with self._writing():
            self._db.executemany(
                "INSERT INTO requests (at, request, caller, model, place, completed, prompt_tokens, output_tokens, "
                "spent, avoided) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(entry.at, entry.request_id, entry.caller, entry.model, entry.where, entry.completed),
                        *(entry.prompt_tokens, entry.output_tokens, entry.spent, entry.avoided),
                    )
                    for entry in entries
                ],
            )
            self._db.executemany(
                "INSERT INTO sums (day, caller, model, place, requests, prompt_tokens, output_tokens, avoided) "
                "VALUES (?, ?, ?, ?, 1, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + 1, "
                "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                "output_tokens = output_tokens + excluded.output_tokens, avoided = avoided + excluded.avoided",
                [
                    (
                        *(day_of(entry.at), entry.caller, entry.model, entry.where),
                        *(entry.prompt_tokens, entry.output_tokens, entry.avoided),
                    )
                    for entry in entries
                ],
            )
            self._prune(day_of(entries[-1].at))

    def latest(self, limit: int, *, caller: str | None = None) -> tuple[Entry, ...]:
        """Requests of a caller, or of everybody, that ended last, the newest first."""
        rows = self._db.execute(
            "SELECT at, request, caller, model, place, completed, prompt_tokens, output_tokens, spent, avoided "
            "FROM requests WHERE ? IS NULL OR caller = ? ORDER BY id DESC LIMIT ?",
            (caller, caller, limit),
        )
        return tuple(
            Entry(at, request, caller, model, Where(place), bool(completed), *sums)
            for at, request, caller, model, place, completed, *sums in rows
        )

    def lines(self, grouping: Grouping, *, since: int, caller: str | None = None) -> tuple[Line, ...]:
        """Sums of a caller, or of everybody, from a day on: the latest days or months first, else the dearest."""
        name = _NAMES[grouping]
        rows = self._db.execute(
            f"""
            SELECT name, sum(local), sum(external), sum(cached), sum(prompts), sum(outputs), sum(owed), sum(avoided)
            FROM (
              SELECT {name} AS name, requests * (place = 'local') AS local, requests * (place = 'external') AS external,
                requests * (place = 'cached') AS cached, prompt_tokens AS prompts, output_tokens AS outputs,
                0 AS owed, avoided FROM sums WHERE day >= :since AND (:caller IS NULL OR caller = :caller)
              UNION ALL
              SELECT {name}, 0, 0, 0, 0, 0, amount, 0 FROM spent
                WHERE day >= :since AND (:caller IS NULL OR caller = :caller)
            ) GROUP BY name ORDER BY {"name DESC" if grouping in _OF_TIME else "7 DESC, 2 + 3 + 4 DESC, name"}
            """,  # noqa: S608
            {"since": since, "caller": caller},
        )
        days = grouping is Grouping.DAY
        return tuple(Line(name_of(one) if days else one, *sums) for one, *sums in rows)

    def _prune(self, today: int) -> None:
        (newest, oldest) = self._db.execute("SELECT max(id), min(id) FROM requests").fetchone()
        if newest - oldest + 1 > self._max_requests:
            kept = self._max_requests - int(self._max_requests * _DROPPED_AT_ONCE)
            self._db.execute("DELETE FROM requests WHERE id <= ?", (newest - kept,))
        if today != self._pruned_on:
            self._pruned_on = today
            first = today - self._keep_days
            for table in ("sums", "spent", "spent_a_day"):
                self._db.execute(f"DELETE FROM {table} WHERE day < ?", (first,))  # noqa: S608

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, which nobody else's comes between: what is decided in it holds."""
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            yield


_OF_TIME = (Grouping.DAY, Grouping.MONTH)


def _opened(path: Path | None) -> sqlite3.Connection:
    if path is None:
        return _made(sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Every commit is waited for: a crash must not make money that was spent free again.
        return _made(open_shared(path, synchronous="FULL", busy_s=_BUSY_S))
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error


def _made(db: sqlite3.Connection) -> sqlite3.Connection:
    """The same with the schema. Unlike a cache, a ledger is never thrown away: another version's is refused."""
    db.execute("BEGIN IMMEDIATE")
    with db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _SCHEMA):
            raise OSError(f"the ledger is of another version of Chorus ({version}); name another file (costs.file)")
        if version == 0:
            for statement in _CREATE.split(";"):
                db.execute(statement)
            db.execute("INSERT INTO about VALUES (?)", (uuid.uuid4().hex,))
            db.execute(f"PRAGMA user_version = {_SCHEMA}")
    return db
