"""The keys of costs: prices and budgets of paid providers, and the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from chorus.config.section import AbsolutePath, Section
from chorus.config.texts import map_of_text
from chorus.core.costs.budget import Limits
from chorus.core.costs.prices import MICRO, Price, Prices


def _price(text: str) -> str:
    Price.parse(text)
    return text


PriceTexts = Annotated[
    Mapping[Annotated[str, Field(min_length=1)], Annotated[str, AfterValidator(_price)]], BeforeValidator(map_of_text)
]
Dollars = Annotated[float, Field(ge=0, le=1_000_000)]


class CostSettings(Section):
    """What paid providers charge and may cost, and the ledger in which a coordinator counts it."""

    flag_prefix: ClassVar[str] = "costs-"

    file: AbsolutePath | None = Field(
        default=None,
        description="SQLite file of the ledger: what requests cost and would have cost elsewhere. Coordinators of one "
        "machine that name the same file share it, and its budget.",
        json_schema_extra={"shown_default": "in memory; `chorus up` keeps one"},
    )
    prices: PriceTexts = Field(
        default={},
        description="What models of paid providers cost, each MODEL=PROMPT/COMPLETION in millionths of a US dollar for "
        "a million tokens (150000/600000 is 0.15 and 0.60 USD), or PROMPT/COMPLETION/REQUEST with what each request "
        "costs; MODEL is a family or artifact as `chorus models list` shows it, or * for all others.",
    )
    daily_budget_usd: Dollars | None = Field(
        default=None,
        description="The most that paid providers may cost a day (UTC); with a budget, those whose price isn't known "
        "aren't asked.",
        json_schema_extra={"shown_default": "no limit"},
    )
    monthly_budget_usd: Dollars | None = Field(
        default=None,
        description="The most that paid providers may cost a month (UTC).",
        json_schema_extra={"shown_default": "no limit"},
    )
    answer_tokens: int = Field(
        default=4096,
        ge=1,
        le=10_000_000,
        description="Tokens for which a budget is reserved where a request says nothing of its answer's length; what "
        "is longer may exceed the budget.",
    )
    baseline_usd: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        default=None,
        description="What a request is taken to cost elsewhere, such as 0.15; `chorus costs` then tells what requests "
        "that no paid provider had a part in have avoided.",
        json_schema_extra={"shown_default": "nothing is reckoned"},
    )
    keep_days: int = Field(default=400, ge=62, le=36_500, description="Days for which daily sums are kept.")
    max_requests: int = Field(
        default=100_000, ge=1, le=100_000_000, description="Requests kept by themselves; the oldest make room."
    )

    @property
    def limits(self) -> Limits:
        """The budgets."""
        return Limits(_micro(self.daily_budget_usd), _micro(self.monthly_budget_usd))

    @property
    def price_list(self) -> Prices:
        """The prices."""
        return Prices({model: Price.parse(text) for model, text in self.prices.items()})

    @property
    def baseline(self) -> int | None:
        """What a request is taken to cost elsewhere, in micro USD."""
        return _micro(self.baseline_usd)


def _micro(usd: float | None) -> int | None:
    return None if usd is None else round(usd * MICRO)
