"""Admission beside a plain reference, which keeps one list and looks through all of it each time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.core.admission import AdmissionQueue, Ticket
from chorus.core.admission.pace import Flow, Overrun, Pace
from chorus.core.errors import OverloadedError
from chorus.core.generation import Priority

INTERACTIVE, BATCH, BACKGROUND = Priority.INTERACTIVE, Priority.BATCH, Priority.BACKGROUND
LANES = ("large", "small", "free")


@dataclass
class Mesh:
    """What there is; a lane that is not named has no bound."""

    slots_of: dict[str, int] = field(default_factory=dict)
    quiet: bool = True

    def slots(self, lane: str) -> int | None:
        return self.slots_of.get(lane)

    def has_quiet_node(self, lane: str) -> bool:
        return self.quiet


@dataclass
class Waiter:
    """A request as the reference has it."""

    number: int
    caller: str
    priority: Priority
    lane: str
    cost: float
    tag: float


class AdmissionBesideReference(RuleBasedStateMachine):
    """The reference's rules, said plainly: of the first class that has anybody who may go, the least (tag, number)."""

    @initialize(limit=st.integers(1, 6), max_queued=st.integers(0, 5), large=st.integers(1, 5), small=st.just(1))
    def begin(self, limit: int, max_queued: int, large: int, small: int) -> None:
        self.mesh = Mesh({"large": large, "small": small})
        self.limit, self.max_queued = limit, max_queued
        self.queue = AdmissionQueue(self.mesh, limit=limit, max_queued=max_queued)
        self.now = 0.0
        self.number = 0
        self.tickets: dict[int, Ticket] = {}
        self.waiting: list[Waiter] = []
        self.running: list[tuple[Waiter, float]] = []
        self.virtual = dict.fromkeys(Priority, 0.0)
        self.finish: dict[tuple[Priority, str], float] = {}
        self.took: dict[str, list[float]] = {}

    # --- the reference ----------------------------------------------------------------------------------------------

    def has_room(self, lane: str, priority: Priority) -> bool:
        if len(self.running) >= self.limit:
            return False
        if lane == "free":
            return True
        share = {INTERACTIVE: 2.0, BATCH: 1.25, BACKGROUND: 0.8}[priority]
        here = sum(waiter.lane == lane for waiter, _ in self.running)
        places = max(1, int(share * self.mesh.slots_of[lane]))
        return here < places and (priority is not BACKGROUND or self.mesh.quiet)

    def cost(self, lane: str) -> float:
        typical: float | None = None
        for count, seconds in enumerate(self.took.get(lane, []), start=1):
            typical = seconds if typical is None else typical + max(0.1, 1 / count) * (seconds - typical)
        return 1.0 if typical is None else typical

    def remove(self, waiter: Waiter) -> None:
        self.waiting.remove(waiter)
        key = (waiter.priority, waiter.caller)
        if self.finish[key] == waiter.tag + waiter.cost:
            self.finish[key] = waiter.tag

    def expected_turn(self) -> list[int]:
        admitted = []
        while True:
            able = [waiter for waiter in self.waiting if self.has_room(waiter.lane, waiter.priority)]
            if not able:
                return admitted
            order = list(Priority)
            chosen = min(able, key=lambda waiter: (order.index(waiter.priority), waiter.tag, waiter.number))
            self.waiting.remove(chosen)
            self.running.append((chosen, self.now))
            self.virtual[chosen.priority] = max(self.virtual[chosen.priority], chosen.tag)
            admitted.append(chosen.number)

    def turn(self, evicted: Waiter | None = None) -> None:
        turn = self.queue.turn(self.now)
        assert [ticket.number for ticket in turn.admitted] == self.expected_turn()
        assert [ticket.number for ticket, _ in turn.refused] == ([evicted.number] if evicted else [])
        assert all(error.retry_after_s for _, error in turn.refused)

    # --- what happens -----------------------------------------------------------------------------------------------

    @rule(
        caller=st.sampled_from("abc"),
        priority=st.sampled_from(Priority),
        lane=st.sampled_from(LANES),
        quickly=st.booleans(),
    )
    def a_request_comes(self, caller: str, priority: Priority, lane: str, quickly: bool) -> None:
        if quickly:
            expected = not self.waiting and self.has_room(lane, priority)
            taken = self.queue.take(caller, priority, lane, self.now)
            assert (taken is not None) is expected
            if taken is not None:
                self.add(taken, caller, priority, lane)
                assert self.expected_turn() == [taken.number]
                return
        same = [waiter for waiter in self.waiting if waiter.priority is priority]
        evicted: Waiter | None = None
        if len(same) >= self.max_queued and not self.has_room(lane, priority):
            counts = Counter(waiter.caller for waiter in same)
            greatest, count = max(counts.items(), key=lambda item: (item[1], item[0]), default=("", 0))
            if count <= counts[caller] + 1:
                with pytest.raises(OverloadedError) as caught:
                    self.queue.offer(caller, priority, lane, self.now)
                assert caught.value.retry_after_s
                return
            theirs = [waiter for waiter in same if waiter.caller == greatest]
            evicted = max(theirs, key=lambda waiter: (waiter.tag, waiter.number))
            self.remove(evicted)
        self.add(self.queue.offer(caller, priority, lane, self.now), caller, priority, lane)
        self.turn(evicted)

    def add(self, ticket: Ticket, caller: str, priority: Priority, lane: str) -> None:
        self.number += 1
        tag = max(self.virtual[priority], self.finish.get((priority, caller), 0.0))
        waiter = Waiter(self.number, caller, priority, lane, self.cost(lane), tag)
        self.finish[priority, caller] = tag + waiter.cost
        self.waiting.append(waiter)
        self.tickets[self.number] = ticket
        assert (ticket.number, ticket.tag, ticket.cost_s) == (waiter.number, waiter.tag, waiter.cost)

    @rule(seconds=st.sampled_from([0.25, 1.0, 8.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.running)
    @rule(data=st.data(), well=st.booleans())
    def one_ends(self, data: st.DataObject, well: bool) -> None:
        waiter, began = data.draw(st.sampled_from(self.running))
        self.running.remove((waiter, began))
        self.queue.ended(self.tickets[waiter.number], self.now, well=well)
        self.finish[waiter.priority, waiter.caller] += self.now - began - waiter.cost
        if well:
            self.took.setdefault(waiter.lane, []).append(self.now - began)
        self.turn()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def one_goes_away(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.waiting))
        self.remove(waiter)
        self.queue.withdraw(self.tickets[waiter.number])
        self.turn()

    @rule(large=st.integers(1, 5), quiet=st.booleans())
    def the_mesh_changes(self, large: int, quiet: bool) -> None:
        self.mesh.slots_of["large"], self.mesh.quiet = large, quiet
        self.turn()

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.queue.validate_state()
        assert (self.queue.running, self.queue.waiting) == (len(self.running), len(self.waiting))
        assert not any(
            self.has_room(waiter.lane, waiter.priority) for waiter in self.waiting
        )  # nobody waits for nothing
        for waiter in self.waiting:
            order = list(Priority)
            mine = (order.index(waiter.priority), waiter.tag, waiter.number)
            before = sum(
                other.lane == waiter.lane and (order.index(other.priority), other.tag, other.number) < mine
                for other in self.waiting
            )
            assert self.queue.position(self.tickets[waiter.number]) == before


TestAdmissionBesideReference = AdmissionBesideReference.TestCase


def queue_of(slots: int, *, limit: int = 1000, max_queued: int = 1000) -> tuple[AdmissionQueue, Mesh]:
    mesh = Mesh({"m": slots})
    return AdmissionQueue(mesh, limit=limit, max_queued=max_queued), mesh


def paced(queue: AdmissionQueue, seconds: float, *, tokens: int = 0, times: int = 10) -> float:
    """Has requests of the lane end well, each after so many seconds; returns the time after it."""
    now = 0.0
    for _ in range(times):
        ticket = queue.offer("before", INTERACTIVE, "m", now)
        assert queue.turn(now).admitted == [ticket]
        now += seconds
        queue.ended(ticket, now, tokens=tokens)
    return now


# --- classes --------------------------------------------------------------------------------------------------------


def test_each_class_leaves_room_for_the_more_urgent_ones() -> None:
    queue, mesh = queue_of(10)
    for priority in (BACKGROUND, BATCH, INTERACTIVE):
        for _ in range(50):
            queue.offer("a", priority, "m", 0.0)
    admitted = Counter(ticket.priority for ticket in queue.turn(0.0).admitted)
    assert admitted == {INTERACTIVE: 20}
    fresh, mesh = queue_of(10)
    for priority, under_way in ((BACKGROUND, 8), (BATCH, 12), (INTERACTIVE, 20)):
        for _ in range(50):
            fresh.offer("a", priority, "m", 0.0)
        fresh.turn(0.0)
        assert fresh.running == under_way
    busy, mesh = queue_of(10)
    mesh.quiet = False
    ticket = busy.offer("a", BACKGROUND, "m", 0.0)
    assert busy.turn(0.0).admitted == []
    mesh.quiet = True
    assert busy.turn(1.0).admitted == [ticket]


def test_one_models_queue_is_not_anothers() -> None:
    mesh = Mesh({"slow": 1, "fast": 1})
    queue = AdmissionQueue(mesh, limit=100, max_queued=100)
    for _ in range(20):
        queue.offer("a", INTERACTIVE, "slow", 0.0)
    ticket = queue.offer("a", INTERACTIVE, "fast", 0.0)
    assert ticket in queue.turn(0.0).admitted


# --- fairness -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(5, 60), min_size=2, max_size=5), st.integers(1, 4))
def test_callers_with_work_share_alike_whatever_they_ask_for(counts: list[int], slots: int) -> None:
    queue, _ = queue_of(slots)
    for index, count in enumerate(counts):
        for _ in range(count):
            queue.offer(f"caller-{index}", INTERACTIVE, "m", 0.0)
    now, served = 0.0, Counter[str]()
    running = queue.turn(now).admitted
    while queue.waiting:
        served.update(ticket.caller for ticket in running)
        now += 1.0
        for ticket in running:
            queue.ended(ticket, now, well=False)
        running = queue.turn(now).admitted
        if all(queue._queues[INTERACTIVE].of_caller[f"caller-{index}"] for index in range(len(counts))):
            assert max(served.values()) - min(served[f"caller-{index}"] for index in range(len(counts))) <= 1


def test_who_asks_for_little_is_hardly_delayed_by_who_asks_for_much() -> None:
    queue, _ = queue_of(1, limit=1)
    for _ in range(500):
        queue.offer("greedy", INTERACTIVE, "m", 0.0)
    (running,) = queue.turn(0.0).admitted
    modest = queue.offer("modest", INTERACTIVE, "m", 0.0)
    queue.ended(running, 1.0)
    assert queue.turn(1.0).admitted == [modest]


def test_long_answers_count_for_more_than_short_ones() -> None:
    queue, _ = queue_of(1, limit=1)
    now = paced(queue, 10.0, tokens=100)
    for _ in range(40):
        queue.offer("long", INTERACTIVE, "m", now)
        queue.offer("short", INTERACTIVE, "m", now, most_tokens=10)
    served: Counter[str] = Counter()
    for _ in range(22):
        (ticket,) = queue.turn(now).admitted
        served[ticket.caller] += 1
        now += ticket.cost_s
        queue.ended(ticket, now, well=False)
    assert served["short"] in range(18, 22)  # ten to one


def test_a_full_queue_makes_way_for_who_has_less_in_it() -> None:
    queue, _ = queue_of(1, limit=1, max_queued=4)
    queue.offer("greedy", INTERACTIVE, "m", 0.0)
    queue.turn(0.0)
    greedy = [queue.offer("greedy", INTERACTIVE, "m", 0.0) for _ in range(4)]
    with pytest.raises(OverloadedError):
        queue.offer("greedy", INTERACTIVE, "m", 0.0)
    queue.offer("modest", INTERACTIVE, "m", 0.0)
    refused = queue.turn(0.0).refused
    assert [ticket for ticket, _ in refused] == [greedy[-1]]
    assert refused[0][1].retry_after_s
    queue.offer("modest", INTERACTIVE, "m", 0.0)
    with pytest.raises(OverloadedError):
        queue.offer("modest", INTERACTIVE, "m", 0.0)
    # Other classes have queues of their own.
    queue.offer("modest", BATCH, "m", 0.0)


# --- deadlines ------------------------------------------------------------------------------------------------------


def test_who_cannot_be_done_in_time_is_refused_at_once() -> None:
    queue, _ = queue_of(1)
    now = paced(queue, 10.0)
    for _ in range(2):
        queue.offer("a", INTERACTIVE, "m", now)
    queue.turn(now)
    for _ in range(6):  # two places: each second one of these waits 5 s longer
        queue.offer("a", INTERACTIVE, "m", now)
    assert queue.wait_seconds(INTERACTIVE, "m") == pytest.approx(35.0)
    with pytest.raises(OverloadedError) as caught:
        queue.offer("a", INTERACTIVE, "m", now, deadline=now + 44.0)
    assert caught.value.retry_after_s == pytest.approx(30.0)
    assert queue.offer("a", INTERACTIVE, "m", now, deadline=now + 46.0)
    with pytest.raises(OverloadedError):  # it comes after all of those
        queue.offer("a", BATCH, "m", now, deadline=now + 46.0)


def test_who_has_waited_too_long_is_refused_when_its_turn_comes() -> None:
    queue, _ = queue_of(1, limit=2)
    now = paced(queue, 10.0)
    first, second = queue.offer("a", INTERACTIVE, "m", now), queue.offer("a", INTERACTIVE, "m", now)
    queue.turn(now)
    late = queue.offer("a", INTERACTIVE, "m", now, deadline=now + 16.0)
    in_time = queue.offer("a", INTERACTIVE, "m", now)
    queue.ended(first, now + 9.0)
    turn = queue.turn(now + 9.0)
    assert [ticket for ticket, _ in turn.refused] == [late]
    assert turn.admitted == [in_time]
    queue.ended(second, now + 9.0)


def test_a_short_answer_makes_a_deadline_that_a_long_one_misses() -> None:
    queue, _ = queue_of(4)
    now = paced(queue, 10.0, tokens=100)
    queue.offer("a", INTERACTIVE, "m", now)
    queue.turn(now)
    with pytest.raises(OverloadedError):
        queue.offer("a", INTERACTIVE, "m", now, deadline=now + 2.0)
    assert queue.offer("a", INTERACTIVE, "m", now, deadline=now + 2.0, most_tokens=20)


def test_where_slots_are_free_half_of_what_is_typical_will_do() -> None:
    queue, _ = queue_of(2)
    now = paced(queue, 10.0)
    queue.offer("a", INTERACTIVE, "m", now)
    queue.turn(now)
    queue.offer("a", INTERACTIVE, "m", now, deadline=now + 6.0)
    assert queue.turn(now).admitted
    with pytest.raises(OverloadedError):
        queue.offer("a", INTERACTIVE, "m", now, deadline=now + 6.0)


def test_nobody_is_refused_by_a_pace_that_nothing_confirms() -> None:
    queue, _ = queue_of(1)
    now = paced(queue, 100.0)
    assert queue.offer("a", INTERACTIVE, "m", now, deadline=now + 1.0) in queue.turn(now).admitted
    unmeasured, _ = queue_of(1)
    paced(unmeasured, 100.0, times=2)
    unmeasured.offer("a", INTERACTIVE, "m", 0.0)
    unmeasured.turn(0.0)
    assert unmeasured.offer("a", INTERACTIVE, "m", 0.0, deadline=1.0)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 1000)), min_size=1, max_size=50))
