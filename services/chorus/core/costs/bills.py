"""What one request owes paid providers: a bill for each attempt on one, priced by what the attempt has brought.

Tokens are the provider's own count once it has told; until then, and of an attempt that broke off, those of the prompt
are guessed and those of the answer are the ones that came. A provider that refused a request is owed nothing; one that
was left or lost before it answered may have read the prompt, and is taken to have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from chorus.core.costs.prices import Price

UPSTREAM_LOST = "upstream_lost"
"""In an error's metadata: the connection to a server broke when it had the request, so it may have read the prompt."""


@dataclass(slots=True)
class Bill:
    """One attempt. `price` None: not known. `delivered` tells how many tokens the whole answer has by now.

    `likely_prompt_tokens` is a guess.
    """

    runner_id: str
    model: str
    price: Price | None
    likely_prompt_tokens: int
    delivered: Callable[[], int] = lambda: 0
    began: bool = False
    """Whether the provider has begun to answer."""
    refused: bool = False
    """Whether the provider did nothing for it."""
    _before: int = 0
    _told: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self._before = self.delivered()

    def told(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The provider's own count, at its end; of the prompt 0 where it tells none."""
        self.began = True
        self._told = (prompt_tokens or self.likely_prompt_tokens, max(0, completion_tokens))

    @property
    def cost(self) -> int:
        """What is owed by now."""
        if self.refused or self.price is None:
            return 0
        came = max(0, self.delivered() - self._before)
        return self.price.of(*(self._told or (self.likely_prompt_tokens, came)))


@dataclass(slots=True)
class Tab:
    """A request's bills; those of its parts are on tabs of their own."""

    bills: list[Bill] = field(default_factory=list)
    parts: list[Tab] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """What all of them come to by now."""
        return sum(bill.cost for bill in self.bills) + sum(part.cost for part in self.parts)

    @property
    def was_used(self) -> bool:
        """Whether any provider was asked."""
        return bool(self.bills) or any(part.was_used for part in self.parts)

    def latest(self, runner_id: str) -> Bill | None:
        """The last bill of a runner."""
        return next((bill for bill in reversed(self.bills) if bill.runner_id == runner_id), None)
