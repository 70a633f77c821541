"""What a request costs somewhere: each input moves it one way only, and none further than what it stands for."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import EngineInfo, EngineKind, Gpu, Load, ModelLoad, ModelState
from chorus.core.generation import GenerationRequest, Priority, StopConditions, TextPrompt
from chorus.core.placement import Needs, Situation, place, pool_of
from chorus.core.placement.cost import BACKGROUND_BUSY_S, MISFIT_S, NOMINAL_TOKENS, Terms, cost_terms, total
from chorus.core.placement.fit import seat_of
from tests.core import placement_fleet as fleet

NAME = "alpha.gguf"
GPU_ENGINE = EngineInfo("local", "1", EngineKind.LOCAL, ("cuda",))

loads = st.builds(
    ModelLoad,
    model=st.just(NAME),
    slots_used=st.integers(0, 4),
    slots_total=st.just(4),
    queued=st.integers(0, 60),
    kv_used_tokens=st.integers(0, 20_000),
    kv_total_tokens=st.sampled_from([0, 8192, 32_768]),
    tokens_per_second=st.floats(0.5, 200),
    kv_cached_tokens=st.integers(0, 20_000),
    prompt_tokens_per_second=st.floats(1, 5000),
)
gpus = st.builds(
    Gpu,
    index=st.just(0),
    uuid=st.just("gpu"),
    name=st.just("gpu"),
    memory_total_bytes=st.just(24 << 30),
    memory_free_bytes=st.just(0),
    temperature_celsius=st.none() | st.floats(20, 110),
    throttled=st.sampled_from([None, False, True]),
    usable=st.booleans(),
)
requests = st.builds(
    Needs,
    model=st.just("alpha"),
    likely_prompt_tokens=st.integers(0, 20_000),
    answer_tokens=st.sampled_from([0, 1, 100, 10_000]),
    background=st.booleans(),
)
situations = st.builds(
    Situation,
    in_flight=st.fixed_dictionaries({"r": st.integers(-3, 50)}),
    penalties=st.fixed_dictionaries({}, optional={"r": st.floats(0, 60)}),
    weights=st.fixed_dictionaries({}, optional={"r": st.floats(0.1, 1)}),
    shared=st.fixed_dictionaries({}, optional={("r", NAME): st.integers(0, 30_000)}),
)


def entry(
    load: ModelLoad, gpu: Gpu | None, *, state: ModelState = ModelState.LOADED, name: str = "r"
) -> DirectoryEntry:
    made = fleet.runner(name, fleet.model(state=state), loads=(load,))
    record = made.record
    runner = replace(record.runner, engines=(GPU_ENGINE,))
    return replace(made, record=replace(record, runner=runner, load=Load((load,), gpus=(gpu,) if gpu else ())))


def terms_of(needs: Needs, made: DirectoryEntry, situation: Situation) -> Terms:
    """The terms of the runner's only model."""
    return cost_terms(needs, made.record, seat_of(made.record, made.record.runner.models[0], situation), situation)


def cost(needs: Needs, made: DirectoryEntry, situation: Situation) -> float:
    terms = terms_of(needs, made, situation)
    assert all(value >= 0 for _, value in terms)
    assert len(dict(terms)) == len(terms)
    return total(terms)


NEAR = 1e-9


def at_most(low: float, high: float) -> bool:
    return low <= high * (1 + NEAR) + NEAR


