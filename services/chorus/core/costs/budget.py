"""How much paid providers may cost a day and a month, and whether one more request fits.

An amount is reserved before a provider is asked, the most that the request is expected to cost, and settled at what it
did cost. So what is spent exceeds a limit by no more than requests cost above their own reservations. An amount counts
for the day, in UTC, on which it was reserved, however late it is settled. Money is micro USD; `now` is seconds since
the Unix epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from enum import StrEnum

DAY_S = 86_400
_EPOCH = date(1970, 1, 1).toordinal()


class Period(StrEnum):
    """What a limit is for."""

    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that may be spent; None: no limit."""

    day: int | None = None
    month: int | None = None

    def __bool__(self) -> bool:
        return self.day is not None or self.month is not None


@dataclass(frozen=True, slots=True)
class Books:
    """What was spent, and is reserved for requests under way, on `day` (since the epoch) and in its month."""

    day: int
    spent_today: int = 0
    reserved_today: int = 0
    spent_this_month: int = 0
    reserved_this_month: int = 0

    def at(self, day: int) -> Books:
        """The same on a later day, on which nothing was spent yet."""
        if day <= self.day:
            return self
        same_month = month_of(day) == month_of(self.day)
        return Books(
            day,
            spent_this_month=self.spent_this_month if same_month else 0,
            reserved_this_month=self.reserved_this_month if same_month else 0,
        )


@dataclass(frozen=True, slots=True)
class Shortage:
    """A limit that `amount` more would exceed; `ends_in_s` is when it begins anew."""

    period: Period
    limit: int
    spent: int
    reserved: int
    amount: int
    ends_in_s: float


def shortage(limits: Limits, books: Books, amount: int, now: float) -> Shortage | None:
    """Why `amount` may not be reserved; None where it may. Of two limits, the one that is longer in force."""
    month, day = limits.month, limits.day
    if month is not None and books.spent_this_month + books.reserved_this_month + amount > month:
        ends_in_s = next_month(books.day) * DAY_S - now
        return Shortage(Period.MONTH, month, books.spent_this_month, books.reserved_this_month, amount, ends_in_s)
    if day is not None and books.spent_today + books.reserved_today + amount > day:
        ends_in_s = (books.day + 1) * DAY_S - now
        return Shortage(Period.DAY, day, books.spent_today, books.reserved_today, amount, ends_in_s)
    return None


def day_of(now: float) -> int:
    """The day, counted since the epoch."""
    return int(now // DAY_S)


def month_of(day: int) -> int:
    """The first day of a day's month."""
    return day - date.fromordinal(_EPOCH + day).day + 1


def next_month(day: int) -> int:
    """The first day of the month after."""
    return month_of(month_of(day) + 31)


def name_of(day: int) -> str:
    """A day as people write it: 2026-11-26."""
    return date.fromordinal(_EPOCH + day).isoformat()
