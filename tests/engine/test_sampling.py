"""Sampling against a plain reference that sorts everything, and the draws themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from chorus.core.errors import EngineError
from chorus.core.generation import Dry, Sampling, Xtc
from chorus.engine.llama.context import FloatArray
from chorus.engine.llama.dry import RepeatPenalty, suffix_matches
from chorus.engine.llama.ranking import buffers, largest, log_normalizer
from chorus.engine.llama.sampling import Sampler, uniform

rows = arrays.arrays(
    np.float32, st.sampled_from([7, 64, 300, 9000]), elements=st.floats(-30, 30, width=32), fill=st.just(-3.0)
)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 10_000]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    typical_p=st.sampled_from([0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    penalty_window=st.sampled_from([0, 3, 64]),
    logit_bias=st.sampled_from([{}, {2: 100.0}, {2: -100.0, 5: 3.0}]),
    dry=st.none() | st.builds(Dry, st.just(1.5), st.just(1.75), st.integers(0, 2), st.none() | st.just(5)),
)
histories = st.lists(st.integers(0, 6), max_size=12)


def no_piece(_: int) -> bytes:
    return b""


def dry_by_reference(dry: Dry, history: list[int], piece_of: Callable[[int], bytes]) -> dict[int, float]:
    """What each token loses: for the longest stretch that ends now and was followed by that token before."""
    window = history if dry.window is None else history[max(len(history) - dry.window, 0) :]
    text, limit = b"", 0
    for token_id in history:  # a repeat reaches back to the last token with the end of a breaker in it
        before, text = len(text), text + piece_of(token_id)
        found = [text.find(b.encode(), max(before - len(b.encode()) + 1, 0)) for b in dry.sequence_breakers]
        limit = 0 if any(place >= 0 for place in found) else limit + 1
    limit = min(limit, len(window))
    longest: dict[int, int] = {}
    for end in range(1, len(window)):
        length = 0
        while length < end and window[end - 1 - length] == window[len(window) - 1 - length]:
            length += 1
        length = min(length, limit)
        if length >= dry.allowed_length and limit >= dry.allowed_length and len(window) > dry.allowed_length:
            longest[window[end]] = max(longest.get(window[end], 0), length)
    return {
        token_id: dry.multiplier * dry.base ** (length - dry.allowed_length)
        for token_id, length in longest.items()
        if not any(breaker.encode() in piece_of(token_id) for breaker in dry.sequence_breakers)
    }


def kept_by_reference(row: FloatArray, sampling: Sampling, history: list[int]) -> tuple[list[int], list[float]]:
    """The tokens that every step keeps, likeliest first, with the weights of the draw."""
    logits = {token_id: float(value) for token_id, value in enumerate(row)}
    for token_id, bias in sampling.logit_bias.items():
        logits[token_id] = -math.inf if bias <= -100 else logits[token_id] + bias
    window = history[-sampling.penalty_window :] if sampling.penalizes else []
    for token_id in set(window):
        logit = logits[token_id]
        factor = sampling.repetition_penalty
        logit = logit / factor if logit > 0 else logit * factor
        count = window.count(token_id)
        logits[token_id] = logit - count * sampling.frequency_penalty - sampling.presence_penalty
    if sampling.dry is not None:
        for token_id, penalty in dry_by_reference(sampling.dry, history, no_piece).items():
            logits[token_id] -= penalty
    ids = sorted(logits, key=lambda token_id: -logits[token_id])
    if sampling.temperature == 0:
        return ids[:1], [1.0]
    top = logits[ids[0]]
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    weight = {token_id: math.exp(logits[token_id] - top) for token_id in ids}
    if sampling.typical_p < 1:
        total = sum(weight.values())
        chance = {token_id: weight[token_id] / total for token_id in ids}
        expected = -sum(p * math.log(p) for p in chance.values() if p > 0)
        order = sorted(ids, key=lambda i: abs(-math.log(chance[i]) - expected) if chance[i] > 0 else math.inf)
        mass, chosen = 0.0, set()
        for token_id in order:
            chosen.add(token_id)
            mass += chance[token_id]
            if mass >= sampling.typical_p:
                break
        ids = [token_id for token_id in ids if token_id in chosen]
    total = sum(weight[token_id] for token_id in ids)
    mass, count = 0.0, 0
    for token_id in ids:
        count += 1
        mass += weight[token_id]
        if mass >= sampling.top_p * total:
            break
    best = weight[ids[0]]
    ids = [ids[0], *(i for i in ids[1 : count if sampling.top_p < 1 else None] if weight[i] >= sampling.min_p * best)]
    return ids, [math.exp((logits[i] - logits[ids[0]]) / sampling.temperature) for i in ids]


@given(rows, st.integers(1, 500))
@settings(deadline=None)
def test_the_largest_values_are_found_without_sorting_all(row: FloatArray, count: int) -> None:
    count = min(count, row.size)
    found, values = largest(row, count)
    assert len(set(found.tolist())) == len(found) == count
    assert row[found].tolist() == values.tolist() == np.sort(row)[::-1][:count].tolist()
    assert all(one < other for one, other in pairwise(found) if row[one] == row[other])


@given(rows, st.integers(1, 500), st.integers(0, 40), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_what_is_forbidden_is_no_candidate(row: FloatArray, count: int, allowed: int, random: Random) -> None:
    """Forms often allow a few tokens of all; equal ones of the others must not be sorted for each token."""
    kept = sorted(random.sample(range(row.size), min(allowed, row.size)))
    masked = np.full_like(row, -np.inf)
    masked[kept] = row[kept]
    found, values = largest(masked, count)
    expected = np.sort(masked)[::-1][: min(count, row.size)].tolist()
    if kept and count * 4 < row.size:
        expected = [value for value in expected if value > -np.inf]
    assert values.tolist() == masked[found].tolist() == expected


@given(rows, samplings, histories, st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_a_draw_is_one_that_the_reference_can_make(
    row: FloatArray, sampling: Sampling, history: list[int], index: int
) -> None:
    drawn = Sampler(sampling, seed=1, choice=0, history=history).draw(row, index)
    values = row.copy()
    kept, _ = kept_by_reference(row, sampling, history)
    if drawn not in kept:  # where values are equal, or sums end at the border, either side is right
        reference = Sampler(sampling, seed=1, choice=0, history=history)
        changed = reference._changed(row) if reference._changes_row else row
        border = sorted(float(changed[token_id]) for token_id in kept)
        total = np.exp(changed.astype(np.float64) - float(changed.max())).sum()
        near = min(abs(float(changed[drawn]) - value) for value in border)
        assert near < 1e-4 or math.exp(float(changed[drawn]) - float(changed.max())) / total < 1e-4
    assert np.array_equal(row, values), "the logits must stay as they are"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0),
        Sampling(temperature=1.0, top_k=0, min_p=0.0, top_p=0.8),
        Sampling(temperature=1.0, top_k=8, typical_p=0.7, top_p=1.0, min_p=0.0),
        Sampling(temperature=1.0, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={3: 2.0}),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(sampling: Sampling) -> None:
    row = (np.random.default_rng(5).normal(size=2048) * 4).astype(np.float32)
    history = [int(row.argmax()), 3, 3, 7]
    sampler = Sampler(sampling, seed=9, choice=1, history=history)
    count = 4000
    drawn = np.bincount([sampler.draw(row, index) for index in range(count)], minlength=row.size) / count
    ids, weights = kept_by_reference(row, sampling, history)
    expected = np.zeros(row.size)
    expected[ids] = np.array(weights) / sum(weights)
    assert np.abs(drawn - expected).max() < 4 * 0.5 / math.sqrt(count)
    assert not drawn[expected == 0].any()


def test_a_draw_depends_on_seed_choice_and_index_alone() -> None:
    row = np.zeros(1000, dtype=np.float32)
    flat = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    one = Sampler(flat, seed=3, choice=2, history=[])
    expected = [one.draw(row, index) for index in range(20)]
    other = Sampler(flat, seed=3, choice=2, history=[1, 2, 3])
    assert [other.draw(row, index) for index in reversed(range(20))] == expected[::-1]
    for seed, choice in ((4, 2), (3, 1)):
        different = Sampler(flat, seed=seed, choice=choice, history=[])
        assert [different.draw(row, index) for index in range(20)] != expected
    numbers = [uniform(1, 0, index) for index in range(2000)]
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2000 - 0.5) < 0.03
    assert uniform(2**64 - 1, 2**32 - 1, 2**32 - 1) != uniform(0, 0, 0)


def test_penalties_see_a_window_that_moves() -> None:
    sampling = Sampling(temperature=0.0, presence_penalty=2.0, penalty_window=2)
    row = np.array([3.0, 2.0, 1.5], dtype=np.float32)
    sampler = Sampler(sampling, seed=0, choice=0, history=[])
    drawn = []
    for index in range(6):
        drawn.append(sampler.draw(row, index))
        sampler.accept(drawn[-1])
    assert drawn == [0, 1, 2, 0, 1, 2]
    resumed = Sampler(sampling, seed=0, choice=0, history=drawn[:4])
    assert resumed.draw(row, 4) == drawn[4]


@pytest.mark.parametrize("top_p", [0.9999999, 0.5, 1e-9])
def test_top_p_comes_to_an_end_among_forbidden_tokens(top_p: float) -> None:
    row = np.full(5000, -np.inf, dtype=np.float32)
    row[[7, 90, 4000]] = [1.0, 1.0, -200.0]
    sampler = Sampler(Sampling(temperature=1.0, top_k=0, top_p=top_p, min_p=0.0), seed=1, choice=0, history=[])
    assert {sampler.draw(row, index) for index in range(20)} <= {7, 90}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0), Sampling(top_k=0), Sampling(top_k=0, min_p=0)]
)
def test_a_broken_model_is_an_error(value: float, sampling: Sampling) -> None:
    row = np.full(5000, value, dtype=np.float32)
    with pytest.raises(EngineError, match="finite logits"):
        Sampler(sampling, seed=0, choice=0, history=[]).draw(row, 0)


@given(rows)
@settings(deadline=None)
def test_log_probabilities_sum_to_one(row: FloatArray) -> None:
    assert np.exp(row.astype(np.float64) - log_normalizer(row)).sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("temperature", [1e-311, 1e-45, 1e-38, 1e-6, 9e-5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(40, 0.95, 0.05), (0, 1.0, 0.0), (10**9, 1.0, 0.0), (0, 0.9, 0.0)]
)
def test_a_temperature_next_to_nothing_takes_the_likeliest(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = np.random.default_rng(1).normal(size=500).astype(np.float32) * 10
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert Sampler(sampling, seed=1, choice=0, history=()).draw(row, 0) == int(row.argmax())


def bits(allowed: list[bool]) -> np.ndarray:
    """A mask as constraints make them."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, dtype=np.uint8)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


