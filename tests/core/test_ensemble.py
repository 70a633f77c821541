"""Ensembles as folds: whatever order their members end in, the answer is theirs and the verdict tells what happened."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.ensemble.answers import clusters, normalise, same_answer, similarity, support
from chorus.core.ensemble.confidence import UNKNOWN, confidence_of, confidence_of_all
from chorus.core.ensemble.machine import Conclude, Fail, Give
from chorus.core.ensemble.race import race
from chorus.core.ensemble.records import Answer, Member, MemberState, Strategy
from chorus.core.ensemble.route import route
from chorus.core.ensemble.strategies import STRATEGIES
from chorus.core.ensemble.vote import vote
from chorus.core.ensemble.waves import Room
from tests.core.ensemble_world import World, task_of

MODELS = ("m1", "m2", "m3")
SAYINGS = ("Paris", "paris.", "Lyon", "Nice", None)
members = st.lists(st.sampled_from(MODELS), min_size=1, max_size=7).map(
    lambda models: [Member(f"a{number}", model) for number, model in enumerate(models)]
)
rooms = st.builds(
    Room,
    slots=st.dictionaries(st.sampled_from(MODELS), st.integers(1, 3)),
    loaded=st.frozensets(st.sampled_from(MODELS)),
    models_at_once=st.integers(0, 2),
)


def is_settled(said: list[str], open_count: int) -> bool:
    """Whether the rest can't equal the leader, all of them saying what the second says, or what nobody has."""
    counts = sorted(Counter(said).values(), reverse=True)
    return bool(counts) and counts[0] > (*counts[1:], 0)[0] + open_count


@settings(max_examples=150)
@given(st.data(), members, rooms, st.integers(0, 4), st.sampled_from([Strategy.RACE, Strategy.VOTE]))
def test_the_verdict_tells_what_happened(
    data: st.DataObject, asked: list[Member], room: Room, quorum: int, strategy: Strategy
) -> None:
    says = {member.member_id: data.draw(st.sampled_from(SAYINGS)) for member in asked}
    task = task_of(strategy, asked, quorum=quorum, deadline_s=30.0)
    world = World(task, STRATEGIES[strategy], lambda ask: says[ask.part_id], room)
    while world.final is None:
        if data.draw(st.integers(0, 4)) == 4:
            world.passes(data.draw(st.sampled_from([1.0, 20.0])))
        else:
            world.ends(data.draw(st.sampled_from(sorted(world.running))))
    if isinstance(world.final, Fail):
        assert not world.answered
        assert world.final.error.reason == "UNAVAILABLE"
        return
    verdict = world.final.verdict
    fared = {outcome.member_id: outcome.state for outcome in verdict.members}
    said = {name: normalise(answer.text) for name, answer in world.answered.items()}
    open_count = len(asked) - len(said) - len(world.failed)
    settled = strategy is Strategy.RACE or (not quorum and is_settled(list(said.values()), open_count))
    for member in asked:
        name = member.member_id
        if name in said or name in world.failed:
            assert fared[name] == (MemberState.ANSWERED if name in said else MemberState.FAILED)
        elif name not in world.asked:
            assert fared[name] == MemberState.SKIPPED
        else:
            assert fared[name] == (MemberState.UNNEEDED if settled else MemberState.LATE)
    assert verdict.asked == len(world.asked)
    assert verdict.agreement == pytest.approx(Counter(said.values())[normalise(world.given)] / len(said))
    for outcome in verdict.members:
        own = said.get(outcome.member_id)
        assert set(outcome.agrees_with) == {name for name, text in said.items() if text == own} - {outcome.member_id}
    assert 0 <= verdict.coherence <= 1
    assert verdict.answered_by == world.final.part_id
    if strategy is Strategy.VOTE:
        assert Counter(said.values())[normalise(world.given)] == max(Counter(said.values()).values())
        if quorum and len(said) + len(world.failed) < len(asked) and world.now < 130.0:
            assert len(said) == quorum


