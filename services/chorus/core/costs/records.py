"""What the ledger keeps of each request, and what it tells of many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from chorus.core.costs.budget import Books, Limits


class Where(StrEnum):
    """Who answered a request: engines of the household, a paid provider (in part, at least), or the cache."""

    LOCAL = "local"
    EXTERNAL = "external"
    CACHED = "cached"


@dataclass(frozen=True, slots=True)
class Entry:
    """One request that has ended. `spent` is what it cost, `avoided` what it would have cost elsewhere, by the
    configured baseline; both micro USD. `at` is seconds since the Unix epoch."""

    at: float
    request_id: str
    caller: str
    model: str
    where: Where
    completed: bool
    prompt_tokens: int = 0
    output_tokens: int = 0
    spent: int = 0
    avoided: int = 0


class Grouping(StrEnum):
    """What the lines of a report are by."""

    DAY = "day"
    MONTH = "month"
    MODEL = "model"
    CALLER = "caller"


@dataclass(frozen=True, slots=True)
class Line:
    """Sums of requests that have `name` in common: a day or month, a model's family, or a caller's SPIFFE id.

    `spent` is what paid providers were owed, that for requests of which nothing else is known (the coordinator was
    killed) included.
    """

    name: str
    local: int = 0
    external: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    spent: int = 0
    avoided: int = 0

    @property
    def requests(self) -> int:
        """How many ended."""
        return self.local + self.external + self.cached

    @property
    def kept_local(self) -> float | None:
        """The share that no paid provider had a part in; None where there was no request."""
        return (self.local + self.cached) / self.requests if self.requests else None

    @classmethod
    def total(cls, lines: Iterable[Line], name: str = "") -> Line:
        """The sum of several."""
        sums = [0] * 7
        for line in lines:
            own = (
                *(line.local, line.external, line.cached),
                *(line.prompt_tokens, line.output_tokens, line.spent, line.avoided),
            )
            sums = [one + other for one, other in zip(sums, own, strict=True)]
        return cls(name, *sums)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a report is to tell: of today and `days` before (None: of this month), and of the `latest` requests."""

    grouping: Grouping = Grouping.DAY
    days: int | None = None
    latest: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Lines by `grouping`, those of the most recent or most expensive first, and how the budget stands.

    `now` is when it was made. `baseline` is what a request is taken to cost elsewhere, None where none is configured.
    `unpriced` are models of paid providers whose price isn't configured, so that they seem to cost nothing. `ledger`
    names the file, so that coordinators that share one are not counted twice; it is made up for one in memory.
    """

    grouping: Grouping
    now: float
    lines: tuple[Line, ...]
    books: Books
    limits: Limits
    baseline: int | None
    unpriced: tuple[str, ...]
    ledger: str
    latest: tuple[Entry, ...] = ()
