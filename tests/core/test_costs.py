"""Prices, bills and the calendar of budgets; that a budget is kept is shown on the ledger itself (tests/store)."""

from __future__ import annotations

import calendar
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from math import ceil
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.costs import Bill, Books, Limits, Period, Price, Prices, Purse, Tab, shortage
from chorus.core.costs.budget import DAY_S, day_of, month_of, name_of, next_month
from chorus.core.costs.purse import Unpriced, exhausted, usd
from chorus.core.errors import BudgetExhaustedError, NoCapableRunnerError, OverloadedError
from chorus.core.fleet.directory import DirectoryEntry
from chorus.core.generation import (
    Conversation,
    EmbeddingRequest,
    GenerationRequest,
    Message,
    MessageRole,
    StopConditions,
    TextPart,
    TextPrompt,
)
from chorus.core.placement import Needs, Situation, place
from tests.core import placement_fleet as fleet

TOKENS = st.integers(0, 10**7)
MONEY = st.integers(0, 10**9)
DAYS = st.integers(0, 60_000)


@given(*(st.integers(0, 10**10 - 1) for _ in range(3)), TOKENS, TOKENS)
def test_a_price_is_rounded_up_and_never_by_a_whole_micro_usd(
    prompt: int, completion: int, request: int, read: int, written: int
) -> None:
    exact = Fraction(prompt * read + completion * written, 1_000_000) + request
    assert Price(prompt, completion, request).of(read, written) == ceil(exact)
    assert Price.parse(f"{prompt}/{completion}/{request}") == Price(prompt, completion, request)
    assert Price.parse(f" {prompt} / {completion} ") == Price(prompt, completion)


@pytest.mark.parametrize("text", ["", "1", "1/2/3/4", "-1/2", "1/2.5", "1/²", "a/b", "1/99999999999"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="should"):
        Price.parse(text)


def test_a_name_of_its_own_goes_before_that_for_all_others() -> None:
    prices = Prices({"gpt": Price(1), "gpt:mini": Price(2), "*": Price(3)})
    assert prices.of(("gpt:mini", "gpt")) == Price(2)
    assert prices.of(("gpt:huge", "gpt")) == Price(1)
    assert prices.of(("claude",)) == Price(3)
    assert Prices({"gpt": Price(1)}).of(("claude",)) is None


@given(DAYS, st.floats(0, DAY_S - 1))
def test_days_and_months_are_those_of_utc(day: int, second: float) -> None:
    then = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day, seconds=second)
    assert day_of(day * DAY_S + second) == day
    assert name_of(day) == f"{then:%Y-%m-%d}"
    first = then.replace(day=1)
    assert name_of(month_of(day)) == f"{first:%Y-%m-%d}"
    length = calendar.monthrange(then.year, then.month)[1]
    assert name_of(next_month(day)) == f"{first + timedelta(days=length):%Y-%m-%d}"


@given(DAYS, st.integers(0, 100), st.lists(MONEY, min_size=4, max_size=4))
def test_books_of_a_later_day_know_of_the_same_month_alone(day: int, later: int, sums: list[int]) -> None:
    before = Books(day, *sums)
    after = before.at(day + later)
    assert after.day == day + later
    if not later:
        assert after == before
    else:
        assert (after.spent_today, after.reserved_today) == (0, 0)
        same = month_of(day) == month_of(day + later)
        month = (before.spent_this_month, before.reserved_this_month)
        assert (after.spent_this_month, after.reserved_this_month) == (month if same else (0, 0))


@given(st.none() | MONEY, st.none() | MONEY, DAYS, *[MONEY] * 5)
def test_what_is_let_through_is_within_both_limits(
    a_day: int | None, a_month: int | None, day: int, spent: int, reserved: int, more: int, kept: int, amount: int
) -> None:
    books = Books(day, spent, reserved, spent + more, reserved + kept)
    now = day * DAY_S + 5.0
    lack = shortage(Limits(a_day, a_month), books, amount, now)
    over_day = a_day is not None and spent + reserved + amount > a_day
    over_month = a_month is not None and spent + more + reserved + kept + amount > a_month
    assert (lack is not None) == (over_day or over_month)
    if lack is not None:
        assert lack.period is (Period.MONTH if over_month else Period.DAY)
        assert 0 < lack.ends_in_s <= 31 * DAY_S
        error = exhausted(lack)
        # Waiting is said to help only where it will.
        assert (error.retry_after_s is not None) == (amount <= lack.limit)
        assert f"costs.{'monthly' if over_month else 'daily'}_budget_usd" in error.message


def test_a_purse_pays_for_what_it_knows_and_can() -> None:
    artifact = fleet.model(engine="paid").artifact
    prices = Prices({artifact.family: Price(prompt=1_000_000, completion=2_000_000)})

    def lacks(limits: Limits, prices: Prices = prices, answer: int = 10) -> object:
        return Purse(prices, limits, Books(0, spent_today=50), 100, 0.0).lacks(artifact, 30, answer)

    assert lacks(Limits()) is None
    assert lacks(Limits(), Prices()) is None
    assert lacks(Limits(100), Prices()) == Unpriced()
    assert lacks(Limits(100)) is None
    assert lacks(Limits(99)) is not None
    # Without a stated length an answer is taken to have 100 tokens.
    assert lacks(Limits(279), answer=0) is not None
    assert lacks(Limits(280), answer=0) is None