@settings(max_examples=60)
@given(members, st.randoms(use_true_random=False), rooms)
def test_a_vote_ends_as_soon_as_it_is_settled_and_says_what_it_would_have(
    asked: list[Member], random: Random, room: Room
) -> None:
    says = {member.member_id: random.choice(SAYINGS[:3]) for member in asked}
    quick = World(task_of(Strategy.VOTE, asked), vote, lambda ask: says[ask.part_id], room)
    while quick.final is None:
        told = [normalise(answer.text) for answer in quick.answered.values()]
        assert not is_settled(told, len(asked) - len(told)), "nobody is waited for in vain"
        quick.ends(random.choice(sorted(quick.running)))
    patient = World(task_of(Strategy.VOTE, asked, quorum=len(asked)), vote, lambda ask: says[ask.part_id])
    for name in quick.answered:
        patient.ends(name)
    if patient.final is None:
        patient.run()
    assert len(patient.answered) == len(asked)
    assert normalise(patient.given) == normalise(quick.given)


def test_a_race_ends_with_the_first_good_answer_and_cancels_the_others() -> None:
    world = World(
        task_of(Strategy.RACE, [Member(name, name) for name in "abc"]),
        race,
        lambda ask: " " * (ask.part_id == "a") or "x",
    )
    world.ends("a")
    assert world.final is None
    world.ends("b")
    assert isinstance(world.final, Give)
    assert world.final.part_id == "b"
    assert world.cancelled == {"c"}


def test_routing_goes_to_the_next_one_and_streams_it() -> None:
    says = {"a": None, "b": "here"}
    world = World(task_of(Strategy.ROUTE, [Member("a", "m1"), Member("b", "m2")]), route, lambda ask: says[ask.part_id])
    assert isinstance(world.run(), Conclude)
    assert world.given == "here"


def test_nobody_answers_so_the_simpler_set_is_asked() -> None:
    task = task_of(Strategy.VOTE, [Member("a", "m1")], simpler=((Member("a", "m2"), Member("b", "m2")),))
    world = World(task, vote, lambda ask: None if ask.request.model == "m1" else "yes")
    final = world.run()
    assert isinstance(final, Give)
    assert final.verdict.fallback_count == 1
    assert [(outcome.member_id, outcome.state) for outcome in final.verdict.members] == [
        ("a", MemberState.FAILED),
        ("a~1", MemberState.ANSWERED),
        ("b~1", MemberState.ANSWERED),
    ]


def test_the_deadline_does_not_end_the_wait_for_the_only_answer() -> None:
    world = World(task_of(Strategy.VOTE, [Member(name, name) for name in "ab"], deadline_s=30.0), vote, lambda _: "x")
    world.passes(31.0)
    assert world.final is None
    world.ends("b")
    assert isinstance(world.final, Give)
    assert world.final.verdict.count(MemberState.LATE) == 1


# --- answers and confidence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Paris", " paris.", True),
        ("The answer is 1,234.", "1234", True),
        ("-3", "3", False),
        ("1.5", "15", False),
        ("yes", "no", False),
        ("", "", False),
    ],
)
def test_answers_are_the_same_but_for_their_form(first: str, second: str, same: bool) -> None:
    assert same_answer(first, second) is same


@given(st.lists(st.text(max_size=8), max_size=6))
def test_every_answer_is_in_one_cluster(texts: list[str]) -> None:
    found = clusters(texts, same_answer)
    assert sorted(index for cluster in found for index in cluster) == list(range(len(texts)))
    assert all(len(one) >= len(other) for one, other in pairwise(found))
    for one, other in [(one, other) for one in texts for other in texts]:
        assert 0 <= similarity(one, other) <= 1
        assert similarity(one, other) == similarity(other, one)
        assert not same_answer(one, other) or similarity(one, other) == 1


