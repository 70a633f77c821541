"""Tuning decided: that it finds what is better, keeps what loses nothing, stops in time, and says why."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.fitting.memory import CacheType
from chorus.core.fleet.records import Cpu
from chorus.core.tuning.candidates import BITS_PER_WEIGHT, file_bytes, space_for
from chorus.core.tuning.figures import Quality, loss_of, paired_ratio, summarize
from chorus.core.tuning.proposal import propose
from chorus.core.tuning.search import LEAST_GAIN, Axis, Effort, Judge, Measure
from chorus.core.tuning.variant import Sample, Variant, machine_identity
from tests.core.tuning_machine import BASE, Machine, tune, whole_space

FOREVER = Effort(budget_s=1e9)
WHOLE_SEARCHES = settings(max_examples=40, deadline=None)
positive = st.floats(min_value=0.01, max_value=1e6)


# --- figures --------------------------------------------------------------------------------------------------------


@given(st.lists(positive, min_size=1, max_size=20))
def test_a_figure_lies_within_its_spread(samples: list[float]) -> None:
    figure = summarize(samples)
    assert figure.low <= figure.median <= figure.high
    assert figure.spread >= 0
    assert (figure.low, figure.high) == (min(samples), max(samples))


@given(st.lists(st.tuples(positive, st.floats(min_value=0.1, max_value=10)), min_size=1, max_size=9), positive)
def test_what_slows_both_of_a_turn_changes_no_ratio(turns: list[tuple[float, float]], ratio: float) -> None:
    theirs = [speed * drift for speed, drift in turns]
    ours = [ratio * speed * drift for speed, drift in turns]
    figure = paired_ratio(ours, theirs)
    assert figure.low == pytest.approx(ratio)
    assert figure.high == pytest.approx(ratio)


def test_nothing_measured_is_no_figure() -> None:
    with pytest.raises(ValueError, match="nothing"):
        summarize([])
    with pytest.raises(ValueError, match="same text"):
        loss_of(Quality((1.0,)), Quality((1.0, 2.0)))


@given(st.lists(st.floats(min_value=0, max_value=9), min_size=2, max_size=50), st.floats(min_value=-1, max_value=1))
def test_a_loss_is_the_ratio_of_perplexities(blocks: list[float], worse: float) -> None:
    reference, ours = Quality(tuple(blocks)), Quality(tuple(block + worse for block in blocks))
    loss = loss_of(ours, reference)
    assert loss.change == pytest.approx(ours.perplexity / reference.perplexity - 1, abs=1e-9)
    assert loss.error == pytest.approx(0, abs=1e-6), "what is hard for both says nothing about either"
    assert loss.is_nothing(math.expm1(worse) + 1e-6)
    assert not loss.is_nothing(math.expm1(worse) - 1e-6)


@given(st.integers(min_value=0, max_value=1 << 30))
def test_a_loss_that_few_words_suggest_is_not_yet_nothing(seed: int) -> None:
    rng = Random(seed)
    reference = Quality(tuple(rng.gauss(3, 0.5) for _ in range(4)))
    ours = Quality(tuple(block + sign * 0.2 for block, sign in zip(reference.blocks, (1, -1, 1, -1), strict=True)))
    assert loss_of(ours, reference).change == pytest.approx(0, abs=1e-9)
    assert not loss_of(ours, reference).is_nothing(0.01)


def test_equal_is_nothing_lost_however_short_the_text() -> None:
    assert loss_of(Quality((3.0,)), Quality((3.0,))).is_nothing(0.0)
    assert not loss_of(Quality((2.9,)), Quality((3.0,))).is_nothing(0.5), "one block has no error to go by"
    assert loss_of(Quality((900.0, 900.0)), Quality((1.0, 1.0))).change > 1e20


@given(positive, positive, positive, st.sampled_from(["prefill", "decode_one", "decode_many"]))
def test_speed_rises_with_each_figure(a: float, b: float, c: float, name: str) -> None:
    sample = Sample(a, b, c, 0)
    faster = replace(sample, **{name: 2 * getattr(sample, name)})
    assert faster.speed > sample.speed
    assert Sample(2 * a, 2 * b, 2 * c, 0).speed == pytest.approx(2 * sample.speed)


# --- the search -----------------------------------------------------------------------------------------------------


def machines(noise: float = 0.0) -> st.SearchStrategy[Machine]:
    """Machines on which threads and batches have one best value, as on real ones, and the rest is anything."""
    factor = st.floats(min_value=0.5, max_value=2.0)

    @st.composite
    def draw(draw: st.DrawFn) -> Machine:
        speeds: dict[object, float] = {}
        for options in ((1, 2, 4, 8), ((512, 128), (512, 256), (512, 512), (1024, 1024))):
            peak = draw(st.integers(0, 3))
            for place, option in enumerate(options):
                speeds[option] = 0.8 ** abs(place - peak)
        sizes, losses = {}, {}
        for option in (CacheType.Q8_0, CacheType.Q4_0, "Q8_0", "Q4_0"):
            speeds[option] = draw(factor)
            sizes[option] = draw(factor)
            losses[option] = draw(st.sampled_from([-0.001, 0.0, 0.001, 0.02, 0.2]))
        return Machine(speeds, sizes, losses, noise=noise, rng=Random(draw(st.integers(0, 1 << 30))))

    return draw()


@WHOLE_SEARCHES
@given(machines())
def test_threads_and_batches_end_at_their_best(machine: Machine) -> None:
    best = tune(machine, whole_space()).best
    assert best.threads == max((1, 2, 4, 8), key=lambda count: machine.speeds[count])
    batches = ((512, 128), (512, 256), (512, 512), (1024, 1024))
    assert (best.batch_tokens, best.micro_batch_tokens) == max(batches, key=lambda sizes: machine.speeds[sizes])


@WHOLE_SEARCHES
@given(machines(noise=0.05))
def test_what_is_proposed_loses_nothing(machine: Machine) -> None:
    space = whole_space()
    findings = tune(machine, space)
    proposal = propose(findings, space, FOREVER)
    free = proposal.free.variant
    assert machine.true_loss(free) <= 0.01
    assert machine.true_speed(free) >= machine.true_speed(BASE) * (1 - LEAST_GAIN - 2 * machine.noise)
    assert proposal.changes == (free != BASE)
    assert proposal.reasons
    assert free in findings.records
    for option in proposal.costly:
        assert machine.true_loss(option.variant) > 0
        assert option.gain > proposal.free.gain
        assert option.variant != free


@WHOLE_SEARCHES
@given(machines(), st.floats(min_value=0, max_value=1))
def test_a_loss_is_taken_by_consent_alone(machine: Machine, accepted: float) -> None:
    space = whole_space()
    proposal = propose(tune(machine, space), space, FOREVER)
    assert proposal.with_consent(0.0) == proposal.free
    chosen = proposal.with_consent(accepted)
    assert chosen == proposal.free or chosen.loss <= accepted
    assert chosen.gain >= proposal.free.gain


@WHOLE_SEARCHES
@given(machines(noise=0.02), st.floats(min_value=1, max_value=60))
def test_nothing_is_begun_once_the_time_is_over(machine: Machine, budget_s: float) -> None:
    space = whole_space()
    findings = tune(machine, space, Effort(budget_s=budget_s))
    begun = [place for place, step in enumerate(machine.steps) if isinstance(step, Measure)]
    assert all(place * machine.step_s < budget_s for place in begun)
    measured = {step.variant for step in machine.steps}
    assert all(findings.record(variant).gain is None for variant in findings.skipped)
    assert findings.best in measured
    propose(findings, space, Effort(budget_s=budget_s))


@WHOLE_SEARCHES
@given(machines(noise=0.1))
def test_only_what_changes_the_computation_is_judged(machine: Machine) -> None:
    findings = tune(machine, whole_space())
    judged = [step.variant for step in machine.steps if isinstance(step, Judge)]
    assert len({(variant.cache_type, variant.quantization) for variant in judged}) == len(judged)
    assert judged[0] == BASE
    assert findings.loss(replace(BASE, threads=64)) == loss_of(Quality((1.0,)), Quality((1.0,)))


@WHOLE_SEARCHES
@given(machines())
def test_a_comparison_takes_turns(machine: Machine) -> None:
    """What is compared was measured equally often and side by side, so that a drift of the machine hits both."""
    findings = tune(machine, whole_space(threads=(2, 4), batches=(), cache_types=(), quantizations=()))
    measured = [step.variant.threads for step in machine.steps if isinstance(step, Measure)][1:]
    pairs = [set(pair) for pair in zip(measured[::2], measured[1::2], strict=True)]
    assert pairs
    assert all(pair == {2, 4} for pair in pairs)
    assert len(pairs) <= FOREVER.turns
    assert findings.record(replace(BASE, threads=4)).gain is not None


def test_a_hopeless_candidate_is_measured_once_and_its_direction_left() -> None:
    machine = Machine(speeds={4: 0.5, 1: 0.5})
    findings = tune(machine, whole_space(batches=(), cache_types=(), quantizations=()))
    measured = [step.variant.threads for step in machine.steps if isinstance(step, Measure)]
    assert measured == [2, 4, 2, 1, 2], "8 is beyond 4, which lost already"
    assert findings.best == BASE


def test_as_fast_in_less_memory_is_better() -> None:
    smaller = tune(Machine(sizes={CacheType.Q8_0: 0.7}), whole_space(threads=(), batches=(), quantizations=()))
    assert smaller.best.cache_type is CacheType.Q8_0
    slower = Machine(sizes={CacheType.Q8_0: 0.7}, speeds={CacheType.Q8_0: 0.9})
    assert tune(slower, whole_space(threads=(), batches=(), quantizations=())).best == BASE


def test_what_does_not_fit_is_not_proposed_not_even_for_a_loss() -> None:
    machine = Machine(speeds={"Q8_0": 2.0, "Q4_0": 3.0}, sizes={"Q8_0": 1.7, "Q4_0": 1.7}, losses={"Q4_0": 0.2})
    space = whole_space(memory_bytes=1_500_000_000)
    proposal = propose(tune(machine, space), space, FOREVER)
    assert proposal.free.variant == BASE
    assert proposal.costly == ()
    roomy = whole_space(memory_bytes=2_000_000_000)
    proposal = propose(tune(machine, roomy), roomy, FOREVER)
    assert proposal.free.variant.quantization == "Q8_0"
    assert [option.variant.quantization for option in proposal.costly] == ["Q4_0"]
    assert any("Q8_0" in reason for reason in proposal.reasons)


@WHOLE_SEARCHES
@given(machines(noise=0.02), st.sampled_from([4, (512, 256), CacheType.Q8_0, "Q8_0", "Q4_0"]))
def test_what_breaks_is_told_and_left_out(machine: Machine, broken: object) -> None:
    machine.broken = lambda variant: broken in machine.properties(variant)
    space = whole_space()
    findings = tune(machine, space)
    proposal = propose(findings, space, FOREVER)
    assert broken not in machine.properties(proposal.free.variant)
    assert all(broken not in machine.properties(option.variant) for option in proposal.costly)
    told = [record for record in findings.records.values() if record.problem]
    assert all(record.problem == "llama.cpp ended it" for record in told)
    assert all(machine.steps.count(Measure(record.variant)) == 1 for record in told)


def test_a_base_that_breaks_ends_it() -> None:
    machine = Machine(broken=lambda _: True)
    findings = tune(machine, whole_space())
    assert len(machine.steps) == 1
    with pytest.raises(ValueError, match="not measured"):
        propose(findings, whole_space(), FOREVER)


# --- what is tried --------------------------------------------------------------------------------------------------


@given(
    physical=st.integers(1, 128),
    share=st.floats(min_value=0.1, max_value=2),
    source=st.sampled_from([*BITS_PER_WEIGHT, "Q2_K", "IQ3_XXS", "MXFP4_MOE"]),
    memory_bytes=st.integers(0, 1 << 36),
    axes=st.sets(st.sampled_from(list(Axis))),
)
def test_candidates_suit_machine_and_file(
    physical: int, share: float, source: str, memory_bytes: int, axes: set[Axis]
) -> None:
    usable = max(1, int(physical * share))
    space = space_for(
        BASE,
        physical_cores=physical,
        usable_threads=usable,
        quantization=source,
        parameter_count=1_000_000_000,
        memory_bytes=memory_bytes,
        axes=axes,
    )
    assert all(1 <= count <= usable for count in space.threads)
    assert bool(space.threads) == (Axis.THREADS in axes)
    assert bool(space.batches) == (Axis.BATCH in axes)
    assert source not in space.quantizations
    assert all(file_bytes(name, 1_000_000_000) <= memory_bytes for name in space.quantizations)
    if Axis.QUANTIZATION not in axes:
        assert space.quantizations == ()


def test_four_bits_become_eight_or_the_quickest_four() -> None:
    def names(source: str) -> tuple[str, ...]:
        facts = {"physical_cores": 2, "usable_threads": 2, "parameter_count": 1, "memory_bytes": 1 << 30}
        return space_for(BASE, quantization=source, **facts).quantizations

    assert names("Q4_1") == ("Q8_0", "Q4_0")
    assert names("F16") == ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0")
    assert names("Q8_0") == ("Q6_K", "Q4_K_M", "Q4_0")
    assert names("Q2_K") == ("Q8_0",)


def test_a_machine_is_known_by_what_decides_its_speed() -> None:
    cpu = Cpu("A CPU", 8, 16, ("avx2", "fma"))
    identity = machine_identity(cpu, 16)
    assert identity == machine_identity(replace(cpu, features=("fma", "avx2")), 16)
    others = (
        machine_identity(replace(cpu, model="Another"), 16),
        machine_identity(replace(cpu, features=("avx2",)), 16),
        machine_identity(cpu, 8),
        machine_identity(cpu, 16, ("A GPU",)),
    )
    assert len({identity, *others}) == 5
    assert statistics.fmean(len(each) for each in others) == 16


def test_a_variant_is_one_way_to_run() -> None:
    assert Variant(2) == BASE
    assert Variant(2, quantization="Q8_0") != BASE