@given(rows, samplings, histories, st.data())
@settings(max_examples=200, deadline=None)
def test_a_mask_is_a_row_without_the_other_tokens(
    row: FloatArray, sampling: Sampling, history: list[int], data: st.DataObject
) -> None:
    some = data.draw(st.sets(st.integers(0, row.size - 1), min_size=1, max_size=40).map(sorted))
    allowed = np.zeros(row.size, dtype=bool)
    allowed[some] = True
    if 2 in sampling.logit_bias and sampling.logit_bias[2] == -100.0:
        allowed[3] = True  # the bias forbids 2, which must not be all there is
    masked = np.where(allowed, row, np.float32(-np.inf))
    one, other = (Sampler(sampling, seed=3, choice=0, history=history) for _ in range(2))
    drawn = one.draw(row, 1, bits(allowed.tolist()))
    assert drawn == other.draw(masked, 1)
    assert allowed[drawn]


pieces = {0: b"a", 1: b"b\n", 2: b"<", 3: b"|x", 4: b">", 5: b"", 6: "é".encode()}


@given(
    st.lists(st.integers(0, 6), max_size=40),
    st.integers(0, 40),
    st.builds(
        Dry,
        multiplier=st.just(0.8),
        base=st.sampled_from([1.0, 1.75]),
        allowed_length=st.integers(0, 3),
        window=st.none() | st.integers(0, 20),
        sequence_breakers=st.sampled_from([(), ("\n",), ("<|x>", "é"), ("a<", "|"), ("é" * 60,)]),
    ),
)
@settings(max_examples=200, deadline=None)
def test_dry_is_what_comparing_every_stretch_finds(history: list[int], known: int, dry: Dry) -> None:
    """Whatever of the history was there at first and what was accepted later."""
    repeats = RepeatPenalty(dry, history[:known], pieces.__getitem__)
    for token_id in history[known:]:
        repeats.accept(token_id)
    found = repeats.penalties()
    penalties = {} if found is None else dict(zip(found[0].tolist(), found[1].tolist(), strict=True))
    expected = dry_by_reference(dry, history, pieces.__getitem__)
    assert {key: value for key, value in penalties.items() if value} == pytest.approx(expected, rel=1e-5)