@given(requests, loads, st.none() | gpus, situations, st.data())
def test_each_input_moves_the_cost_one_way_only(
    needs: Needs, load: ModelLoad, gpu: Gpu | None, situation: Situation, data: st.DataObject
) -> None:
    here = cost(needs, entry(load, gpu), situation)
    more = data.draw(st.integers(1, 500), label="more")
    share = data.draw(st.floats(0.01, 1), label="share")

    def dearer(*, load: ModelLoad = load, gpu: Gpu | None = gpu, situation: Situation = situation) -> bool:
        return at_most(here, cost(needs, entry(load, gpu), situation))

    assert dearer(load=replace(load, queued=load.queued + more))
    # What runs there may have the prompt's beginning too: the more of it, the more is believed to be shared.
    alone = replace(situation, shared={})
    fuller = replace(load, kv_used_tokens=load.kv_used_tokens + more)
    assert at_most(cost(needs, entry(load, gpu), alone), cost(needs, entry(fuller, gpu), alone))
    assert dearer(load=replace(load, kv_cached_tokens=load.kv_cached_tokens // 2))
    assert dearer(load=replace(load, tokens_per_second=load.tokens_per_second * share))
    assert dearer(load=replace(load, prompt_tokens_per_second=load.prompt_tokens_per_second * share))
    assert dearer(situation=replace(situation, in_flight={"r": situation.in_flight["r"] + more}))
    assert dearer(situation=replace(situation, penalties={"r": situation.penalties.get("r", 0.0) + more}))
    assert dearer(situation=replace(situation, weights={"r": situation.weights.get("r", 1.0) * share}))
    assert dearer(situation=replace(situation, shared={}))
    if gpu is not None:
        assert dearer(gpu=replace(gpu, throttled=True))
        if gpu.temperature_celsius is not None:
            assert dearer(gpu=replace(gpu, temperature_celsius=gpu.temperature_celsius + more))
    assert at_most(
        here, cost(replace(needs, likely_prompt_tokens=needs.likely_prompt_tokens + more), entry(load, gpu), situation)
    )
    assert at_most(cost(replace(needs, background=False), entry(load, gpu), situation), here)
    for state in (ModelState.LOADING, ModelState.AVAILABLE):
        assert at_most(here, cost(needs, entry(load, gpu, state=state), situation))


@given(requests, loads, st.integers(0, 30_000))
def test_affinity_is_worth_the_seconds_that_it_saves_and_no_more(needs: Needs, load: ModelLoad, shared: int) -> None:
    idle = replace(load, slots_used=0, queued=0, kv_total_tokens=0)
    without = dict(terms_of(needs, entry(idle, None), Situation()))
    situation = Situation(shared={("r", NAME): shared})
    with_it = dict(terms_of(needs, entry(idle, None), situation))
    saved = without.pop("prefill", 0.0) - with_it.pop("prefill", 0.0)
    assert without == with_it
    assert saved == pytest.approx(min(shared, needs.likely_prompt_tokens) / idle.prompt_tokens_per_second)


def test_a_runner_is_not_believed_to_have_more_in_memory_than_it_says() -> None:
    needs = Needs(model="alpha", likely_prompt_tokens=1000)
    load = ModelLoad(NAME, 0, 4, 0, 100, 8192, 20.0, 300, prompt_tokens_per_second=100.0)
    terms = terms_of(needs, entry(load, None), Situation(shared={("r", NAME): 900}))
    assert dict(terms)["prefill"] == pytest.approx(6.0)


def test_the_terms_are_seconds() -> None:
    load = ModelLoad(NAME, 4, 4, 3, 8000, 8192, 32.0, 0, prompt_tokens_per_second=500.0)
    hot = Gpu(0, "gpu", "gpu", 24 << 30, 0, temperature_celsius=87.5)
    needs = Needs(
        model="alpha", likely_prompt_tokens=1000, answer_tokens=64, likely_context_length=4192, background=True
    )
    situation = Situation(penalties={"r": 7.0}, weights={"r": 0.5})
    terms = dict(terms_of(needs, entry(load, hot), situation))
    weight = terms.pop("weight")
    assert weight == pytest.approx(sum(terms.values()))
    assert terms == pytest.approx(
        {
            "prefill": 2.0,
            "decode": 2.0,
            "slots": 2.0,  # half again as slow, with every slot taken
            "queue": 8.0,  # four of 8 s each, on four slots
            "kv": 4.0,  # 4000 of the 8000 tokens in use must go
            "heat": 0.5,
            "context": MISFIT_S,
            "failures": 7.0,
            "background": BACKGROUND_BUSY_S,
        }
    )
    cold = dict(terms_of(replace(needs, answer_tokens=9999), entry(load, None), Situation()))
    assert cold["decode"] == NOMINAL_TOKENS / 32.0


def test_what_is_taken_from_a_request() -> None:
    request = GenerationRequest(
        "", TextPrompt("x" * 400), stop=StopConditions(max_tokens=30), choice_count=2, priority=Priority.BACKGROUND
    )
    needs = Needs.of_generation(request)
    assert (needs.likely_prompt_tokens, needs.answer_tokens, needs.background) == (100, 60, True)
    assert Needs.of_generation(GenerationRequest("", TextPrompt("x"))).answer_tokens == 0


# --- choices --------------------------------------------------------------------------------------------------------


def equals(count: int, load: ModelLoad) -> Directory:
    made = [entry(load, None, name=f"r{number:02}") for number in range(count)]
    return Directory(1, MappingProxyType({one.record.runner.runner_id: one for one in made}), synced=True)


@given(st.integers(0, 2**32), st.integers(2, 40))
def test_equals_share_evenly_whatever_the_seed(seed: int, count: int) -> None:
    rng = random.Random(seed)
    directory = equals(count, ModelLoad(NAME, 0, 4, 0, tokens_per_second=20.0))
    in_flight: Counter[str] = Counter()
    for _ in range(4 * count):
        chosen = place(Needs(model="alpha"), directory, rng=rng, situation=Situation(in_flight=in_flight))
        in_flight[chosen.runner_id] += 1
    assert max(in_flight.values()) <= 8  # 4 on average; two choices keep the fullest near it
    assert len(in_flight) >= 0.75 * count


@given(st.integers(0, 2**32))
def test_a_prompt_that_everybody_sends_makes_no_hot_spot(seed: int) -> None:
    rng = random.Random(seed)
    load = ModelLoad(NAME, 0, 4, 0, tokens_per_second=20.0, prompt_tokens_per_second=200.0)
    directory = equals(8, load)
    needs = Needs(model="alpha", likely_prompt_tokens=1000)
    in_flight: Counter[str] = Counter()
    for _ in range(32):
        # One runner has read it all, which saves 5 s; an answer takes 12.8 s.
        situation = Situation(in_flight=in_flight, shared={("r03", NAME): 1000})
        in_flight[place(needs, directory, rng=rng, situation=situation).runner_id] += 1
    # Five seconds are worth the company of a full batch and a place or two in the queue; chance may add as many.
    assert in_flight["r03"] <= 4 + 2 * 2
    assert max(in_flight.values()) <= 9


def test_a_conversation_goes_on_where_it_was_while_there_is_room() -> None:
    load = ModelLoad(NAME, 0, 4, 0, tokens_per_second=20.0, prompt_tokens_per_second=50.0)
    needs = Needs(model="alpha", likely_prompt_tokens=8000)
    for count in (4, 200):  # in a large mesh chance alone would hardly ever find it
        directory = equals(count, load)
        pool = pool_of(needs, directory, sorted(directory.entries))
        rng = random.Random(1)
        situation = Situation(shared={("r03", NAME): 7900})
        chosen = Counter(place(needs, directory, rng=rng, situation=situation, pool=pool).runner_id for _ in range(200))
        assert chosen["r03"] >= 190


def test_a_runner_outside_the_pool_is_not_chosen_for_its_memory() -> None:
    directory = equals(40, ModelLoad(NAME, 0, 4, 0, tokens_per_second=20.0))
    needs = Needs(model="alpha", likely_prompt_tokens=9000)
    pool = pool_of(needs, directory, [runner_id for runner_id in sorted(directory.entries) if runner_id != "r03"])
    situation = Situation(shared={("r03", NAME): 9000})
    for seed in range(50):
        assert place(needs, directory, rng=random.Random(seed), situation=situation, pool=pool).runner_id != "r03"
