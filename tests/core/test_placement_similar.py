"""Which model stands in for another one, and for which requests none ever does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import NotFoundError, OverloadedError, RunnersUnavailableError, UnknownModelError
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import Artifact, EngineKind, ModelState, Tier
from chorus.core.generation import (
    DeliveredChoice,
    Fallback,
    GenerationRequest,
    Requirements,
    Sampling,
    Substitution,
    TextPrompt,
    TokenPrompt,
)
from chorus.core.placement import FallingBack, KnownModels, Miss, Needs, Situation, survey
from chorus.core.placement.fit import fit
from chorus.core.placement.similar import MAX_REMEMBERED, REMEMBERED_S, most_similar
from tests.core import placement_fleet as fleet

NOW = Situation()
GONE = UnknownModelError("nobody has it")
TIERS = list(Tier)
likes = st.none() | st.builds(
    fleet.artifact,
    st.sampled_from([*fleet.FAMILIES, "gone"]),
    st.just(""),
    tier=st.sampled_from(Tier),
    tags=st.sets(st.sampled_from(fleet.TAGS), max_size=2).map(tuple),
    parameter_count=st.integers(0, 10**12),
)


def stands_in(
    directory: Directory,
    *,
    model: str = "gone",
    like: Artifact | None = None,
    default: str = "",
    external: bool = False,
) -> str | None:
    found = most_similar(Needs(model=model), directory, NOW, like=like, default=default, external=external)
    return None if found is None else found.model


@given(fleet.needs, fleet.directories(), fleet.situations, likes, st.booleans())
def test_whoever_stands_in_serves_every_need_now_and_nobody_alike_is_of_a_nearer_tier(
    needs: Needs, directory: Directory, situation: Situation, like: Artifact | None, external: bool
) -> None:
    needs = replace(needs, model=needs.model or "nothing")
    found = most_similar(needs, directory, situation, like=like, default="alpha", external=external)
    # Said plainly: whichever family could serve it now, were it named, with every tag and no bill that is not allowed.
    tags = needs.tags | set(like.tags if like is not None else ())
    could = {
        status.artifact.family: status
        for entry in directory.entries.values()
        for other in fleet.FAMILIES
        if other != needs.model
        for fitting in [fit(replace(needs, model=other, tags=tags, allow_external=external), entry, situation)]
        if not isinstance(fitting, Miss)
        for status, _, _ in fitting
        if status.artifact.name != needs.model
    }
    if found is None:
        # Who makes vectors or scores is never chosen for an answer.
        assert all({"embedding"} & set(status.artifact.tags) for status in could.values())
        return
    assert found.model in could
    assert replace(found, model=needs.model, tags=needs.tags, allow_external=needs.allow_external) == needs
    candidates = survey(found, directory, situation=situation, last_resort=False).candidates
    assert candidates
    for candidate in candidates:
        engines = {engine.name: engine.kind for engine in candidate.entry.record.runner.engines}
        assert external or engines.get(candidate.model.engine, EngineKind.EXTERNAL) is not EngineKind.EXTERNAL


@given(st.lists(st.sampled_from(Tier), min_size=1, max_size=5), st.sampled_from(Tier))
def test_the_nearest_tier_wins_and_of_two_the_more_capable_one(tiers: list[Tier], asked: Tier) -> None:
    directory = fleet.directory(
        *(fleet.runner(f"r{index}", fleet.model(f"m{index}", tier=tier)) for index, tier in enumerate(tiers))
    )
    chosen = stands_in(directory, like=fleet.artifact("gone", tier=asked))
    assert chosen is not None
    place = {tier: TIERS.index(tier) - TIERS.index(asked) for tier in tiers}
    best = place[tiers[int(chosen[1:])]]
    assert abs(best) == min(map(abs, place.values()))
    assert best >= 0 or -best not in place.values()


def test_of_models_as_near_one_in_memory_then_the_one_of_nearest_size() -> None:
    like = fleet.artifact("gone", parameter_count=4_000_000_000)
    cold = fleet.runner("r1", fleet.model("cold", state=ModelState.AVAILABLE, parameter_count=4_000_000_000))
    little = fleet.runner("r2", fleet.model("little", parameter_count=1_000_000_000))
    near = fleet.runner("r3", fleet.model("near", parameter_count=5_000_000_000))
    assert stands_in(fleet.directory(cold, little, near), like=like) == "near"
    assert stands_in(fleet.directory(cold, little), like=like) == "little"
    assert stands_in(fleet.directory(cold), like=like) == "cold"


def test_another_artifact_of_the_same_family_is_most_like_one() -> None:
    directory = fleet.directory(
        fleet.runner("r1", fleet.model("alpha", "alpha.q4", state=ModelState.AVAILABLE), fleet.model("beta"))
    )
    assert stands_in(directory, model="alpha.q8", like=fleet.artifact("alpha", "alpha.q8")) == "alpha"


def test_who_lacks_a_tag_is_not_alike_and_of_an_unknown_model_the_default_stands_in() -> None:
    directory = fleet.directory(fleet.runner("r1", fleet.model("beta", tags=("chat",)), fleet.model("gamma")))
    assert stands_in(directory, like=fleet.artifact("gone", tags=("chat", "code"))) is None
    assert stands_in(directory, default="gamma") == "gamma"


def test_what_a_model_was_like_is_remembered_when_it_has_left_and_memory_is_bounded() -> None:
    known = KnownModels()
    gone = fleet.runner("r1", fleet.model("alpha", tier=Tier.LARGE)).record
    known.left(gone, 0.0)
    found = known.find("alpha.gguf", fleet.directory(), REMEMBERED_S)
    assert found is not None
    assert found.tier is Tier.LARGE
    assert known.find("alpha.gguf", fleet.directory(), REMEMBERED_S + 1.0) is None
    here = fleet.directory(fleet.runner("r2", fleet.model("alpha", tier=Tier.FULL)))
    assert known.find("alpha", here, 0.0) == here.entries["r2"].record.runner.models[0].artifact
    for number in range(MAX_REMEMBERED):
        known.left(fleet.runner("r1", fleet.model(f"m{number}")).record, 0.0)
    assert known.find("alpha", fleet.directory(), 0.0) is None


def test_what_a_living_runner_removes_is_remembered_too() -> None:
    known = KnownModels()
    known.has(fleet.runner("r1", fleet.model("alpha"), fleet.model("beta")).record, 0.0)
    assert known.find("beta", fleet.directory(), 0.0) is None
    known.has(fleet.runner("r1", fleet.model("alpha")).record, 10.0)
    assert known.find("beta", fleet.directory(), 10.0 + REMEMBERED_S) is not None
    assert known.find("alpha", fleet.directory(), 10.0) is None


def test_after_a_restart_is_known_what_was_there_and_what_was_gone() -> None:
    known, again = KnownModels(), KnownModels()
    known.left(fleet.runner("r1", fleet.model("old")).record, 0.0)
    known.left(fleet.runner("r1", fleet.model("gone")).record, 100.0)
    known.has(fleet.runner("r2", fleet.model("alpha")).record, 100.0)
    again.recall(known.remembered(50.0 + REMEMBERED_S))
    assert again.find("gone", fleet.directory(), 100.0 + REMEMBERED_S) is not None
    assert again.find("alpha", fleet.directory(), 50.0 + 2 * REMEMBERED_S) is not None
    assert again.find("old", fleet.directory(), 0.0) is None


HELLO = GenerationRequest("gone", TextPrompt("hello"))
MESH = fleet.directory(fleet.runner("r1", fleet.model("alpha")))


@pytest.mark.parametrize(
    "request_",
    [
        replace(HELLO, requirements=Requirements(artifact_sha256="ab" * 32)),
        replace(HELLO, resume=(DeliveredChoice(0, (1, 2), "x"),)),
        replace(HELLO, prompt=TokenPrompt((1, 2))),
        replace(HELLO, adapter="pirate"),
        replace(HELLO, sampling=Sampling(logit_bias={5: 1.0})),
    ],
    ids=["pinned", "resumed", "token ids", "adapter", "logit bias"],
)
def test_what_is_meant_for_one_model_is_never_answered_by_another(request_: GenerationRequest) -> None:
    falling_back = FallingBack(Fallback(similar_model=True), request_)
    assert not falling_back.applies_to(Needs.of_generation(request_), GONE)


def test_only_with_leave_only_where_nobody_serves_it_and_once() -> None:
    needs = Needs.of_generation(HELLO)
    assert not FallingBack(Fallback(external=True), HELLO).applies_to(needs, GONE)
    falling_back = FallingBack(Fallback(similar_model=True), HELLO)
    assert not falling_back.applies_to(needs, OverloadedError("full", retry_after_s=1.0))
    assert not falling_back.applies_to(needs, NotFoundError("no such adapter"))
    assert not falling_back.applies_to(replace(needs, model=""), GONE)
    assert falling_back.applies_to(needs, RunnersUnavailableError("all away"))
    assert falling_back.instead(needs, GONE, MESH, NOW, known=KnownModels(), default="", now=0.0).model == "alpha"
    assert falling_back.substitution == Substitution("gone", "alpha", "UNKNOWN_MODEL")
    assert not falling_back.applies_to(needs, GONE)


def test_where_nobody_is_alike_the_needs_stay_and_there_is_nothing_to_tell() -> None:
    falling_back = FallingBack(Fallback(similar_model=True), HELLO)
    needs = Needs.of_generation(HELLO)
    assert falling_back.instead(needs, GONE, fleet.directory(), NOW, known=KnownModels(), default="", now=0.0) is needs
    assert falling_back.substitution is None
