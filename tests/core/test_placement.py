"""Placement over random directories: what is chosen serves the request, and nothing is left unexplained."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import ChorusError, OverloadedError, RunnersUnavailableError
from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import EngineKind, ModelState, ModelStatus, RunnerState
from chorus.core.placement import (
    Needs,
    Pool,
    RejectionReason,
    Roster,
    Situation,
    Work,
    detail,
    place,
    pool_of,
    survey,
)
from tests.core import placement_fleet as fleet


def serves(needs: Needs, entry: DirectoryEntry, status: ModelStatus, situation: Situation) -> bool:
    """The rules once more, said plainly: whether a runner serves a request with one of its models."""
    record = entry.record
    kinds = {engine.name: (engine.kind, engine.plaintext) for engine in record.runner.engines}
    kind, plaintext = kinds.get(status.engine, (EngineKind.EXTERNAL, True))
    merged = [record.node.labels, record.runner.labels]
    load = next((load for load in record.load.models if load.model == status.artifact.name), None)
    waiting = (load.slots_used + load.queued if load else 0) + situation.in_flight.get(record.runner.runner_id, 0)
    slots = max(1, (load.slots_total if load else 0) or status.slot_count)
    return all(
        (
            needs.model in ("", status.artifact.family, status.artifact.name),
            needs.model or needs.work is not Work.GENERATE or "embedding" not in status.artifact.tags,
            needs.features <= status.features,
            not needs.adapter or needs.adapter in status.adapters,
            needs.tier in (None, status.artifact.tier),
            needs.tags <= set(status.artifact.tags),
            not needs.private or (kind is not EngineKind.EXTERNAL and not plaintext),
            needs.allow_external or kind is not EngineKind.EXTERNAL,
            status.context_length == 0 or needs.context_length <= status.context_length,
            needs.artifact_sha256 in ("", status.artifact.sha256),
            all(any(labels.get(key) == value for labels in merged) for key, value in needs.labels.items()),
            not needs.runner_ids or record.runner.runner_id in needs.runner_ids,
            not needs.node_ids or record.node.node_id in needs.node_ids,
            status.state is not ModelState.FAILED,
            kind is not EngineKind.LOCAL
            or status.state is not ModelState.AVAILABLE
            or status.artifact.size_bytes <= record.node.memory_total_bytes,
            record.state is RunnerState.READY,
            entry.reachable,
            (record.runner.runner_id, status.artifact.name) not in situation.barred,
            record.runner.runner_id not in situation.tried,
            waiting < slots * 17,
        )
    )


@given(fleet.needs, fleet.directories(), fleet.situations)
def test_every_runner_is_a_candidate_or_rejected_and_rightly_so(
    needs: Needs, directory: Directory, situation: Situation
) -> None:
    found = survey(needs, directory, situation=situation)
    if found.candidates and not any(serves(needs, c.entry, c.model, situation) for c in found.candidates):
        situation = replace(situation, barred=frozenset())  # all are barred: none is
    names = [candidate.runner_id for candidate in found.candidates] + [other.runner_id for other in found.rejected]
    assert sorted(names) == sorted(directory.entries)
    for candidate in found.candidates:
        assert serves(needs, candidate.entry, candidate.model, situation)
        assert candidate.cost == pytest.approx(sum(value for _, value in candidate.terms))
        assert all(value >= 0 for _, value in candidate.terms)
    assert [candidate.cost for candidate in found.candidates] == sorted(c.cost for c in found.candidates)
    for rejected in found.rejected:
        assert not any(serves(needs, rejected.entry, model, situation) for model in rejected.entry.record.runner.models)
        assert detail(needs, rejected.entry, rejected.miss)


@given(fleet.needs, fleet.directories(), fleet.situations, st.integers(0, 2**32))
def test_the_chosen_one_serves_and_is_never_the_dearest(
    needs: Needs, directory: Directory, situation: Situation, seed: int
) -> None:
    candidates = survey(needs, directory, situation=situation).candidates
    if not candidates:
        with pytest.raises(ChorusError):
            place(needs, directory, rng=random.Random(seed), situation=situation)
        return
    chosen = place(needs, directory, rng=random.Random(seed), situation=situation)
    if not any(serves(needs, candidate.entry, candidate.model, situation) for candidate in candidates):
        situation = replace(situation, barred=frozenset())
    assert serves(needs, chosen.entry, chosen.model, situation)
    assert replace(chosen, home="") in candidates
    if candidates[0].cost < candidates[-1].cost:
        assert chosen.cost < candidates[-1].cost


@given(fleet.needs, fleet.directories(), fleet.situations, st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_choice_and_a_roster_changes_no_refusal(
    needs: Needs, directory: Directory, situation: Situation, seed: int
) -> None:
    def outcome(pool: Pool | None) -> tuple[str, str]:
        try:
            return place(needs, directory, rng=random.Random(seed), situation=situation, pool=pool).runner_id, ""
        except ChorusError as error:
            return "", f"{type(error).__name__}: {error.message}"

    pool = Roster().pool(needs, directory)
    assert outcome(None) == outcome(None)
    assert outcome(pool) == outcome(pool)
    assert outcome(pool)[1] == outcome(None)[1]


@given(fleet.needs, st.lists(fleet.directories(), min_size=1, max_size=4), fleet.situations)
def test_a_roster_leaves_nobody_out_as_directories_change(
    needs: Needs, directories: list[Directory], situation: Situation
) -> None:
    roster = Roster()
    for directory in directories:
        pool = roster.pool(needs, directory)
        assert (
            {candidate.runner_id for candidate in survey(needs, directory, situation=situation).candidates}
            <= {*pool.everybody}
            <= {*directory.entries}
        )


@given(fleet.needs, st.lists(fleet.directories(), min_size=1, max_size=4), st.data())
def test_a_roster_that_follows_changes_has_the_pools_of_a_new_one(
    needs: Needs, directories: list[Directory], data: st.DataObject
) -> None:
    roster, known = Roster(), Directory()
    for directory in directories:
        if data.draw(st.booleans()):
            roster.follow(directory.changes_since(known), directory)
            known = directory
        if data.draw(st.booleans()):  # it finds out by itself where it was not told
            assert roster.pool(needs, directory) == Roster().pool(needs, directory)
            assert roster.resolve(Needs(), directory) == Roster().resolve(Needs(), directory)
            known = directory


def test_a_roster_keeps_its_pools_while_only_load_changes() -> None:
    roster = Roster()
    needs = Needs(model="alpha")
    quiet = fleet.directory(fleet.runner("r1", fleet.model()), fleet.runner("r2", fleet.model()))
    busy = fleet.directory(
        fleet.runner("r1", fleet.model(), loads=(fleet.load(used=4),), sequence=2),
        fleet.runner("r2", fleet.model(), sequence=2),
    )
    pool = roster.pool(needs, quiet)
    assert pool.everybody == ("r1", "r2")
    assert roster.pool(needs, busy) is pool
    assert roster.pool(needs, fleet.directory(fleet.runner("r2", fleet.model()))).everybody == ("r2",)
    renamed = fleet.directory(fleet.runner("r2", fleet.model("beta")))
    assert roster.pool(needs, renamed).everybody == ()


def shares(directory: Directory, needs: Needs | None = None, *, rounds: int = 400) -> Counter[str]:
    rng = random.Random(7)
    return Counter(place(needs or Needs(model="alpha"), directory, rng=rng).runner_id for _ in range(rounds))


def test_equals_share_the_work() -> None:
    counts = shares(fleet.directory(*(fleet.runner(f"r{number}", fleet.model()) for number in range(4))))
    assert min(counts.values()) > 60


def test_a_slow_machine_is_left_alone_while_a_fast_one_is_idle() -> None:
    slow = [fleet.runner(f"slow{n}", fleet.model(), loads=(fleet.load(rate=5),)) for n in range(3)]
    fast = fleet.runner("fast", fleet.model(), loads=(fleet.load(rate=60),))
    assert shares(fleet.directory(fast, *slow))["fast"] > 390


def test_a_fast_machine_that_is_busy_leaves_work_to_the_others() -> None:
    slow = fleet.runner("slow", fleet.model(), loads=(fleet.load(rate=20),))
    fast = fleet.runner("fast", fleet.model(), loads=(fleet.load(rate=60, used=4, queued=20),))
    assert shares(fleet.directory(fast, slow)) == {"slow": 400}


def test_a_warm_model_is_preferred_to_one_that_must_be_loaded() -> None:
    warm = fleet.runner("warm", fleet.model(), loads=(fleet.load(used=3),))
    cold = fleet.runner("cold", fleet.model(state=ModelState.AVAILABLE))
    assert shares(fleet.directory(cold, warm)) == {"warm": 400}


def test_requests_under_way_count_before_the_runner_reports_them() -> None:
    both = fleet.directory(fleet.runner("r1", fleet.model()), fleet.runner("r2", fleet.model()))
    found = survey(Needs(model="alpha"), both, situation=Situation(in_flight={"r1": 3}))
    assert [candidate.runner_id for candidate in found.candidates] == ["r2", "r1"]


def test_a_penalty_moves_work_away() -> None:
    both = fleet.directory(fleet.runner("r1", fleet.model()), fleet.runner("r2", fleet.model()))
    found = survey(Needs(model="alpha"), both, situation=Situation(penalties={"r1": 30.0}))
    assert [candidate.runner_id for candidate in found.candidates] == ["r2", "r1"]
    assert ("failures", 30.0) in found.candidates[1].terms


def test_an_open_breaker_bars_one_model_of_one_runner() -> None:
    both = fleet.directory(
        fleet.runner("r1", fleet.model(), fleet.model("beta")), fleet.runner("r2", fleet.model(), fleet.model("beta"))
    )
    barred = Situation(barred=frozenset({("r1", "alpha.gguf")}))
    found = survey(Needs(model="alpha"), both, situation=barred)
    assert [candidate.runner_id for candidate in found.candidates] == ["r2"]
    assert [rejected.miss.reason for rejected in found.rejected] == [RejectionReason.BREAKER_OPEN]
    assert len(survey(Needs(model="beta"), both, situation=barred).candidates) == 2


def test_where_all_breakers_are_open_somebody_is_asked_all_the_same() -> None:
    barred = Situation(barred=frozenset({("r1", "alpha.gguf"), ("r2", "alpha.gguf")}))
    both = fleet.directory(fleet.runner("r1", fleet.model()), fleet.runner("r2", fleet.model()))
    assert place(Needs(model="alpha"), both, rng=random.Random(0), situation=barred).runner_id in ("r1", "r2")
    # Whom this request has failed on already is not asked again; with nobody else there, it is refused.
    tried = replace(barred, tried={"r1", "r2"})
    with pytest.raises(RunnersUnavailableError):
        place(Needs(model="alpha"), both, rng=random.Random(0), situation=tried)
    # A place at somebody who works will come free.
    full = fleet.runner("r3", fleet.model(), loads=(fleet.load(used=4, queued=500),))
    with pytest.raises(OverloadedError):
        place(
            Needs(model="alpha"), fleet.directory(*both.entries.values(), full), rng=random.Random(0), situation=barred
        )


def test_a_prompt_that_may_not_fit_goes_where_there_is_room() -> None:
    short = fleet.runner("short", fleet.model(context_length=2048))
    long = fleet.runner("long", fleet.model(context_length=8192), loads=(fleet.load(used=3),))
    needs = Needs(model="alpha", context_length=100, likely_context_length=3000)
    assert shares(fleet.directory(short, long), needs) == {"long": 400}


def test_of_several_artifacts_of_a_family_the_warm_one_is_used() -> None:
    cold = fleet.model("alpha", "alpha.q4", state=ModelState.AVAILABLE)
    warm = fleet.model("alpha", "alpha.q8")
    chosen = place(Needs(model="alpha"), fleet.directory(fleet.runner("r1", cold, warm)), rng=random.Random(1))
    assert chosen.model.artifact.name == "alpha.q8"


def test_in_a_large_mesh_the_only_runner_that_has_a_place_is_found() -> None:
    full = [
        fleet.runner(f"full{number:03}", fleet.model(), loads=(fleet.load(used=4, queued=500),))
        for number in range(300)
    ]
    free = fleet.runner("free", fleet.model())
    directory = fleet.directory(*full, free)
    assert place(Needs(model="alpha"), directory, rng=random.Random(3)).runner_id == "free"
    with pytest.raises(OverloadedError):
        place(Needs(model="alpha"), fleet.directory(*full), rng=random.Random(3))


def test_a_large_mesh_shares_the_work_too() -> None:
    directory = fleet.directory(*(fleet.runner(f"r{number:03}", fleet.model()) for number in range(200)))
    roster = Roster()
    needs = Needs(model="alpha")
    rng = random.Random(5)
    counts = Counter(
        place(needs, directory, rng=rng, pool=roster.pool(needs, directory)).runner_id for _ in range(2000)
    )
    assert len(counts) > 190
    assert max(counts.values()) < 30


def test_a_stale_pool_is_no_authority() -> None:
    needs = Needs(model="alpha")
    now = fleet.directory(fleet.runner("r1", fleet.model(), state=RunnerState.DRAINING))
    with pytest.raises(RunnersUnavailableError):
        place(needs, now, rng=random.Random(0), pool=pool_of(needs, now, ("gone", "r1")))


def test_reasons_mirror_the_wire() -> None:
    from chorus.api.coordinator.v1 import coordinator_pb2

    wire = {name.removeprefix("REJECTION_REASON_") for name in coordinator_pb2.RejectionReason.keys()}  # noqa: SIM118
    assert wire == {"UNSPECIFIED", *(reason.name for reason in RejectionReason)}


def test_the_memory_of_a_server_is_not_that_of_the_runner_before_it() -> None:
    large = fleet.model(state=ModelState.AVAILABLE, size_bytes=99 * fleet.GIB, engine="house")
    found = survey(Needs(model="alpha"), fleet.directory(fleet.runner("r", large)))
    assert [candidate.runner_id for candidate in found.candidates] == ["r"]