def test_a_pace_lies_within_what_was_measured(ended: list[tuple[float, int]]) -> None:
    pace = Pace()
    for seconds, tokens in ended:
        pace.note(seconds, tokens)
    times = [seconds for seconds, _ in ended]
    assert min(times) * 0.999 <= pace.typical_s <= max(times) * 1.001
    assert pace.expected_s(0) == pace.typical_s
    assert pace.expected_s(1) <= pace.expected_s(10) <= pace.typical_s


def test_requests_that_go_away_leave_nothing_behind() -> None:
    queue, _ = queue_of(1, limit=1)
    queue.offer("a", INTERACTIVE, "m", 0.0)
    queue.turn(0.0)
    queue.offer("a", INTERACTIVE, "m", 0.0)
    for _ in range(1000):
        queue.withdraw(queue.offer("a", INTERACTIVE, "m", 0.0))
    assert len(queue._queues[INTERACTIVE]._heaps["m"]) < 50


def test_callers_that_are_served_are_forgotten() -> None:
    queue, _ = queue_of(10_000, limit=10_000)
    for number in range(5000):
        ticket = queue.offer(f"caller-{number}", INTERACTIVE, "m", float(number))
        queue.turn(float(number))
        queue.ended(ticket, float(number), well=False)
    assert len(queue._queues[INTERACTIVE]._finish) <= 1025


