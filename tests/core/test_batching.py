"""The scheduler as a state machine: whatever comes and goes, slots, memory and batches stay within their limits."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.core.batching.scheduler import BatchLimits, Plan, Scheduler, Sequence
from chorus.core.batching.waiting import ServiceRate, WaitingRoom
from chorus.core.errors import OverloadedError
from chorus.core.generation import Priority

LIMITS = BatchLimits(slots=3, cells=60, batch_tokens=16, prefill_tokens=6, outputs=4, waiting=2)


@dataclass(eq=False)
class Request:
    """A group of sequences, with what a memory would hold of each."""

    sequences: list[Sequence] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    """Plays the engine: computes every plan and draws tokens until each sequence has its most."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(LIMITS)
        self.cells: dict[int, int] = {}
        self.now = 0.0
        self.alive: list[Sequence] = []

    @rule(
        prompt=st.integers(1, 30),
        more=st.integers(1, 20),
        choices=st.integers(1, 4),
        scored=st.booleans(),
        priority=st.sampled_from(Priority),
    )
    def submit(self, prompt: int, more: int, choices: int, scored: bool, priority: Priority) -> None:
        request = Request()
        for choice in range(choices):
            shared = prompt - 1 if choices > 1 else 0
            scores = prompt - 1 if scored and choice == 0 else 0
            request.sequences.append(Sequence(prompt, prompt + more, request, priority, shared=shared, scores=scores))
        waiting = self.scheduler.waiting_groups()
        try:
            self.scheduler.submit(request.sequences)
        except OverloadedError:
            assert len(waiting) >= LIMITS.waiting
            assert all(sequence.slot is None for sequence in request.sequences)
            return
        self.alive += request.sequences

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def cancel(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(self.alive)))

    @rule()
    @precondition(lambda self: self.alive)
    def step(self) -> None:
        self.now += 1.0
        plan = self.scheduler.plan()
        assert plan.chunks, "somebody is there, but nothing is computed"
        self.check(plan)
        for copy in plan.copies:
            assert copy.target not in self.cells
            assert self.cells[copy.source] >= copy.count
            self.cells[copy.target] = copy.count
        for chunk in plan.chunks:
            slot = chunk.sequence.slot
            assert slot is not None
            assert self.cells.get(slot, 0) == chunk.start
            self.cells[slot] = chunk.start + chunk.count
        for chunk in plan.chunks:
            if self.scheduler.computed(chunk):
                assert chunk.outputs >= 1
                if chunk.sequence.known == chunk.sequence.most:
                    self.leave(chunk.sequence)
                else:
                    self.scheduler.extend(chunk.sequence)

    def check(self, plan: Plan) -> None:
        assert sum(chunk.count for chunk in plan.chunks) <= LIMITS.batch_tokens
        assert sum(chunk.outputs for chunk in plan.chunks) <= LIMITS.outputs
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        decoding = {id(sequence) for sequence in self.scheduler.running if sequence.known - sequence.computed == 1}
        planned = {id(chunk.sequence) for chunk in plan.chunks}
        assert decoding <= planned, "a stream must move with every batch"
        if decoding:
            assert sum(c.count for c in plan.chunks if id(c.sequence) not in decoding) <= LIMITS.prefill_tokens
        for chunk in plan.chunks:
            scored = min(chunk.start + chunk.count, chunk.sequence.scores) - chunk.start
            assert chunk.outputs >= max(scored, 0)

    def leave(self, sequence: Sequence) -> None:
        slot = self.scheduler.leave(sequence, self.now)
        if slot is not None:
            self.cells.pop(slot, None)
        self.alive.remove(sequence)

    @invariant()
    def counts_agree(self) -> None:
        self.scheduler.validate()
        assert sum(self.cells.values()) <= LIMITS.cells
        assert self.scheduler.idle == (not self.alive)

    def teardown(self) -> None:
        for _ in range(10_000):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "somebody never ends"
        assert self.scheduler.reserved == 0


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def one(known: int, most: int, priority: Priority = Priority.INTERACTIVE) -> Sequence:
    return Sequence(known, most, object(), priority)


def test_siblings_wait_for_the_first_to_read_the_prompt_and_share_it() -> None:
    scheduler = Scheduler(LIMITS)
    request = object()
    sequences = [Sequence(18, 20, request, shared=17) for _ in range(3)]
    scheduler.submit(sequences)
    first = scheduler.plan()
    assert [(chunk.sequence, chunk.count) for chunk in first.chunks] == [(sequences[0], 16)]
    assert not scheduler.computed(first.chunks[0])
    second = scheduler.plan()
    assert [(chunk.sequence, chunk.count) for chunk in second.chunks] == [(sequences[0], 2)]
    assert scheduler.computed(second.chunks[0])
    scheduler.extend(sequences[0])
    third = scheduler.plan()
    assert [copy.count for copy in third.copies] == [17, 17]
    assert sorted((chunk.start, chunk.count) for chunk in third.chunks) == [(17, 1), (17, 1), (18, 1)]


def test_a_sibling_reads_the_prompt_itself_when_the_first_is_gone() -> None:
    scheduler = Scheduler(LIMITS)
    request = object()
    sequences = [Sequence(20, 22, request, shared=19) for _ in range(2)]
    scheduler.submit(sequences)
    scheduler.computed(scheduler.plan().chunks[0])
    scheduler.leave(sequences[0], 0.0)
    plan = scheduler.plan()
    assert [(chunk.sequence, chunk.start, chunk.count) for chunk in plan.chunks] == [(sequences[1], 0, 16)]


def test_nobody_overtakes_a_large_request_and_urgent_ones_come_first() -> None:
    scheduler = Scheduler(LIMITS)
    running = one(1, 50)
    large, small, urgent = one(1, 40, Priority.BATCH), one(1, 5, Priority.BATCH), one(1, 2)
    scheduler.submit([running])
    scheduler.submit([large])
    scheduler.submit([small])
    assert [sequence.slot is None for sequence in (running, large, small)] == [False, True, True]
    with pytest.raises(OverloadedError):
        scheduler.submit([one(1, 30)])
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
        Scheduler(LIMITS).submit([one(1, 61)])


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
