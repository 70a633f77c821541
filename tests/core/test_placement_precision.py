"""Of one family's files the more precise one is preferred, by so much and no more."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.fleet.directory import DirectoryEntry
from chorus.core.fleet.records import ModelLoad, ModelStatus
from chorus.core.placement import Needs, place, survey
from chorus.core.placement.precision import loss
from tests.core import placement_fleet as fleet

ALPHA = Needs(model="alpha")


def file(quantization: str, family: str = "alpha") -> ModelStatus:
    made = fleet.model(family)
    return replace(
        made, artifact=replace(made.artifact, name=f"{family}.{quantization}.gguf", quantization=quantization)
    )


def runner(name: str, *files: ModelStatus, rates: tuple[float, ...], used: int = 0) -> DirectoryEntry:
    loads = tuple(
        ModelLoad(one.artifact.name, used, 4, 0, tokens_per_second=rate) for one, rate in zip(files, rates, strict=True)
    )
    return fleet.runner(name, *files, loads=loads)


def chosen(*entries: DirectoryEntry, needs: Needs = ALPHA) -> Counter[str]:
    directory, rng = fleet.directory(*entries), random.Random(1)
    return Counter(place(needs, directory, rng=rng).model.artifact.quantization for _ in range(200))


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [("F32", 0), ("BF16", 0), ("Q8_0", 0), ("q8_0", 0), ("", 0), ("AWQ", 0), ("Q6_K", 0.125), ("Q5_0", 0.5),
     ("Q4_0", 1), ("q4_K_M", 0.5), ("int4", 1), ("IQ3_XS", 1), ("Q2_K", 2), ("IQ1_S", 4)],
)  # fmt: skip
def test_what_names_tell(quantization: str, expected: float) -> None:
    assert loss(quantization, 10**9) == expected


def test_a_large_model_loses_less() -> None:
    tiny, small, even, large, larger = (loss("Q4_0", count * 10**6) for count in (10, 250, 1000, 7000, 70_000))
    assert (tiny, small, even) == (4, 2, 1)
    assert even > large > larger > 0
    assert loss("Q4_0", 0) == large


def test_a_runner_that_has_both_answers_with_the_precise_one_unless_the_other_is_twice_as_fast() -> None:
    both = file("Q8_0"), file("Q4_0")
    assert chosen(runner("r", *both, rates=(20.0, 30.0))) == {"Q8_0": 200}
    assert chosen(runner("r", *both, rates=(20.0, 50.0))) == {"Q4_0": 200}
    assert chosen(runner("r", *both, rates=(20.0, 30.0)), needs=Needs(model="alpha.Q4_0.gguf")) == {"Q4_0": 200}


def test_of_several_runners_the_precise_one_is_asked_while_it_has_room() -> None:
    precise, quick = runner("a", file("Q8_0"), rates=(20.0,)), runner("b", file("Q4_0"), rates=(25.0,))
    assert chosen(precise, quick)["Q8_0"] > 140
    full = runner("a", file("Q8_0"), rates=(20.0,), used=4)
    assert chosen(full, quick)["Q4_0"] > 120


def test_the_explanation_has_the_same_cost() -> None:
    directory = fleet.directory(
        runner("a", file("Q8_0"), rates=(20.0,)),
        runner("b", file("Q4_0"), rates=(32.0,)),
        runner("c", file("Q4_0", "beta"), rates=(32.0,)),
    )
    first, second = survey(ALPHA, directory).candidates
    assert (first.runner_id, second.runner_id) == ("a", "b")
    assert dict(first.terms) == {"decode": pytest.approx(256 / 20)}
    assert dict(second.terms) == {"decode": pytest.approx(8.0), "precision": pytest.approx(8.0)}
    assert second.cost == pytest.approx(16.0)
    seen = {place(ALPHA, directory, rng=random.Random(seed)).cost for seed in range(20)}
    assert seen <= {first.cost, second.cost}


@given(st.sampled_from(["Q8_0", "Q4_0", "Q2_K", "F16", ""]), st.lists(st.floats(1, 100), min_size=2, max_size=8))
def test_who_has_the_same_files_is_told_apart_by_nothing_of_this(quantization: str, rates: list[float]) -> None:
    entries = [runner(f"r{at}", file(quantization), rates=(rate,)) for at, rate in enumerate(rates)]
    for candidate in survey(ALPHA, fleet.directory(*entries)).candidates:
        assert "precision" not in dict(candidate.terms)
        assert candidate.cost == pytest.approx(sum(seconds for _, seconds in candidate.terms))
