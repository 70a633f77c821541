"""The latest events of one coordinator, and the place of each reader among them. Sans I/O.

Nothing is queued for anybody: there is one ring, and a reader is a number. So a reader that is slow, or has gone, costs
nothing and holds nobody up. What it misses when the ring has gone round, it is told to have missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from chorus.core.events.records import Detail, Event, EventFilter, EventKind, Subject

DEFAULT_CAPACITY = 8192
# Events looked at for one message, so that a reader who has much to catch up with does not hold up the loop.
BATCH_MAX = 256


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a log: after the event `sequence`; 0 is before the first."""

    epoch: int
    sequence: int


class LostReason(StrEnum):
    """Why events are missing."""

    LAGGED = "lagged"  # they are not kept any more
    OTHER_EPOCH = "other_epoch"  # the cursor is of another log


@dataclass(frozen=True, slots=True)
class Batch:
    """What happened, in order; the cursor is after it."""

    cursor: Cursor
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """Events are missing before the cursor: `count` of them, whether the reader wanted them or not (0: unknown)."""

    cursor: Cursor
    reason: LostReason
    count: int


@dataclass(frozen=True, slots=True)
class Bookmark:
    """Nothing that the reader wants happened up to the cursor."""

    cursor: Cursor


Told: TypeAlias = Batch | Lost | Bookmark


class EventLog:
    """A ring of the last `capacity` events. `epoch` must differ from that of every other log that a reader may know."""

    def __init__(self, epoch: int, *, capacity: int = DEFAULT_CAPACITY) -> None:
        self.epoch = epoch
        self._ring: list[Event | None] = [None] * capacity
        self._last = 0

    @property
    def last(self) -> int:
        """The sequence of the latest event; 0 where there was none."""
        return self._last

    @property
    def oldest(self) -> int:
        """The sequence of the oldest event that is kept; one more than `last` where there is none."""
        return max(1, self._last - len(self._ring) + 1)

    def append(self, at: float, kind: EventKind, subject: Subject, detail: Detail | None = None) -> Event:
        """Notes what happened, and returns it with its number."""
        self._last += 1
        event = Event(self._last, at, kind, subject, detail)
        self._ring[self._last % len(self._ring)] = event
        return event

    def get(self, sequence: int) -> Event:
        """An event that is kept: `oldest` to `last`."""
        event = self._ring[sequence % len(self._ring)]
        assert event is not None, f"event {sequence} is not kept"
        assert event.sequence == sequence, f"event {sequence} is not kept any more"
        return event

    def first_since(self, at: float) -> int:
        """The sequence of the oldest kept event that happened at `at` or later; one more than `last` for none.

        It goes back from the end, since clocks may have been put back in between.
        """
        sequence = self._last + 1
        while sequence > self.oldest and self.get(sequence - 1).at >= at:
            sequence -= 1
        return sequence


class EventReader:
    """One reader's place in a log.

    It goes on `after` a cursor of this log; with one of another log it is told so and begins with the oldest event.
    With none it begins with the first event since `since` (seconds since the Unix epoch), or with the next one.
    """

    def __init__(
        self,
        log: EventLog,
        condition: EventFilter | None = None,
        *,
        after: Cursor | None = None,
        since: float | None = None,
    ) -> None:
        self._log = log
        self._filter = condition if condition is not None else EventFilter()
        self._is_of_another = after is not None and (after.epoch != log.epoch or after.sequence > log.last)
        if self._is_of_another:
            self._next = log.oldest
        elif after is not None:
            self._next = after.sequence + 1
        else:
            self._next = log.last + 1 if since is None else log.first_since(since)

    @property
    def cursor(self) -> Cursor:
        """After the last event that was looked at."""
        return Cursor(self._log.epoch, self._next - 1)

    @property
    def misses_some(self) -> bool:
        """Whether `take` will say that events are missing."""
        return self._is_of_another or self._next < self._log.oldest

    @property
    def pending(self) -> bool:
        """Whether there is something that was not looked at yet."""
        return self._is_of_another or self._next <= self._log.last

    def take(self) -> Told:
        """What comes next: what is missing, or events, or a bookmark where nothing that was looked at is wanted."""
        log = self._log
        if self._is_of_another:
            self._is_of_another = False
            return Lost(self.cursor, LostReason.OTHER_EPOCH, 0)
        missed = log.oldest - self._next
        if missed > 0:
            self._next = log.oldest
            return Lost(self.cursor, LostReason.LAGGED, missed)
        end = min(log.last + 1, self._next + BATCH_MAX)
        looked_at = (log.get(sequence) for sequence in range(self._next, end))
        events = tuple(event for event in looked_at if self._filter.matches(event))
        self._next = end
        return Batch(self.cursor, events) if events else Bookmark(self.cursor)