# --- how long a class waits and takes ---------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 100.0), max_size=60), st.floats(0.01, 10.0))
def test_slow_ones_are_allowed_for_and_never_without_bound(took: list[float], expected: float) -> None:
    overrun = Overrun()
    for seconds in took:
        overrun.note(expected, seconds)
        assert 1.0 <= overrun.factor <= 3.0
    for _ in range(2000):
        overrun.doubted()
    assert overrun.factor < 1.05  # whoever is refused for it asks in vain for a while only


def test_a_class_that_is_held_up_waits_longer_than_its_lane_would_say() -> None:
    flow = Flow()
    flow.queued(0.0)
    assert flow.wait_s(3, 0.0) == 0.0  # nothing is known yet
    assert flow.wait_s(3, 9.0) == pytest.approx(9.0)  # but that nobody has had a turn for so long
    for turn in range(1, 11):
        flow.went(2.0 * turn, last=False)
    assert flow.wait_s(3, 20.0) == pytest.approx(8.0)
    assert flow.wait_s(3, 50.0) == pytest.approx(30.0)  # nobody has had a turn for so long
    flow.went(52.0, last=True)
    assert flow.wait_s(0, 52.0) == 0.0
    flow.went(500.0, last=True)  # did not have to wait
    assert flow.interval_s < 6.0


