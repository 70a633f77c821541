"""The scheduler as a state machine: whatever comes and goes, memory holds what it should, batches keep their limits."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from itertools import groupby

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.core.batching.batch import LEAST_SHARED, Copy, Plan, Sequence
from chorus.core.batching.scheduler import BatchLimits, Scheduler, Sharing
from chorus.core.batching.waiting import ServiceRate, WaitingRoom
from chorus.core.errors import OverloadedError
from chorus.core.generation import Priority

LIMITS = BatchLimits(
    slots=3, cells=120, batch_tokens=32, prefill_tokens=12, outputs=8, waiting=2, cached=3, allowance=10
)


@dataclass(eq=False)
class Request:
    """A group of sequences."""

    sequences: list[Sequence] = field(default_factory=list)


class Memory:
    """What llama.cpp's memory would hold: the tokens of each slot, and cells that slots share by copies alone."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.slots: dict[int, list[tuple[int, object]]] = {}

    def carry_out(self, scheduler: Scheduler) -> None:
        for operation in scheduler.operations():
            if isinstance(operation, Copy):
                assert not self.slots.get(operation.target)
                assert len(self.slots[operation.source]) >= operation.count
                self.slots[operation.target] = self.slots[operation.source][: operation.count]
            else:
                del self.slots.get(operation.slot, [])[operation.length :]

    def decode(self, slot: int, start: int, tokens: list[int]) -> None:
        held = self.slots.setdefault(slot, [])
        assert len(held) == start, "a position is missing or computed twice"
        held += [(token, object()) for token in tokens]
        assert len({id(cell) for cells in self.slots.values() for _, cell in cells}) <= self.limits.cells

    def tokens(self, slot: int) -> list[int]:
        return [token for token, _ in self.slots.get(slot, [])]


