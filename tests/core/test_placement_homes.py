"""Models that must be loaded: once, where they fit best, and where every coordinator would load them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import ChorusError
from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import EngineInfo, EngineKind, Gpu, ModelState
from chorus.core.placement import Needs, Roster, Situation, place, survey
from chorus.core.placement.homes import is_cold
from tests.core import placement_fleet as fleet

COLD, LOADING = ModelState.AVAILABLE, ModelState.LOADING
ALPHA = Needs(model="alpha")


def chosen(directory: Directory, *, seed: int = 0, situation: Situation | None = None, needs: Needs = ALPHA) -> str:
    return place(needs, directory, rng=random.Random(seed), situation=situation or Situation()).runner_id


def cold(name: str, family: str = "alpha", *, memory: int = 16 * fleet.GIB, size: int = fleet.GIB) -> DirectoryEntry:
    return fleet.runner(name, fleet.model(family, state=COLD, size_bytes=size), memory=memory)


def with_gpu(entry: DirectoryEntry, free: int) -> DirectoryEntry:
    record = entry.record
    gpu = Gpu(0, "GPU-1", "gpu", 24 * fleet.GIB, free)
    engines = (EngineInfo("local", "1", EngineKind.LOCAL, ("cuda",)),)
    record = replace(record, runner=replace(record.runner, engines=engines), node=replace(record.node, gpus=(gpu,)))
    return replace(entry, record=record)


@given(fleet.needs, fleet.directories(), fleet.situations, st.integers(0, 2**32), st.integers(0, 2**32))
def test_of_those_that_would_have_to_load_it_one_alone_is_ever_chosen(
    needs: Needs, directory: Directory, situation: Situation, one: int, other: int
) -> None:
    found = set()
    for seed in (one, other):
        try:
            candidate = place(needs, directory, rng=random.Random(seed), situation=situation)
        except ChorusError:
            return
        if is_cold(candidate.model):
            found.add(candidate.runner_id)
    assert len(found) <= 1


@given(fleet.needs, fleet.directories(), fleet.situations, st.integers(0, 2**32))
def test_a_home_that_is_remembered_changes_no_choice(
    needs: Needs, directory: Directory, situation: Situation, seed: int
) -> None:
    try:
        first = place(needs, directory, rng=random.Random(seed), situation=situation)
    except ChorusError:
        return
    assert place(needs, directory, rng=random.Random(seed), situation=situation, home=first.home) == first
    # One that does not fit any more is no home.
    assert place(needs, directory, rng=random.Random(seed), situation=situation, home="nobody") == first


def test_a_roster_remembers_a_home_for_one_directory() -> None:
    roster, one, other = Roster(), fleet.directory(cold("r1")), fleet.directory(cold("r1"), version=2)
    assert roster.home(ALPHA, one) == ""
    roster.remember_home(ALPHA, "r1")
    assert (roster.home(ALPHA, one), roster.home(Needs(model="beta"), one)) == ("r1", "")
    assert roster.home(ALPHA, other) == ""


@given(st.integers(0, 2**32), st.integers(0, 20))
def test_what_two_coordinators_have_under_way_makes_no_difference(seed: int, count: int) -> None:
    directory = fleet.directory(*(cold(f"r{number}") for number in range(9)))
    busy = Situation(in_flight={f"r{seed % 9}": count})
    assert chosen(directory, seed=seed, situation=busy) == chosen(directory)


def test_models_have_homes_of_their_own_and_hardly_any_moves_when_a_runner_goes() -> None:
    families = [f"m{number}" for number in range(300)]
    entries = [
        fleet.runner(f"r{number}", *(fleet.model(family, state=COLD) for family in families)) for number in range(10)
    ]

    def homes(directory: Directory) -> dict[str, str]:
        return {family: chosen(directory, needs=Needs(model=family)) for family in families}

    before = homes(fleet.directory(*entries))
    counts = Counter(before.values())
    assert len(counts) == 10
    assert max(counts.values()) < 60
    after = homes(fleet.directory(*entries[1:]))
    assert {family for family in families if after[family] != before[family]} == {
        family for family in families if before[family] == "r0"
    }


def test_one_that_is_loading_it_is_waited_for() -> None:
    for name in ("a", "b", "c"):
        entries = [cold(other) for other in "abc" if other != name]
        loading = fleet.runner(name, fleet.model(state=LOADING))
        assert {chosen(fleet.directory(*entries, loading), seed=seed) for seed in range(20)} == {name}


def test_it_goes_where_it_fits() -> None:
    size = 8 * fleet.GIB
    tight = [cold(f"tight{number}", memory=9 * fleet.GIB, size=size) for number in range(5)]
    roomy = cold("roomy", memory=64 * fleet.GIB, size=size)
    assert chosen(fleet.directory(*tight, roomy)) == "roomy"
    gpu = with_gpu(cold("gpu", memory=64 * fleet.GIB, size=size), 20 * fleet.GIB)
    assert chosen(fleet.directory(*tight, roomy, gpu)) == "gpu"
    taken = with_gpu(cold("gpu", memory=9 * fleet.GIB, size=size), 2 * fleet.GIB)
    assert chosen(fleet.directory(*tight, roomy, taken)) == "roomy"


def test_one_that_fails_is_no_home_while_there_is_another() -> None:
    directory = fleet.directory(*(cold(f"r{number}") for number in range(5)))
    home = chosen(directory)
    other = chosen(directory, situation=Situation(penalties={home: 0.5}))
    assert other != home
    everybody = {f"r{number}": 0.5 for number in range(5)}
    assert chosen(directory, situation=Situation(penalties=everybody)) == home
    assert chosen(directory, situation=Situation(tried={home})) == other


def test_a_second_copy_is_loaded_only_once_the_first_is_so_busy_that_it_is_sooner() -> None:
    others = [cold(f"cold{number}") for number in range(8)]

    def warm(queued: int) -> DirectoryEntry:
        return fleet.runner("warm", fleet.model(), loads=(fleet.load(used=4, queued=queued, rate=20),))

    quiet = fleet.directory(warm(0), *others)
    assert {chosen(quiet, seed=seed) for seed in range(100)} == {"warm"}
    busy = {chosen(fleet.directory(warm(40), *others), seed=seed) for seed in range(100)}
    (home,) = busy
    assert home.startswith("cold")
    # Which is where it would have gone in the first place, were the first one not there.
    assert home == chosen(fleet.directory(*others))


def test_the_explanation_names_the_home_first_and_a_roster_changes_nothing() -> None:
    directory = fleet.directory(*(cold(f"r{number}") for number in range(30)), cold("x", "beta"))
    roster = Roster()
    home = chosen(directory)
    assert survey(ALPHA, directory).candidates[0].runner_id == home
    pool = roster.pool(ALPHA, directory)
    assert (len(pool.everybody), pool.warm) == (30, ())
    assert place(ALPHA, directory, rng=random.Random(3), pool=pool).runner_id == home


@pytest.mark.parametrize("state", [ModelState.LOADED, COLD])
def test_who_has_it_in_memory_is_known_until_a_runner_changes(state: ModelState) -> None:
    roster = Roster()
    first = fleet.directory(fleet.runner("a", fleet.model(state=state)), fleet.runner("b", fleet.model()))
    assert roster.pool(ALPHA, first).warm == (("a", "b") if state is ModelState.LOADED else ("b",))
    second = fleet.directory(fleet.runner("a", fleet.model()), fleet.runner("b", fleet.model(state=COLD)))
    assert roster.pool(ALPHA, second).warm == ("a",)