def test_bills_go_by_the_providers_count_once_there_is_one() -> None:
    came = [0]
    price = Price(prompt=1_000_000, completion=2_000_000, request=7)
    tab = Tab()
    assert not tab.was_used
    bill = Bill("r1", "gpt", price, likely_prompt_tokens=10, delivered=lambda: came[0])
    tab.bills.append(bill)
    assert bill.cost == 17
    came[0] = 3
    assert bill.cost == 23
    bill.told(12, 5)
    assert bill.cost == 29
    bill.told(0, 5)
    assert bill.cost == 27, "a provider that doesn't count the prompt leaves the guess"
    # Another attempt goes on: what came before is not its own.
    second = Bill("r2", "gpt", price, likely_prompt_tokens=13, delivered=lambda: came[0])
    part = Tab([second])
    tab.parts.append(part)
    assert Tab(parts=[part]).was_used
    came[0] = 4
    assert (part.cost, tab.cost) == (22, 49)
    second.refused = True
    assert tab.cost == 27
    assert tab.latest("r1") is bill
    assert tab.latest("r2") is None


@pytest.mark.parametrize(
    ("micro", "text"), [(0, "0.00 USD"), (150_000, "0.15 USD"), (1, "0.000001 USD"), (1_500, "0.0015 USD")]
)
def test_amounts_are_written_with_the_places_they_need(micro: int, text: str) -> None:
    assert usd(micro) == text


def purse(left: int, **prices: Price) -> Situation:
    """With so much left for today, of 1,000."""
    return Situation(purse=Purse(Prices(prices), Limits(1000), Books(0, spent_today=1000 - left), 100, 0.0))


NEEDS = Needs.of_generation(GenerationRequest("alpha", TextPrompt("0123456789"), stop=StopConditions(max_tokens=20)))
OUTSIDE = fleet.runner("outside", fleet.model(engine="paid"))
HOME = fleet.runner("home", fleet.model("alpha", "alpha.q8"))
ALPHA = Price(prompt=1_000_000, completion=2_000_000)


def placed(situation: Situation, *entries: DirectoryEntry, needs: Needs = NEEDS) -> str:
    return place(needs, fleet.directory(*entries), rng=Random(0), situation=situation).runner_id


def test_who_can_not_be_paid_is_no_candidate() -> None:
    assert placed(purse(50, alpha=ALPHA), OUTSIDE) == "outside"
    with pytest.raises(
        BudgetExhaustedError, match=r"0\.000049 USD left of 0\.001 USD, and this request may cost 0\.00005 "
    ):
        placed(purse(49, alpha=ALPHA), OUTSIDE)
    assert placed(purse(0, alpha=ALPHA), OUTSIDE, HOME) == "home"
    with pytest.raises(NoCapableRunnerError, match=r"outside has alpha.gguf .* \(costs\.prices\)"):
        placed(purse(1000), OUTSIDE)
    assert placed(Situation(), OUTSIDE) == "outside", "without a budget nobody asks for the price"
    # Who is merely full may be waited for; the budget is not what has to change.
    full = fleet.runner("home", fleet.model(slots=1), loads=(fleet.load(used=1, total=1, queued=99),))
    with pytest.raises(OverloadedError):
        placed(purse(0, alpha=ALPHA), OUTSIDE, full)


@given(st.integers(0, 2000), st.booleans())
def test_no_money_in_the_world_lets_private_prompts_out(left: int, home: bool) -> None:
    situation = purse(min(left, 1000), alpha=ALPHA) if left <= 1000 else Situation()
    needs = replace(NEEDS, private=True)
    if home:
        assert placed(situation, OUTSIDE, HOME, needs=needs) == "home"
    else:
        with pytest.raises(NoCapableRunnerError, match="paid provider"):
            placed(situation, OUTSIDE, needs=needs)


@given(st.lists(st.text(), min_size=1))
def test_no_tokenizer_makes_more_tokens_of_a_prompt_than_are_reserved(texts: list[str]) -> None:
    bytes_ = sum(len(text.encode()) for text in texts)
    messages = tuple(Message(MessageRole.USER, (TextPart(text),)) for text in texts)
    chat = Needs.of_generation(GenerationRequest("alpha", Conversation(messages)))
    assert chat.most_prompt_tokens >= bytes_ + len(texts)
    whole = Needs.of_generation(GenerationRequest("alpha", TextPrompt("".join(texts))))
    assert whole.most_prompt_tokens == bytes_
    assert Needs.of_embedding(EmbeddingRequest("alpha", tuple(texts))).most_prompt_tokens == bytes_
