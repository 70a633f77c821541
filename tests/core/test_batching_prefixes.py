"""The tree of what is in memory, against a plain model of it; and what is kept, guessed and expected."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.batching import window
from chorus.core.batching.cache import CachedSlots
from chorus.core.batching.prefixes import PrefixTree, common_prefix
from chorus.core.batching.speculation import PromptLookup, Source, Speculation
from chorus.core.batching.steptime import StepTime

tokens = st.lists(st.integers(0, 2), max_size=12)


@given(left=tokens, right=tokens, start=st.integers(0, 5), offset=st.integers(0, 5))
def test_common_prefix(left: list[int], right: list[int], start: int, offset: int) -> None:
    expected = 0
    for a, b in zip(left[start:], right[offset:], strict=False):
        if a != b:
            break
        expected += 1
    assert common_prefix(left, right, start, offset) == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_tree_holds_what_every_slot_holds_and_finds_the_longest_start(data: st.DataObject) -> None:
    tree = PrefixTree()
    slots: dict[int, list[tuple[int, object]]] = {}
    lanes: dict[int, str] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "extend", "share", "truncate", "remove"]))
        if action == "add":
            slot = data.draw(st.integers(0, 5))
            if slot in slots:
                with pytest.raises(ValueError, match="in use"):
                    tree.add(slot)
                continue
            lanes[slot] = data.draw(st.sampled_from("ab"))
            tree.add(slot, lanes[slot])
            slots[slot] = []
        elif slots:
            slot = data.draw(st.sampled_from(sorted(slots)))
            if action == "extend":
                more = data.draw(tokens)
                tree.extend(slot, more)
                slots[slot] = slots[slot] + [(token, object()) for token in more]
            elif action == "truncate":
                length = data.draw(st.integers(0, len(slots[slot])))
                tree.truncate(slot, length)
                slots[slot] = slots[slot][:length]
            elif action == "remove":
                tree.remove(slot)
                del slots[slot], lanes[slot]
            else:
                source = data.draw(st.sampled_from(sorted(slots)))
                count = data.draw(st.integers(0, 12))
                fits = not slots[slot] and count <= len(slots[source]) and lanes[slot] == lanes[source]
                if fits:
                    tree.share(source, slot, count)
                    slots[slot] = slots[source][:count]
                else:
                    with pytest.raises(ValueError, match="cannot share"):
                        tree.share(source, slot, count)
        tree.validate()
        cells = {id(cell) for held in slots.values() for _, cell in held}
        assert tree.cells == len(cells)
        for slot, held in slots.items():
            assert tree.tokens(slot) == [token for token, _ in held]
            assert tree.lane(slot) == lanes[slot]
            others = {id(cell) for other, cells_ in slots.items() if other != slot for _, cell in cells_}
            assert tree.own_cells(slot) == sum(id(cell) not in others for _, cell in held)
        some = set(data.draw(st.lists(st.sampled_from(sorted(slots)), max_size=4))) if slots else set()
        assert tree.cells_of(some) == len({id(cell) for slot in some for _, cell in slots[slot]})
    prompt, lane = data.draw(st.lists(st.integers(0, 2), max_size=20)), data.draw(st.sampled_from("ab"))
    length, holder = tree.longest(prompt, lane)
    if holder is not None:
        assert [token for token, _ in slots[holder][:length]] == prompt[:length]
    found = [common_prefix([t for t, _ in held], prompt) for slot, held in slots.items() if lanes[slot] == lane]
    assert length <= max(found, default=0)
    if len({tuple(t for t, _ in held[:1]) for held in slots.values()}) == len(slots):
        assert length == max(found, default=0), "nothing begins alike in cells of its own, so the way is plain"


def test_entries_that_are_of_use_stay_longer() -> None:
    cache = CachedSlots()
    assert cache.usefulness == 0.1
    cache.keep(1)
    cache.keep(2)
    cache.use(1)
    assert cache.slots() == [2, 1]
    assert cache.usefulness == pytest.approx(2 / 11)
    cache.pay(0.17)
    assert cache.overdue(1.0) == []
    cache.pay(0.02)
    assert cache.overdue(1.0) == [2], "an entry that nobody used yet gets a share, one that was of use all of it"
    cache.pay(0.9)
    assert cache.overdue(1.0) == [2, 1]
    for slot in range(10, 210):
        cache.keep(slot)
        cache.drop(slot)
    assert cache.usefulness < 0.03
    cache.drop(2, covered=True)
    cache.take(1)
    assert len(cache) == 0


def test_one_that_was_put_back_is_kept_for_its_return_however_useless_others_were() -> None:
    cache = CachedSlots()
    for slot in range(10, 210):
        cache.keep(slot)
        cache.drop(slot)
    usefulness = cache.usefulness
    cache.keep(1)
    cache.keep(2, returns=True)
    cache.pay(0.9)
    assert cache.overdue(1.0) == [1]
    cache.use(2)
    assert cache.usefulness == usefulness, "it would have come back anyway, which says nothing of others"


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 64), st.integers(0, 512), st.integers(0, 9000), st.floats(0, 10)), max_size=60
    ),
    ask=st.tuples(st.integers(1, 64), st.integers(0, 9000)),
)
def test_whatever_was_measured_what_is_expected_is_a_time(
    steps: list[tuple[int, int, int, float]], ask: tuple[int, int]
) -> None:
    times = StepTime()
    for decoded, read, cells, seconds in steps:
        times.observe(decoded=decoded, read=read, cells=cells, seconds=seconds)
    expected = times.decode_s(*ask)
    assert expected is None or 0 <= expected < 1e4
    assert 0 <= times.pair_s < 1e4
    assert 1 <= times.chunk(decoding=ask[0], cells=ask[1], target_s=0.1, most=512) <= 512


def test_what_a_cell_costs_stays_near_what_is_expected_of_the_model() -> None:
    times = StepTime(pair_share=1e-4)
    assert times.pair_s == 0
    for _ in range(40):  # always the same: nothing is learned of cells
        times.observe(decoded=1, read=0, cells=0, seconds=0.01)
    assert times.pair_s == pytest.approx(1e-6, rel=0.01)
    for cells in (0, 1000) * 200:  # far more than can be
        times.observe(decoded=1, read=0, cells=cells, seconds=0.01 + cells * 1e-4)
    assert times.pair_s == pytest.approx(8e-6, rel=0.5)


def test_a_machine_is_learned_through_its_noise() -> None:
    noise = random.Random(7)
    times = StepTime()
    for _ in range(400):
        n, cells = noise.randint(1, 16), noise.randint(0, 4000)
        seconds = (0.006 + 0.003 * n + 5e-7 * n * cells) * noise.uniform(0.9, 1.1)
        times.observe(decoded=n, read=0, cells=cells, seconds=seconds)
        times.observe(decoded=n, read=64, cells=cells, seconds=seconds + 64 * 0.001)
    assert times.decode_s(8, 1000) == pytest.approx(0.034, rel=0.1)
    assert times.pair_s == pytest.approx(5e-7, rel=0.4)
    chunk = times.chunk(decoding=8, cells=1000, target_s=0.12, most=512)
    assert chunk == pytest.approx((0.12 - 0.034) / 0.001, rel=0.2)
    assert times.chunk(decoding=8, cells=1000, target_s=0.001, most=512) >= 10, "slow machines read prompts too"
    times.observe(decoded=1, read=0, cells=0, seconds=1e6)
    assert times.decode_s(8, 1000) == pytest.approx(0.034, rel=0.3), "one step that hung says nothing"


def test_what_stood_there_before_is_proposed() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    grown = [*text, 9]
    lookup = PromptLookup(grown)
    assert lookup.propose(4) is None
    grown += [1, 2, 3]
    assert lookup.propose(4) == (Source.SHORT_MATCH, [4, 5, 6, 7])
    grown += [4]
    assert lookup.propose(2) == (Source.MATCH, [5, 6])
    grown += [5, 6]
    assert lookup.propose(8) == (Source.LONG_MATCH, [7, 8, 9, 1, 2, 3, 4, 5])
    grown += [0]
    assert lookup.propose(8) is None
    assert PromptLookup([1, 2]).propose(3) is None


@given(tokens=st.lists(st.integers(0, 3), max_size=60))
def test_proposals_follow_an_earlier_place_that_ends_alike(tokens: list[int]) -> None:
    grown: list[int] = []
    lookup = PromptLookup(grown)
    for token in tokens:
        grown.append(token)
        found = lookup.propose(5)
        places = [n for n in range(3, len(grown)) if grown[n - 3 : n] == grown[-3:]]
        if found is None:
            assert not places
        else:
            assert found[1] == grown[places[-1] : places[-1] + 5]


def measured() -> StepTime:
    times = StepTime()
    for n in (1, 2, 4, 8, 16) * 20:
        times.observe(decoded=n, read=0, cells=100, seconds=0.008 + 0.002 * n)
    return times


def test_guessing_goes_on_where_it_pays_and_ends_where_it_does_not() -> None:
    speculation = Speculation(measured())
    assert speculation.count(Source.SHORT_MATCH, tokens=1, cells=100) == 0
    assert speculation.count(Source.LONG_MATCH, tokens=1, cells=100) >= 4
    for _ in range(20):
        speculation.learn(Source.LONG_MATCH, 4, 0)
    assert speculation.acceptance(Source.LONG_MATCH) < 0.25
    counts = [speculation.count(Source.LONG_MATCH, tokens=1, cells=100) for _ in range(2000)]
    assert sum(counts) <= 2 * 7, "tried again ever more rarely"
    for _ in range(20):
        speculation.learn(Source.LONG_MATCH, 2, 2)
    assert speculation.count(Source.LONG_MATCH, tokens=1, cells=100) == 16
    assert Speculation(StepTime()).count(Source.LONG_MATCH, tokens=1, cells=0) == 0


@given(prompt=st.integers(1, 30), answer=st.integers(0, 200), context=st.integers(31, 64))
def test_a_full_context_lets_the_oldest_go_wherever_the_stream_went_on(prompt: int, answer: int, context: int) -> None:
    first = list(range(prompt))
    said = list(range(1000, 1000 + answer))
    kept = window.replay(first, said, context)
    assert len(kept) < context
    keep = window.kept_tokens(prompt, context)
    assert kept[:keep] == first[:keep]
    if said:
        assert kept[-1] == said[-1]
    assert sorted(kept) == kept