class Machine(RuleBasedStateMachine):
    """Plays the engine: computes every plan and draws tokens until each sequence has its most."""

    @initialize(
        sharing=st.sampled_from(Sharing),
        cached=st.integers(0, 3),
        price=st.sampled_from([None, 0.0, 0.01, 10.0]),
    )
    def begin(self, sharing: Sharing, cached: int, price: float | None) -> None:
        self.limits = replace(LIMITS, cached=cached)
        self.scheduler = Scheduler(self.limits, sharing)
        self.scheduler.times.prefill_token_s = price
        self.memory = Memory(self.limits)
        self.now = 0.0
        self.alive: list[Sequence] = []
        self.lanes: dict[Sequence, Hashable] = {}

    @rule(
        beginning=st.sampled_from([[], [1] * 20, [1] * 20 + [2] * 20, [3] * 30]),
        more=st.lists(st.integers(0, 2), min_size=1, max_size=20),
        room=st.integers(1, 40),
        choices=st.integers(1, 4),
        scored=st.booleans(),
        priority=st.sampled_from(Priority),
        lane=st.sampled_from([None, "adapter"]),
    )
    def submit(
        self,
        beginning: list[int],
        more: list[int],
        room: int,
        choices: int,
        scored: bool,
        priority: Priority,
        lane: Hashable,
    ) -> None:
        request = Request()
        prompt = beginning + more
        for choice in range(choices):
            scores = len(prompt) - 1 if scored and choice == 0 else 0
            sequence = Sequence(list(prompt), len(prompt) + room, request, priority, lane, scores=scores)
            request.sequences.append(sequence)
        waiting = self.scheduler.waiting_groups()
        try:
            self.scheduler.submit(request.sequences)
        except OverloadedError:
            assert len(waiting) >= LIMITS.waiting
            assert all(sequence.slot is None for sequence in request.sequences)
            return
        self.alive += request.sequences

    @rule(data=st.data(), sound=st.booleans())
    @precondition(lambda self: self.alive)
    def cancel(self, data: st.DataObject, sound: bool) -> None:
        self.leave(data.draw(st.sampled_from(self.alive)), sound=sound)

    @rule(data=st.data())
    @precondition(lambda self: self.alive and self.scheduler.sharing is Sharing.PREFIX)
    def guess(self, data: st.DataObject) -> None:
        for sequence in self.scheduler.running:
            if sequence.missing == 1:
                sequence.draft = data.draw(st.lists(st.integers(0, 2), max_size=5))

    @rule(data=st.data())
    @precondition(lambda self: self.scheduler.running)
    def rewind(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.scheduler.running))
        if sequence.missing == 1 and sequence.known > 2:
            keep = data.draw(st.integers(0, sequence.known - 2))
            del sequence.tokens[keep : keep + 1]
            self.scheduler.rewind(sequence, keep)

    @rule()
    def forget(self) -> None:
        self.scheduler.forget_cache()
        assert self.scheduler.cached_cells == 0

    @rule(data=st.data(), seconds=st.floats(0.001, 1.0))
    @precondition(lambda self: self.alive)
    def step(self, data: st.DataObject | None = None, seconds: float = 0.1) -> None:
        self.now += 1.0
        plan = self.scheduler.plan()
        assert plan.chunks, "somebody is there, but nothing is computed"
        self.check(plan)
        self.memory.carry_out(self.scheduler)
        for chunk in plan.chunks:
            slot = chunk.sequence.slot
            assert slot is not None
            tokens = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            self.memory.decode(slot, chunk.start, [*tokens, *chunk.draft])
        self.scheduler.stepped(plan, seconds)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if not self.scheduler.computed(chunk):
                assert not chunk.draft
                continue
            assert chunk.outputs >= 1
            kept = 0
            for place in range(len(chunk.draft) + 1):
                if sequence.known == sequence.most:
                    break
                drawn = data.draw(st.integers(0, 2)) if data is not None else 0
                sequence.tokens.append(drawn)
                if place == len(chunk.draft) or drawn != chunk.draft[place]:
                    break
                kept += 1
            if chunk.draft:
                self.scheduler.checked(chunk, kept)
            if sequence.known == sequence.most:
                self.leave(sequence)

    def check(self, plan: Plan) -> None:
        assert sum(chunk.count + len(chunk.draft) for chunk in plan.chunks) <= LIMITS.batch_tokens
        assert sum(chunk.outputs + len(chunk.draft) for chunk in plan.chunks) <= LIMITS.outputs
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        assert {chunk.sequence.lane for chunk in plan.chunks} == {plan.lane}
        decoding = {
            id(sequence)
            for sequence in self.scheduler.running
            if sequence.missing == 1 and sequence.lane == plan.lane and sequence.leader is None
        }
        planned = {id(chunk.sequence) for chunk in plan.chunks}
        assert decoding <= planned, "a stream must move with every batch of its lane"
        if decoding:
            assert sum(c.count for c in plan.chunks if id(c.sequence) not in decoding) <= LIMITS.prefill_tokens
        for chunk in plan.chunks:
            scored = min(chunk.start + chunk.count, chunk.sequence.scores) - chunk.start
            assert chunk.outputs >= max(scored, 0)

    def leave(self, sequence: Sequence, *, sound: bool = True) -> None:
        self.scheduler.leave(sequence, self.now, sound=sound)
        self.alive.remove(sequence)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.validate()
        self.memory.carry_out(self.scheduler)
        for sequence in self.scheduler.running:
            assert sequence.slot is not None
            assert self.memory.tokens(sequence.slot) == sequence.tokens[: sequence.computed]
        cells = {id(cell) for held in self.memory.slots.values() for _, cell in held}
        assert len(cells) == self.scheduler.tree.cells
        assert self.scheduler.used_cells + self.scheduler.cached_cells == len(cells)
        if self.limits.cached == 0 or self.scheduler.sharing is Sharing.NONE:
            assert self.scheduler.cached_cells == 0
        assert self.scheduler.idle == (not self.alive)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not self.alive:
                break
            self.step()
            self.counts_agree()
        assert not self.alive, "somebody never ends"
        self.scheduler.forget_cache()
        self.memory.carry_out(self.scheduler)
        assert not any(self.memory.slots.values())


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def one(known: int, most: int, priority: Priority = Priority.INTERACTIVE, first: int = 0) -> Sequence:
    return Sequence(list(range(first, first + known)), most, object(), priority)


