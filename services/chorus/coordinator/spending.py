"""What a request has reserved of its account's quotas, and what it used of it so far."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from chorus.core.callers import Grant


@dataclass(slots=True, eq=False)
class Spending:
    """One reservation. What is used once it is `settled`, by a run that others read too, is told to `late`."""

    grant: Grant
    tokens: int
    late: Callable[[Grant, int, int], object]
    reservation: str = field(default_factory=lambda: uuid.uuid4().hex)
    prompt: int = 0
    output: int = 0
    settled: bool = False

    def anew(self) -> Spending:
        """One without a reservation, for what is used when this one is settled; that is counted as it comes."""
        return Spending(self.grant, 0, self.late, settled=True)

    def used(self, prompt: int, output: int) -> None:
        """So many more tokens were read and written for it."""
        if self.settled:
            self.late(self.grant, prompt, output)
        else:
            self.prompt += prompt
            self.output += output


_current: ContextVar[Spending | None] = ContextVar("chorus_spending", default=None)


def spends(spending: Spending | None) -> None:
    """What follows in this task, and in tasks that it starts, is for that reservation."""
    _current.set(spending)


def current_spending() -> Spending | None:
    """The reservation under which a request runs; None where nothing is counted."""
    return _current.get()


def spent(prompt: int, output: int) -> None:
    """A generation, or whatever else reads and writes tokens, has ended, having used so much."""
    spending = _current.get()
    if spending is not None and (prompt or output):
        spending.used(prompt, output)
