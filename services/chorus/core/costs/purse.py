"""What a coordinator can pay for now: what placement looks at before it considers a paid provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from chorus.core.costs.budget import Books, Limits, Shortage, shortage
from chorus.core.costs.prices import Price, Prices
from chorus.core.errors import BudgetExhaustedError
from chorus.core.fleet.records import Artifact


@dataclass(frozen=True, slots=True)
class Unpriced:
    """A budget is set, and what the model costs is not known, so that the budget could not be kept."""


Unaffordable: TypeAlias = Shortage | Unpriced


@dataclass(frozen=True, slots=True)
class Purse:
    """Prices, limits, and what was spent until `now`. `answer_tokens`: what an answer without a stated length is taken
    to have at most."""

    prices: Prices
    limits: Limits
    books: Books
    answer_tokens: int
    now: float

    def lacks(self, artifact: Artifact, prompt_tokens: int, answer_tokens: int) -> Unaffordable | None:
        """Why a request of that size can't be paid for; None where it can. No limit allows everything."""
        if not self.limits:
            return None
        price = price_of(self.prices, artifact)
        if price is None:
            return Unpriced()
        amount = most_of(price, prompt_tokens, answer_tokens, assumed=self.answer_tokens)
        return shortage(self.limits, self.books, amount, self.now)


def price_of(prices: Prices, artifact: Artifact) -> Price | None:
    """What a model costs; None where it isn't known."""
    return prices.of((artifact.name, artifact.family))


def most_of(price: Price, prompt_tokens: int, answer_tokens: int, *, assumed: int) -> int:
    """What is reserved for a request: the most that it costs where its answer has a stated length (0: it has none, and
    is taken to have no more than `assumed` tokens)."""
    return price.of(prompt_tokens, answer_tokens or assumed)


def exhausted(lack: Shortage) -> BudgetExhaustedError:
    """The error for a caller."""
    left = max(0, lack.limit - lack.spent - lack.reserved)
    reserved = f", with {usd(lack.reserved)} kept for requests under way" if lack.reserved else ""
    return BudgetExhaustedError(
        f"the {lack.period}'s budget for paid providers has {usd(left)} left of {usd(lack.limit)}{reserved}, and this "
        f"request may cost {usd(lack.amount)}; ask for a shorter answer or one of the mesh's own models, wait for the "
        f"next {lack.period} (UTC), or have costs.{_KEYS[lack.period]} raised at the coordinators",
        metadata={
            "period": lack.period.value,
            "limit_micro_usd": str(lack.limit),
            "spent_micro_usd": str(lack.spent),
            "reserved_micro_usd": str(lack.reserved),
            "needed_micro_usd": str(lack.amount),
        },
        retry_after_s=max(0.0, lack.ends_in_s) if lack.amount <= lack.limit else None,
    )


def usd(micro: int) -> str:
    """An amount for people: cents where they say it, else as many places as it takes."""
    whole = f"{micro / 1e6:.6f}".rstrip("0")
    places = max(2, len(whole.partition(".")[2]))
    return f"{micro / 1e6:.{places}f} USD"


_KEYS = {"day": "daily_budget_usd", "month": "monthly_budget_usd"}