def run(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """Computes the next plan and draws tokens; returns who went on from where by how much."""
    plan = scheduler.plan()
    scheduler.operations()
    for chunk in plan.chunks:
        if scheduler.computed(chunk):
            chunk.sequence.tokens.append(-1)
    return [(chunk.sequence, chunk.start, chunk.count) for chunk in plan.chunks]


WIDE = BatchLimits(
    slots=70, cells=8192, batch_tokens=512, prefill_tokens=512, outputs=70, waiting=100, cached=8, allowance=64
)


def test_64_requests_that_begin_alike_read_their_beginning_once() -> None:
    scheduler = Scheduler(WIDE)
    beginning = list(range(1000))
    sequences = [Sequence([*beginning, 5000 + n, 6000 + n], 1050, object()) for n in range(64)]
    for sequence in sequences:
        scheduler.submit([sequence])
    given = 0
    while any(sequence.missing > 1 for sequence in sequences):
        given += sum(count for _, start, count in run(scheduler) if start < 1002)
    assert given == 1000 + 64 * 2
    assert [sequence.reused for sequence in sequences] == [0] + [1000] * 63
    drawn = sum(sequence.computed - 1002 for sequence in sequences)
    assert scheduler.tree.cells == 1000 + 64 * 2 + drawn


def test_who_waited_reads_on_where_the_first_left() -> None:
    scheduler = Scheduler(WIDE)
    first, second = one(600, 700), one(600, 700)
    scheduler.submit([first])
    scheduler.submit([second])
    assert run(scheduler) == [(first, 0, 512)]
    scheduler.leave(first, 0.0)
    assert run(scheduler) == [(second, 512, 88)]


def test_a_next_turn_reads_only_what_is_new() -> None:
    scheduler = Scheduler(WIDE)
    turn = one(40, 60)
    scheduler.submit([turn])
    for _ in range(20):
        run(scheduler)
    scheduler.leave(turn, 0.0)
    following = Sequence([*turn.tokens, 7, 8, 9], 90, object())
    scheduler.submit([following])
    assert following.reused == following.computed == 59, "the last token drawn was never computed"


def test_a_state_is_gone_on_from_only_where_it_ended() -> None:
    scheduler = Scheduler(WIDE, Sharing.WHOLE)
    turn = one(40, 60)
    scheduler.submit([turn])
    run(scheduler)
    scheduler.leave(turn, 0.0)
    other = Sequence([*turn.tokens[:30], 7, 8, 9], 90, object())
    scheduler.submit([other])
    assert other.computed == 0
    following = Sequence([*turn.tokens, 7, 8, 9], 90, object())
    scheduler.submit([following])
    assert following.computed == 40
    again = Sequence([*turn.tokens, 7, 8, 9], 90, object())
    scheduler.submit([again])
    assert again.computed == 0, "it was taken, not copied"


def test_urgent_requests_put_less_urgent_ones_back_which_lose_nothing() -> None:
    limits = BatchLimits(slots=1, cells=200, batch_tokens=64, prefill_tokens=64, outputs=1, waiting=5, cached=2)
    scheduler = Scheduler(limits)
    slow, urgent = one(50, 80, Priority.BACKGROUND), one(20, 40, first=1000)
    scheduler.submit([slow])
    run(scheduler)
    scheduler.submit([urgent])
    assert (slow.slot, slow.known) == (None, 51)
    assert urgent.slot is not None
    assert scheduler.preemptions == 1
    assert scheduler.waiting_groups() == [slow.group]
    run(scheduler)
    scheduler.leave(urgent, 0.0)
    assert run(scheduler) == [(slow, 50, 1)], "all but its last token was still in memory"


def test_when_memory_runs_out_the_last_to_come_is_put_back_and_comes_to_its_end_later() -> None:
    limits = BatchLimits(
        slots=2, cells=100, batch_tokens=64, prefill_tokens=64, outputs=2, waiting=5, cached=2, allowance=10
    )
    scheduler = Scheduler(limits)
    first, second = one(30, 90), one(30, 90, first=1000)
    scheduler.submit([first])
    scheduler.submit([second])
    while second.slot is not None:
        run(scheduler)
    assert first.slot is not None
    assert first.known + second.known == 103, "a step after 50 of each filled it"
    while first.known < first.most:
        assert [sequence for sequence, _, _ in run(scheduler)] == [first]
    scheduler.leave(first, 1.0)
    while second.known < second.most:
        run(scheduler)


def test_cached_sequences_go_once_they_have_cost_as_much_as_reading_them_again() -> None:
    scheduler = Scheduler(WIDE)
    for tokens, cells in ((1, 100), (2, 100), (4, 100), (1, 1000), (2, 2000), (4, 4000)) * 5:
        scheduler.times.observe(
            decoded=tokens, read=0, cells=cells, seconds=0.01 + 0.002 * tokens + 1e-6 * tokens * cells
        )
    scheduler.times.observe(decoded=0, read=500, cells=0, seconds=0.5)
    assert scheduler.times.pair_s == pytest.approx(1e-6, rel=0.05)
    cached, running = one(50, 80), one(20, 3000, first=1000)
    scheduler.submit([cached])
    run(scheduler)
    scheduler.leave(cached, 0.0)
    scheduler.submit([running])
    assert scheduler.cached_cells == 50
    steps = 0
    while scheduler.cached_cells:
        plan = scheduler.plan()
        for chunk in plan.chunks:
            scheduler.computed(chunk)
            running.tokens.append(-1)
        scheduler.stepped(plan, scheduler.times.decode_s(1, scheduler.tree.cells) or 0.1)
        steps += 1
    # a tenth of 1 ms to read a token, as nothing is known of its use, at 1 us a step
    assert 60 < steps < 120


def test_lanes_take_turns_and_share_nothing() -> None:
    scheduler = Scheduler(WIDE)
    plain, adapted = one(40, 60), one(40, 60)
    adapted.lane = "adapter"
    scheduler.submit([plain])
    scheduler.submit([adapted])
    turns = [run(scheduler) for _ in range(4)]
    assert turns[0::2] == [[(adapted, 0, 40)], [(adapted, 40, 1)]]
    assert turns[1::2] == [[(plain, 0, 40)], [(plain, 40, 1)]]


def test_a_lane_keeps_its_turn_for_its_share_of_the_gap() -> None:
    scheduler = Scheduler(replace(WIDE, gap_s=0.1))
    plain, adapted = one(4, 60), one(4, 60)
    adapted.lane = "adapter"
    scheduler.submit([plain])
    scheduler.submit([adapted])
    lanes = []
    for _ in range(12):
        plan = scheduler.plan()
        for chunk in plan.chunks:
            scheduler.computed(chunk)
            chunk.sequence.tokens.append(-1)
        scheduler.stepped(plan, 0.02)
        lanes.append(plan.lane)
    assert [len(list(run)) for _, run in groupby(lanes)] == [3, 3, 3, 3]


def test_drafts_are_cut_to_what_fits_and_given_back_where_they_were_wrong() -> None:
    scheduler = Scheduler(LIMITS)
    sequence = one(10, 14)
    scheduler.submit([sequence])
    run(scheduler)
    sequence.draft = [1, 2, 3, 4, 5]
    (chunk,) = scheduler.plan().chunks
    assert chunk.draft == (1, 2), "three tokens are left, and the last of them is drawn"
    assert scheduler.computed(chunk)
    sequence.tokens += [1, 7]
    scheduler.checked(chunk, 1)
    (trim,) = scheduler.operations()
    assert trim == type(trim)(sequence.slot, 12)  # type: ignore[arg-type]
    assert sequence.missing == 1


def test_nobody_overtakes_a_large_request_and_urgent_ones_come_first() -> None:
    limits = replace(LIMITS, cells=60, allowance=60)
    scheduler = Scheduler(limits)
    running = one(1, 50, Priority.BATCH)
    large, small, urgent = one(1, 40, Priority.BATCH), one(1, 5, Priority.BATCH), one(1, 2)
    scheduler.submit([running])
    scheduler.submit([large])
    scheduler.submit([small])
    assert [sequence.slot is None for sequence in (running, large, small)] == [False, True, True]
    with pytest.raises(OverloadedError):
        scheduler.submit([one(1, 30, Priority.BATCH)])
    scheduler.leave(running, 1.0)
    scheduler.plan()
    assert large.slot is not None
    assert small.slot is not None
    scheduler.submit([urgent])
    assert urgent.slot is not None


def test_impossible_limits_and_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="each of 3 slots"):
        BatchLimits(slots=3, cells=60, batch_tokens=16, prefill_tokens=6, outputs=2, waiting=2)
    with pytest.raises(ValueError, match="impossible"):
        BatchLimits(slots=0, cells=60, batch_tokens=16, prefill_tokens=6, outputs=2, waiting=2)
    with pytest.raises(ValueError, match="cannot run here"):
        Scheduler(LIMITS).submit([one(1, 121)])