@given(st.lists(st.integers(0, 2), max_size=60))
@settings(deadline=None)
def test_suffixes_are_matched_in_one_pass(tokens: list[int]) -> None:
    def length(end: int) -> int:
        return next((n for n in range(end + 1) if tokens[end - n] != tokens[-1 - n]), end + 1)

    assert suffix_matches(tokens) == [length(end) for end in range(len(tokens) - 1)]


def test_dry_of_a_long_history_grows_with_it() -> None:
    dry = Dry(multiplier=1.0, base=2.0, allowed_length=1, sequence_breakers=())
    repeats = RepeatPenalty(dry, [1], no_piece)
    for _ in range(3000):
        repeats.accept(1)
    found = repeats.penalties()
    assert found is not None
    assert found[0][-1] == 1
    assert np.isfinite(found[1]).all(), "a power beyond a float32 must not become infinite"


xtcs = st.builds(Xtc, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.6]))


@given(rows, xtcs, st.sampled_from([0, 5]), st.sampled_from([0.9, 1.0]), st.sampled_from([0.0, 0.1]))
@settings(max_examples=200, deadline=None)
def test_xtc_leaves_the_least_likely_of_the_likely(
    row: FloatArray, xtc: Xtc, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    kept, weights = kept_by_reference(row, sampling, [])
    likely = [
        token_id for token_id, weight in zip(kept, weights, strict=True) if weight / sum(weights) >= xtc.threshold
    ]
    sampler = Sampler(replace(sampling, xtc=xtc), seed=4, choice=1, history=[])
    plain = Sampler(sampling, seed=4, choice=1, history=[])
    acted = 0
    for index in range(12):
        drawn = sampler.draw(row, index)
        acts = uniform(4, 1, index, b"chorus.xtc") < xtc.probability and xtc.threshold <= 0.5
        acted += acts
        if not acts:
            assert drawn == plain.draw(row, index)
        elif len(likely) > 1 and drawn != likely[-1]:  # of equals, or by rounding, another may be the last
            border = abs(float(row[drawn]) - float(row[likely[-1]]))
            assert drawn not in likely or border < 1e-4
    assert acted == 12 or xtc.probability < 1.0 or xtc.threshold > 0.5


def test_numbers_for_xtc_are_others_than_for_the_draw() -> None:
    pairs = [(uniform(1, 0, index), uniform(1, 0, index, b"chorus.xtc")) for index in range(2000)]
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.1


def test_a_sampler_leaves_nothing_behind_for_the_next() -> None:
    """Buffers are shared by all samplers of a thread."""
    row = np.random.default_rng(2).normal(size=3000).astype(np.float32)
    mask = bits([number % 7 == 0 for number in range(3000)])
    kinds = [
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_k=0, top_p=0.8, min_p=0.0),
        Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=1.0),
        Sampling(temperature=1.0, top_k=0, typical_p=0.8),
        Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, xtc=Xtc(1.0, 0.0001)),
        Sampling(temperature=0.0, dry=Dry(2.0)),
    ]

    def make() -> list[Sampler]:
        return [Sampler(kind, seed=1, choice=0, history=[5, 6, 5]) for kind in kinds]

    alone = [(sampler.draw(row, 0), sampler.draw(row, 1, mask)) for sampler in make()]
    mixed = make()
    first = [sampler.draw(row, 0) for sampler in mixed]
    buffers(row.size).values.fill(7.0)
    second = [sampler.draw(row, 1, mask) for sampler in reversed(mixed)][::-1]
    assert list(zip(first, second, strict=True)) == alone