def cut_off(queue: AdmissionQueue, now: float, *, after: float, times: int) -> float:
    """Has batch requests of the lane be cut off, each after so many seconds; returns the time after it."""
    for _ in range(times):
        ticket = queue.offer("before", BATCH, "m", now)
        assert queue.turn(now).admitted == [ticket]
        now += after
        queue.ended(ticket, now, well=False)
    return now


@pytest.mark.parametrize(("after", "takes_on"), [(25.0, False), (5.0, True)])
def test_those_that_were_cut_off_late_tell_how_long_one_takes_and_those_cut_off_early_nothing(
    after: float, takes_on: bool
) -> None:
    queue, _ = queue_of(1)
    now = cut_off(queue, paced(queue, 10.0), after=after, times=20)
    queue.offer("a", BATCH, "m", now)
    assert queue.turn(now).admitted
    queue.offer("a", BATCH, "m", now)  # waits, and would have the place that the next one asks for
    if takes_on:
        assert queue.offer("a", BATCH, "m", now, deadline=now + 35.0)
    else:
        with pytest.raises(OverloadedError):
            queue.offer("a", BATCH, "m", now, deadline=now + 35.0)


def test_where_nobody_else_waits_the_usual_time_is_enough_to_be_tried() -> None:
    queue, _ = queue_of(1)
    now = cut_off(queue, paced(queue, 10.0), after=25.0, times=20)
    queue.offer("a", BATCH, "m", now)
    assert queue.turn(now).admitted
    assert queue.offer("a", BATCH, "m", now, deadline=now + 25.0)
    with pytest.raises(OverloadedError):
        queue.offer("a", BATCH, "m", now, deadline=now + 35.0)