def test_the_waiting_room_is_fair_within_a_priority_and_bounded() -> None:
    room: WaitingRoom[str] = WaitingRoom(4)
    places = [
        room.add("a", Priority.BATCH),
        room.add("b", Priority.BATCH),
        room.add("c", Priority.INTERACTIVE),
        room.add("d", Priority.BACKGROUND),
    ]
    assert places == [0, 1, 0, 3]
    assert room.items() == ["c", "a", "b", "d"]
    with pytest.raises(OverloadedError) as caught:
        room.add("e", Priority.INTERACTIVE)
    assert caught.value.retry_after_s == 1.0
    assert room.remove("a")
    assert not room.remove("a")
    assert [room.pop(), room.pop(), room.pop(), room.pop()] == ["c", "b", "d", None]


def test_waits_are_told_from_the_measured_rate() -> None:
    rate = ServiceRate()
    assert rate.wait_s(1) is None
    for now in (0.0, 2.0, 4.0):
        rate.finished(now)
    assert rate.wait_s(3) == pytest.approx(6.0)
    rate.idle()
    rate.finished(1_000.0)
    assert rate.wait_s(1) == pytest.approx(2.0)


def test_a_shared_word_is_not_worth_a_copy() -> None:
    scheduler = Scheduler(WIDE)
    first, second = one(LEAST_SHARED - 1, 40), Sequence([*range(LEAST_SHARED - 1), 77, 78], 40, object())
    scheduler.submit([first])
    run(scheduler)
    scheduler.submit([second])
    run(scheduler)
    assert second.reused == 0


@pytest.mark.parametrize(("reading", "factor"), [(1, 1.0), (4, 1.0), (16, 2.0), (100, 4.0)])
def test_a_step_may_take_longer_where_more_are_read_than_decode(reading: int, factor: float) -> None:
    scheduler = Scheduler(
        replace(WIDE, slots=128, outputs=128, batch_tokens=8192, prefill_tokens=4096, cells=40_000, gap_s=0.1)
    )
    for _ in range(50):
        scheduler.times.observe(decoded=4, read=0, cells=0, seconds=0.02)
        scheduler.times.observe(decoded=0, read=500, cells=0, seconds=0.05)
    scheduler.submit([one(8, 60, first=1000 * number) for number in range(4)])
    run(scheduler)
    scheduler.submit([one(300, 310, first=100_000 * (1 + number)) for number in range(reading)])
    plan = scheduler.plan()
    read = sum(chunk.count for chunk in plan.chunks if chunk.count > 1)
    assert read == pytest.approx(min((0.1 * factor - 0.02) / 1e-4, 300 * reading, 4096), rel=0.05)
