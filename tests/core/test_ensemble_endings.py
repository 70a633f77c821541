"""What ends an ensemble: its deadline, whoever is stuck, and no answer that says nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.ensemble.confidence import confidence_of
from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.machine import Conclude, Fail, Give
from chorus.core.ensemble.records import Answer, Member, MemberState, Strategy
from chorus.core.ensemble.strategies import STRATEGIES
from chorus.core.ensemble.waves import Room
from tests.core.ensemble_world import World, task_of

TRIO = [Member("a", "m1"), Member("b", "m2"), Member("c", "m3")]
DEADLINE_S = 30.0
STUCK = "stuck"
SAYINGS = ("Paris", "Lyon", "", " \n", None, STUCK)


def world(strategy: Strategy, says: dict[str, str | None], **more: object) -> World:
    """Who isn't in `says` is asked for nothing by the test."""
    task = task_of(strategy, more.pop("members", TRIO), deadline_s=DEADLINE_S, **more)  # type: ignore[arg-type]
    return World(task, STRATEGIES[strategy], lambda ask: says[ask.part_id])


def all_end(told: World, *names: str) -> None:
    for name in names:
        told.ends(name)


@settings(max_examples=200)
@given(st.data(), st.sampled_from(list(STRATEGIES)), st.integers(0, 3), st.booleans(), st.booleans())
def test_whoever_is_stuck_the_ensemble_ends_with_what_there_is(
    data: st.DataObject, strategy: Strategy, quorum: int, has_simpler: bool, is_weighed: bool
) -> None:
    members = TRIO[: data.draw(st.integers(1, 3))]
    task = task_of(
        strategy,
        members,
        quorum=quorum,
        deadline_s=DEADLINE_S,
        round_count=3,
        simpler=((Member("a", "m1"), Member("b", "m2")), (Member("a", "m1"),)) if has_simpler else (),
        learned=LEARNED if is_weighed else None,
    )
    drawn: dict[str, str | None] = {}
    room = Room(slots={"m1": 1})
    told = World(task, STRATEGIES[strategy], lambda ask: drawn[ask.part_id], room)
    while told.final is None:
        for name in told.running:
            drawn.setdefault(name, data.draw(st.sampled_from(SAYINGS)))
        able = sorted(name for name in told.running if drawn[name] != STUCK)
        if able:
            told.ends(data.draw(st.sampled_from(able)))
        elif told.machine.look_at is not None:
            told.passes(DEADLINE_S)
        else:
            break
    spoken = [answer for name, answer in told.answered.items() if not answer.is_blank and not name.startswith("+")]
    if told.final is None:
        assert not spoken, "who is waited for without end is the only hope"
        assert strategy is Strategy.ROUTE or not has_simpler or any("~2" in name for name in told.running)
        return
    rounds = 3 * len(task.members) + 5  # comparisons, redrafts, tiers, simpler sets, the final one
    assert told.now <= 100.0 + rounds * DEADLINE_S
    if isinstance(told.final, Fail):
        assert not told.answered
        return
    assert bool(told.given.strip()) is bool(spoken), "a blank one where all are"
    assert told.final.verdict.confidence == 0.0 or spoken


@pytest.mark.parametrize("strategy", [Strategy.JUDGE, Strategy.REFINE, Strategy.COUNCIL, Strategy.FACETS])
def test_a_model_that_composes_or_judges_and_is_stuck_is_left(strategy: Strategy) -> None:
    told = world(strategy, {"a": "Lyon", "b": "Paris", "c": "paris", "+review-a": "fine"}, round_count=3)
    all_end(told, "a", "b", "c")
    for _ in range(3):
        if told.final is None:
            told.passes(DEADLINE_S)
    assert isinstance(told.final, Give)
    assert told.given == "Paris", "most agree on it"
    assert told.final.verdict.count(MemberState.ANSWERED) == 3


def test_what_has_begun_to_speak_is_waited_for() -> None:
    told = world(Strategy.REFINE, {"a": "Lyon", "b": "Paris", "c": "Nice", "+aggregator": "All of them."})
    all_end(told, "a", "b", "c")
    told.speaks("+aggregator")
    assert told.machine.look_at is None
    told.passes(10 * DEADLINE_S)
    told.ends("+aggregator")
    assert isinstance(told.final, Conclude)
    assert told.given == "All of them."


def test_a_stuck_tier_is_left_for_the_next_and_the_last_for_what_there_is() -> None:
    told = world(Strategy.CASCADE, {"b": "Paris"}, threshold=1.0)
    told.passes(DEADLINE_S)
    assert set(told.running) == {"b"}
    told.ends("b")
    told.passes(DEADLINE_S)
    assert isinstance(told.final, Give)
    assert [outcome.state for outcome in told.final.verdict.members] == [
        MemberState.LATE,
        MemberState.ANSWERED,
        MemberState.LATE,
    ]


@pytest.mark.parametrize("strategy", [Strategy.VOTE, Strategy.CASCADE])
def test_the_simpler_set_is_asked_once_the_deadline_has_come_and_waited_for(strategy: Strategy) -> None:
    told = world(strategy, {"a~1": "Paris"}, members=TRIO[:1], simpler=((Member("a", "m0"),),))
    told.passes(DEADLINE_S)
    assert set(told.running) == {"a~1"}
    told.passes(10 * DEADLINE_S)
    told.ends("a~1")
    assert isinstance(told.final, Give)
    assert told.final.verdict.fallback_count == 1


@pytest.mark.parametrize("strategy", [Strategy.VOTE, Strategy.CASCADE, Strategy.ROUTE])
def test_where_all_fail_the_simpler_set_is_asked(strategy: Strategy) -> None:
    told = world(strategy, {"a": None, "a~1": "Paris"}, members=TRIO[:1], simpler=((Member("a", "m0"),),))
    told.run()
    assert told.given == "Paris"


# --- answers that say nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("is_weighed", [False, True])
def test_an_answer_that_says_nothing_never_wins(strategy: Strategy, *, is_weighed: bool) -> None:
    says = {"a": "", "b": "Paris", "c": "Lyon is a town", "+aggregator": " ", "+chair": "\n"}
    task = task_of(strategy, TRIO, quorum=2, threshold=0.99, learned=LEARNED if is_weighed else None)
    told = World(task, STRATEGIES[strategy], lambda ask: says.get(ask.part_id, ""))
    final = told.run()
    assert not isinstance(final, Fail)
    assert told.given.strip()
    assert final.verdict.answered_by in {"b", "c"}
    (blank,) = [outcome for outcome in final.verdict.members if outcome.member_id == "a"]
    assert (blank.state, blank.confidence) == (MemberState.ANSWERED, 0.0)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_where_nobody_says_anything_that_is_told(strategy: Strategy) -> None:
    told = World(
        task_of(strategy, TRIO, quorum=1), STRATEGIES[strategy], lambda ask: None if ask.part_id == "a" else " "
    )
    final = told.run()
    assert isinstance(final, Conclude if strategy is Strategy.ROUTE else Give)
    assert (told.given, final.verdict.confidence) == (" ", 0.0)
    assert set(told.asked) == {"a", "b", "c"}


def test_a_call_of_a_tool_says_something_without_words() -> None:
    assert confidence_of(Answer("a", "")) == 0.0
    assert Answer("a", "").is_blank
    assert not Answer("a", "", calls=True).is_blank
