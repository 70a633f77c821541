"""Which requests the cache may answer, the budget of wrong answers, the nearest vectors, answers that say the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.cache.budget import Budget
from chorus.core.cache.likeness import alike
from chorus.core.cache.nearest import Nearest, signs
from chorus.core.cache.policy import CacheMode, Permission, normalised, plan, question_of, without_question
from chorus.core.generation import (
    Conversation,
    DeliveredChoice,
    Fallback,
    GenerationRequest,
    Message,
    MessageRole,
    Priority,
    Requirements,
    Sampling,
    TextPart,
    TextPrompt,
    Tool,
)

GREEDY = Sampling(temperature=0.0)


def asks(text: str = "Why?", **more: object) -> GenerationRequest:
    prompt = Conversation((Message(MessageRole.USER, (TextPart(text),)),))
    return replace(GenerationRequest("m", prompt, sampling=GREEDY), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", list(CacheMode))
def test_what_a_request_says_counts_and_else_the_default_for_what_draws_the_same_tokens(mode: CacheMode) -> None:
    drawn = asks(sampling=Sampling())
    assert plan(asks(), None, mode).mode is mode
    assert plan(asks(sampling=Sampling(seed=1)), None, mode).mode is mode
    assert plan(drawn, None, mode).mode is CacheMode.OFF
    assert plan(drawn, mode, CacheMode.OFF).mode is mode
    assert plan(asks(), CacheMode.OFF, mode).mode is CacheMode.OFF


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (asks(resume=(DeliveredChoice(0, (1,)),)), "interrupted"),
        (asks(tools=(Tool("pay", "Pays.", {}, acts=True),)), "act"),
        (asks(adapter="style"), "adapter"),
    ],
)
def test_what_is_never_given_again(request_: GenerationRequest, why: str) -> None:
    found = plan(request_, CacheMode.SEMANTIC, CacheMode.SEMANTIC)
    assert found.mode is CacheMode.OFF
    assert why in found.reason
    assert found.asks_store  # for an old answer where nobody can give one


@pytest.mark.parametrize("asked", [None, *CacheMode])
def test_a_private_request_is_nothing_to_a_store_on_the_network(asked: CacheMode | None) -> None:
    private = asks(requirements=Requirements(private=True))
    found = plan(private, asked, CacheMode.SEMANTIC, on_network=True)
    assert (found.mode, found.asks_store) == (CacheMode.OFF, False)
    assert "private" in found.reason or asked is CacheMode.OFF
    for request_, on_network in ((private, False), (asks(), True)):
        found = plan(request_, asked, CacheMode.SEMANTIC, on_network=on_network)
        assert (found.mode, found.asks_store) == (CacheMode.SEMANTIC if asked is None else asked, True)


def test_only_a_question_in_words_is_compared() -> None:
    assert plan(asks(), CacheMode.SEMANTIC, CacheMode.OFF).mode is CacheMode.SEMANTIC
    for other in (asks("x" * 401), replace(asks(), prompt=TextPrompt("Once")), asks(" "), asks(prompt_logprobs=1)):
        found = plan(other, CacheMode.SEMANTIC, CacheMode.OFF)
        assert found.mode is CacheMode.EXACT
        assert found.reason
    assert question_of(asks(" Why? ")) == "Why?"
    assert without_question(asks("Why?")) == without_question(asks("How?"))
    assert without_question(asks("Why?")) != without_question(asks("How?", sampling=Sampling(seed=2)))


def test_urgency_and_session_make_no_other_request() -> None:
    urgent = asks(priority=Priority.BATCH, session_id="s", requirements=Requirements(private=True))
    assert normalised(urgent) == asks()
    assert normalised(asks(requirements=Requirements(tags=("code",)))) != asks()


def test_requests_are_run_as_one_only_where_the_same_may_answer() -> None:
    nobody = Fallback()
    several = [
        Permission.of(replace(asks(), model=""), nobody),
        Permission.of(asks(), nobody),
        Permission.of(asks(), Fallback(external=True)),
        Permission.of(asks(), Fallback(similar_model=True)),
        Permission.of(asks(requirements=Requirements(private=True)), nobody),
    ]
    assert len(set(several)) == len(several)
    assert Permission.of(asks(priority=Priority.BATCH), Fallback(cached_answer=True)) == several[1]


@settings(max_examples=100)
@given(right=st.integers(0, 2000), wrong=st.integers(0, 50), allowed=st.floats(0.001, 0.5))
def test_what_is_explored_keeps_wrong_answers_within_the_budget(right: int, wrong: int, allowed: float) -> None:
    budget = Budget(wrong=allowed)
    share, chance = budget.explored_share(right, wrong), budget.chance_right(right, wrong)
    assert budget.least <= share <= 1.0
    assert share + (1.0 - share) * chance >= 1.0 - allowed - 1e-9
    # A wrong one never makes it trust more, a right one never less.
    assert budget.explored_share(right, wrong + 1) >= share - 1e-9
    assert budget.explored_share(right + 1, wrong) <= share + 1e-9


def test_an_entry_that_was_wrong_is_mostly_explored() -> None:
    budget = Budget()
    assert budget.explored_share(0, 0) == budget.least
    assert budget.explored_share(0, 1) > 0.5
    assert budget.explores(0, 3, 0.6)
    assert not budget.explores(0, 0, 0.6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2), st.integers(0, 7), st.booleans()), max_size=120),
    st.integers(1, 8),
)
def test_the_nearest_are_those_of_a_plain_search(steps: list[tuple[int, int, int, bool]], limit: int) -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(8, 100)).astype(np.float32)
    nearest, plain = Nearest(2), dict[int, tuple[int, int]]()
    for number, group, which, removes in steps:
        if removes:
            nearest.remove(number)
            plain.pop(number, None)
        else:
            nearest.add(number, group, signs(vectors[which]))
            plain[number] = (group, which)
    known = list(plain)
    nearest.add_all([*known, 31, 32], [7] * len(known) + [0, 1], np.array([signs(vectors[0])] * (len(known) + 2)))
    plain.update({31: (0, 0), 32: (1, 0)})
    assert len(nearest) == len(plain)
    for group in range(3):
        asked = vectors[3]

        def apart(number: int, asked: np.ndarray = asked) -> int:
            return int(((vectors[plain[number][1]] > 0) != (asked > 0)).sum())

        found = nearest.near(group, signs(asked), limit)
        those = sorted(apart(number) for number, (of, _) in plain.items() if of == group)
        assert all(plain[number][0] == group for number in found)
        assert [apart(number) for number in found] == those[:limit]


@pytest.mark.parametrize("groups", [1, 2, 9])
def test_of_many_the_nearest_are_found_without_sorting_them(groups: int) -> None:
    rng = np.random.default_rng(6)
    vectors = rng.normal(size=(3000, 130)).astype(np.float32)
    nearest = Nearest(3)
    nearest.add_all(range(3000), [number % groups for number in range(3000)], np.array([signs(one) for one in vectors]))
    for asked in (vectors[groups], rng.normal(size=130).astype(np.float32)):
        apart = ((vectors > 0) != (asked > 0)).sum(axis=1)
        those = sorted(apart[0::groups])
        for limit in (1, 5, 200, 4000):
            found = nearest.near(0, signs(asked), limit)
            assert all(number % groups == 0 for number in found)
            assert [apart[number] for number in found] == those[:limit]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris.", "paris", True),
        ("It is Paris, of course.", "It is Paris.", True),
        ("It takes 5 minutes.", "It takes 15 minutes.", False),
        ("You can do that.", "You can't do that.", False),
        ("Paris.", "Lyon.", False),
        ("x > 3", "x < 3", False),
        ("Since x > 3 it is so.", "Since 3 > x it is so.", False),
        ("+", "-", False),
        ("C++", "C#", False),
        ("A+", "A-", False),
        ("It is -5.", "It is 5.", False),
        ("They are 1, 2 and 3.", "They are 3, 2 and 1.", False),
        ("- Paris\n- **Lyon**", "* Paris\n* Lyon", True),
        ("It is 1,500 km.", "It is 1500 km", True),
        ("", "", True),
    ],
)
def test_answers_that_say_the_same(one: str, other: str, same: bool) -> None:
    assert alike(one, other) is same