@given(st.lists(st.floats(-30, 0), max_size=5), st.floats(0, 1), st.integers(0, 12))
def test_confidence_is_a_share(logprobs: list[float], agreement: float, answered: int) -> None:
    alone = confidence_of(Answer("one", "text", logprobs=tuple(logprobs)))
    assert 0 <= alone <= 1
    assert logprobs or alone == UNKNOWN
    assert 0 <= confidence_of_all(agreement, [alone], answered) <= 1
    assert confidence_of_all(1.0, [alone], 1) == alone


# --- confidence in composed texts -----------------------------------------------------------------------------------

_SENTENCES = st.lists(st.sampled_from(["Paris is large.", "It rains in May.", "Bread costs 3 euros.", "Trees grow."]))
_TEXTS = _SENTENCES.map(" ".join)
_WEIGHTED = st.lists(st.tuples(_TEXTS, st.floats(0.01, 1.0)), min_size=1, max_size=5)


@given(_TEXTS, _WEIGHTED, st.randoms(use_true_random=False), st.booleans())
def test_support_is_a_share_whoever_speaks_first(
    text: str, drafts: list[tuple[str, float]], random: Random, by_any: bool
) -> None:
    def of(pairs: list[tuple[str, float]], *, more: bool = by_any) -> float:
        return support(text, [draft for draft, _ in pairs], [weight for _, weight in pairs], by_any=more)

    shuffled = random.sample(drafts, len(drafts))
    assert 0 <= of(drafts) <= 1
    assert of(drafts) == pytest.approx(of(shuffled))
    assert of(drafts, more=False) <= of(drafts, more=True) + 1e-9
    # Another draft that says it all takes nothing away; one of other words adds nothing.
    assert of([*drafts, (text, 0.5)]) >= of(drafts) - 1e-9
    assert of([*drafts, ("zebra", 0.5)]) <= of(drafts) + 1e-9


def test_what_all_drafts_say_is_supported_and_another_number_is_not() -> None:
    drafts = ["Bread costs 3 euros. Trees grow.", "Trees grow, and bread costs 3 euros."]
    assert support("Bread costs 3 euros.", drafts, [0.5, 0.9]) == 1.0
    assert support("Bread costs 4 euros.", drafts, [0.5, 0.9]) == 0.0
    assert support("", drafts, [0.5, 0.9]) == support("Zebras.", drafts, [0.5, 0.9]) == 0.0
    assert support("Trees grow.", ["Trees grow.", "No idea"], [0.9, 0.1]) == pytest.approx(0.9)


@pytest.mark.parametrize("strategy", [Strategy.REFINE, Strategy.COUNCIL, Strategy.FACETS])
def test_a_composed_text_that_its_members_bear_out_is_surer_than_one_of_its_own(strategy: Strategy) -> None:
    drafts = {"a": "Paris is a large city with 2 rivers.", "b": "The large city of Paris with 2 rivers is old."}

    def confidence(composed: str) -> tuple[float, float]:
        task = task_of(strategy, [Member(name, name) for name in drafts], with_logprobs=frozenset({"great"}))
        world = World(task, STRATEGIES[strategy], lambda ask: drafts.get(ask.part_id, composed))
        final = world.run()
        assert isinstance(final, Conclude)
        assert world.asked[final.part_id].request.logprobs == 0, "how sure its writer was is asked for"
        return final.verdict.confidence, final.verdict.agreement

    (borne, agreed), (own, _) = confidence("Paris is a large city."), confidence("London has 9 rivers.")
    assert agreed == 0, "no text is the same as another"
    assert borne > own + 0.3


@given(st.lists(st.floats(-3, 0), min_size=1, max_size=13), st.integers(2, 8))
def test_a_text_is_no_less_sure_for_its_length(logprobs: list[float], times: int) -> None:
    piece = (logprobs * 13)[:13]
    one, many = (confidence_of(Answer("one", "text", logprobs=tuple(piece * count))) for count in (1, times))
    assert one == pytest.approx(many)
