"""What each strategy makes of its members' answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.ensemble.auto import choose_strategy
from chorus.core.ensemble.choosing import Offer, choose_aggregator, choose_members, offers
from chorus.core.ensemble.complexity import estimate_complexity
from chorus.core.ensemble.machine import Conclude, Give
from chorus.core.ensemble.planning import MAX_MEMBERS, Policy, plan
from chorus.core.ensemble.records import (
    PROFILE,
    Complexity,
    EnsembleSpec,
    Level,
    Member,
    MemberSpec,
    MemberState,
    Strategy,
)
from chorus.core.ensemble.steps import Ask, ask_member
from chorus.core.ensemble.strategies import STRATEGIES
from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import EngineInfo, EngineKind, Tier
from chorus.core.generation import Conversation, Sampling, TextPrompt
from tests.core.ensemble_world import Says, World, request, task_of, text_asked
from tests.core.fleet_records import model, record

TRIO = [Member("a", "m1"), Member("b", "m2"), Member("c", "m3")]
ANSWERS = {"a": "Lyon", "b": "Paris", "c": "Nice"}


def world(strategy: Strategy, says: Says, members: list[Member] = TRIO, **more: object) -> World:
    return World(task_of(strategy, members, **more), STRATEGIES[strategy], says)


def answers_or(other: Says) -> Says:
    """The members answer as above; whatever else is asked, `other` does."""
    return lambda ask: ANSWERS[ask.part_id] if ask.part_id in ANSWERS else other(ask)


def prefers(city: str) -> Says:
    """A judge who finds that answer best, wherever it stands."""

    def pick(ask: Ask) -> str:
        first, second = text_asked(ask).split("Answer B:")
        return "A" if city in first else "B" if city in second else "A is as good as any"

    return pick


@pytest.mark.parametrize("city", sorted(ANSWERS.values()))
def test_a_judge_has_its_way_whatever_the_order(city: str) -> None:
    judged = world(Strategy.JUDGE, answers_or(prefers(city)))
    assert isinstance(judged.run(), Give)
    assert judged.given == city
    assert all(ask.request.model == "great" for name, ask in judged.asked.items() if name.startswith("+judge"))


@pytest.mark.parametrize("pick", ["A", "B", "neither", None])
def test_a_judge_that_looks_at_the_order_alone_decides_nothing(pick: str | None) -> None:
    says = {"a": "Paris", "b": "Lyon", "c": "Paris"}
    judged = world(Strategy.JUDGE, lambda ask: says.get(ask.part_id, pick))
    judged.run()
    assert judged.given == "Paris", "more say so"


def test_who_all_agree_need_no_judge() -> None:
    judged = world(Strategy.JUDGE, lambda _: "Paris")
    judged.run()
    assert set(judged.asked) == {"a", "b", "c"}


@pytest.mark.parametrize("strategy", [Strategy.REFINE, Strategy.COUNCIL, Strategy.FACETS])
def test_a_text_is_composed_from_all_and_streamed(strategy: Strategy) -> None:
    composed = world(strategy, answers_or(lambda ask: "Paris" if ask.request.model == "great" else "a review"))
    final = composed.run()
    assert isinstance(final, Conclude)
    assert composed.given == "Paris"
    told = text_asked(composed.asked[final.part_id])
    assert "Which?" in told
    assert all(answer in told for answer in ANSWERS.values())
    assert final.verdict.agreement == pytest.approx(1 / 3)
    assert [outcome.member_id for outcome in final.verdict.members] == ["a", "b", "c"]
    assert final.verdict.answered_by == ""


@pytest.mark.parametrize("strategy", [Strategy.REFINE, Strategy.COUNCIL, Strategy.FACETS])
def test_where_nothing_can_be_composed_the_members_answer_stands(strategy: Strategy) -> None:
    says = {"a": "Lyon", "b": "Paris", "c": "paris"}
    left = world(strategy, lambda ask: says.get(ask.part_id))
    assert isinstance(left.run(), Give)
    assert left.given == "Paris"


def test_reviewers_see_the_others_answers_and_the_chair_sees_the_reviews() -> None:
    sat = world(Strategy.COUNCIL, answers_or(lambda ask: f"said by {ask.part_id}"))
    sat.run()
    review = text_asked(sat.asked["+review-a"])
    assert "Paris" in review
    assert "Nice" in review
    assert "Lyon" not in review
    assert all(f"said by +review-{name}" in text_asked(sat.asked["+chair"]) for name in "abc")


def test_drafts_are_written_again_in_rounds() -> None:
    refined = world(Strategy.REFINE, answers_or(lambda ask: f"better, says {ask.part_id}"), round_count=3)
    refined.run()
    assert [ask.request.model for name, ask in refined.asked.items() if name.endswith("-3")] == ["m1", "m2", "m3"]
    assert "better, says +a-2" in text_asked(refined.asked["+b-3"])
    assert "better, says +c-3" in text_asked(refined.asked["+aggregator"])


LADDER = [Member("s1", "small"), Member("s2", "small"), Member("l1", "large"), Member("l2", "large")]


@pytest.mark.parametrize(
    ("says", "asked", "given_text"),
    [
        ({"s1": "Paris", "s2": "Paris"}, 2, "Paris"),
        ({"s1": "Paris", "s2": "Lyon", "l1": "Nice", "l2": "Nice"}, 4, "Nice"),
        ({"s1": "Paris", "s2": "Lyon"}, 4, "Paris"),
    ],
)
def test_a_cascade_goes_up_while_it_is_unsure(says: dict[str, str], asked: int, given_text: str) -> None:
    climbed = world(Strategy.CASCADE, lambda ask: says.get(ask.part_id), LADDER)
    final = climbed.run()
    assert isinstance(final, Give)
    assert (final.verdict.asked, climbed.given) == (asked, given_text)
    assert final.verdict.count(MemberState.SKIPPED) == 4 - asked


# --- planning -------------------------------------------------------------------------------------------------------

MESH = (
    Offer("big", Tier.FULL, 30_000_000_000),
    Offer("mid", Tier.SMALL, 3_000_000_000, artifacts=frozenset({"mid.Q4.gguf"})),
    Offer("tiny", Tier.MICRO, 200_000_000),
)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(MESH), unique=True),
    st.integers(1, 12),
    st.lists(st.sampled_from(list(Tier)), min_size=1, unique=True),
)
def test_members_are_as_many_as_wanted_and_spread(mesh: list[Offer], count: int, tiers: list[Tier]) -> None:
    members = choose_members(request(), mesh, Level(count, tuple(tiers), 30.0))
    assert len(members) == (count if mesh else 0)
    assert len({member.member_id for member in members}) == len(members)
    assert len({(member.model, member.draw) for member in members}) == len(members)
    of_tiers = {offer.model for offer in mesh if offer.tier in tiers}
    assert not of_tiers or {member.model for member in members} <= of_tiers
    shares = [sum(member.model == model for member in members) for model in {member.model for member in members}]
    assert not shares or max(shares) - min(shares) <= 1


@pytest.mark.parametrize("complexity", list(Complexity))
def test_a_level_has_its_members_deadline_and_simpler_sets(complexity: Complexity) -> None:
    task = plan(EnsembleSpec(Strategy.VOTE, complexity=complexity), request(), MESH, Policy())
    assert (len(task.members), task.deadline_s) == (PROFILE[complexity].members, PROFILE[complexity].deadline_s)
    climbed = plan(EnsembleSpec(Strategy.CASCADE, complexity=complexity), request(), MESH, Policy())
    for members in (climbed.members, *climbed.simpler):
        places = [["tiny", "mid", "big"].index(member.model) for member in members]
        assert places == sorted(places), "a cascade goes up"
    counts = [len(members) for members in (task.members, *task.simpler)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1


def test_what_the_caller_names_is_taken() -> None:
    members = (MemberSpec("tiny", 2), MemberSpec("mid.Q4.gguf"), MemberSpec("big"))
    task = plan(EnsembleSpec(Strategy.CASCADE, members, quorum=2, deadline_s=3.0), request(), MESH, Policy())
    assert [member.member_id for member in task.members] == ["tiny-1", "tiny-2", "mid.Q4.gguf", "big"]
    assert [member.tier for member in task.members] == [Tier.MICRO, Tier.MICRO, Tier.SMALL, Tier.FULL]
    assert (task.quorum, task.deadline_s, task.simpler) == (2, 3.0, ())
    assert task.aggregator_model == "big"
    assert choose_aggregator([MESH[2]], ()) == "tiny"


def test_sides_are_given_to_who_has_none() -> None:
    members = (MemberSpec("mid", 2), MemberSpec("big", instructions="Think of money."))
    task = plan(EnsembleSpec(Strategy.FACETS, members, facet_set="story"), request(), MESH, Policy())
    assert [member.member_id for member in task.members] == ["plot-mid-1", "characters-mid-2", "big"]
    assert [member.instructions.split(".")[0] for member in task.members] == [
        "Think of the plot alone: what happens, in what order, and why",
        "Think of the characters alone: who they are, what they want, how they change",
        "Think of money",
    ]


@pytest.mark.parametrize(
    ("strategy", "members"),
    [
        (Strategy.VOTE, (MemberSpec("mid", MAX_MEMBERS + 1),)),
        (Strategy.VOTE, (MemberSpec("mid", 2), MemberSpec("big", member_id="mid-1"))),
        (Strategy.VOTE, (MemberSpec("mid", member_id="+judge-1-ab"),)),
        (
            Strategy.FACETS,
            (MemberSpec("mid", 1, "against-x", instructions="Be brief."), MemberSpec("big", member_id="x")),
        ),
    ],
)
def test_members_that_cannot_be(strategy: Strategy, members: tuple[MemberSpec, ...]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plan(EnsembleSpec(strategy, members), request(), MESH, Policy())
    assert caught.value.metadata["field"] == "ensemble.members"


def test_what_the_mesh_offers() -> None:
    kinds = (EngineInfo("e", "1", EngineKind.LOCAL), EngineInfo("paid", "1", EngineKind.EXTERNAL))
    paid = replace(model("paid.1", "paid"), engine="paid")
    models = (model("a.gguf", "a", features="chat logprobs"), model("base.gguf", "base", features="token_ids"), paid)
    embedder = model("v.gguf", "v", features="embed")
    embedder = replace(embedder, artifact=replace(embedder.artifact, tags=("embedding",)))
    found = record("r1", models=(*models, embedder))
    found = replace(found, runner=replace(found.runner, engines=kinds))
    mesh = Directory(entries={"r1": DirectoryEntry(found, heard_at=0.0)})

    def names(asked: str = "", *, allow_external: bool = False) -> list[tuple[str, bool, bool]]:
        wanted = replace(request(), model=asked)
        return [
            (offer.model, offer.chats, offer.tells_logprobs)
            for offer in offers(wanted, mesh, allow_external=allow_external)
        ]

    assert names() == [("a", True, True), ("base", False, False)], "what costs money is not chosen for anybody"
    assert names(allow_external=True)[-1] == ("paid", True, False)
    assert names("paid") == [("paid", True, False)], "who names it allows it"
    assert names("base.gguf") == [("base.gguf", False, False)]
    assert names("nothing") == []


def test_who_has_no_chat_template_is_told_in_plain_text() -> None:
    mesh = (MESH[0], replace(MESH[2], chats=False))
    task = plan(EnsembleSpec(Strategy.VOTE, (MemberSpec("big"), MemberSpec("tiny"))), request(), mesh, Policy())
    asked = World(task, STRATEGIES[Strategy.VOTE], lambda _: "Paris").asked
    assert isinstance(asked["big"].request.prompt, Conversation)
    assert asked["tiny"].request.prompt == TextPrompt("Question: Which?\nAnswer:")
    assert asked["tiny"].request.stop.strings == ("\nQuestion:", "\n\n")
    assert choose_members(request(), mesh, PROFILE[Complexity.SIMPLE])[0].model == "big"


def test_those_that_are_told_the_same_draw_samples_and_others_answer_as_the_caller_asked() -> None:
    specs = (MemberSpec("tiny", 2), MemberSpec("tiny", instructions="Be brief."), MemberSpec("tiny"))
    greedy = replace(request(), sampling=Sampling(temperature=0.0))
    task = plan(EnsembleSpec(Strategy.VOTE, specs), greedy, MESH, Policy())
    assert [member.draw for member in task.members] == [0, 1, 0, 2]
    plain, again, brief, third = (ask_member(task, member).request.sampling for member in task.members)
    assert plain.temperature == brief.temperature == 0.0
    assert again.temperature > 0.0
    assert third.temperature > 0.0
    greatest = replace(greedy, sampling=Sampling(seed=2**64 - 1))
    seeds = [ask_member(replace(task, request=greatest), member).request.sampling.seed for member in task.members]
    assert seeds == [2**64 - 1, 0, 2**64 - 1, 1], "the wire has no greater ones"


def test_what_is_left_open_is_chosen() -> None:
    assert estimate_complexity(request("What is the capital of France?")) is Complexity.SIMPLE
    assert estimate_complexity(request("Prove and explain why it holds. " * 40)) is not Complexity.SIMPLE
    assert choose_strategy(request(), Complexity.EXPERT, 1) is Strategy.ROUTE
    for complexity in Complexity:
        task = plan(EnsembleSpec(Strategy.AUTO, complexity=complexity), request(), MESH, Policy())
        assert task.strategy in STRATEGIES
