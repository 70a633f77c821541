"""Overload, simulated: four times what the mesh can do still gets done what the mesh can do, and the urgent first."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

import pytest

from chorus.core.admission import AdmissionQueue, Ticket
from chorus.core.errors import OverloadedError
from chorus.core.generation import Priority

SLOTS = 8
SERVICE_S = 2.0
DEADLINE_S = 12.0
LENGTH_S = 400.0


class Mesh:
    def slots(self, lane: str) -> int | None:
        return SLOTS

    def has_quiet_node(self, lane: str) -> bool:
        return True


@dataclass
class Figures:
    """What became of the requests; `good` ended before their deadlines, `refused` were told so at once or later."""

    offered: Counter[Priority] = field(default_factory=Counter)
    good: Counter[Priority] = field(default_factory=Counter)
    late: Counter[Priority] = field(default_factory=Counter)
    refused: Counter[Priority] = field(default_factory=Counter)
    most_waiting: int = 0
    interactive_s: list[float] = field(default_factory=list)


def simulate(load: float, seed: int, shares: dict[Priority, float]) -> Figures:
    """Requests come at `load` times what the slots can do; the runner serves the most urgent of those that it has."""
    rng, figures, number = random.Random(seed), Figures(), count()
    queue = AdmissionQueue(Mesh(), limit=1000, max_queued=200)
    events: list[tuple[float, int, str, Ticket | None]] = [(0.0, next(number), "arrival", None)]
    at_runner: deque[Ticket] = deque()
    came: dict[int, float] = {}
    busy = 0

    def go(now: float) -> None:
        nonlocal busy
        turn = queue.turn(now)
        figures.refused.update(ticket.priority for ticket, _ in turn.refused)
        at_runner.extend(turn.admitted)
        while busy < SLOTS and at_runner:
            ticket = min(at_runner, key=lambda ticket: list(Priority).index(ticket.priority))
            at_runner.remove(ticket)
            busy += 1
            heappush(events, (now + rng.uniform(0.2, 1.8) * SERVICE_S, next(number), "end", ticket))

    while events:
        now, _, what, ticket = heappop(events)
        if what == "arrival":
            if now < LENGTH_S:
                heappush(events, (now + rng.expovariate(load * SLOTS / SERVICE_S), next(number), "arrival", None))
            priority = rng.choices(list(shares), list(shares.values()))[0]
            figures.offered[priority] += 1
            try:
                offered = queue.offer(f"c{rng.randrange(5)}", priority, "m", now, deadline=now + DEADLINE_S)
                came[offered.number] = now
            except OverloadedError:
                figures.refused[priority] += 1
        elif ticket is not None:
            busy -= 1
            queue.ended(ticket, now)
            (figures.good if now <= came[ticket.number] + DEADLINE_S else figures.late)[ticket.priority] += 1
            if ticket.priority is Priority.INTERACTIVE:
                figures.interactive_s.append(now - came[ticket.number])
        go(now)
        figures.most_waiting = max(figures.most_waiting, queue.waiting)
        queue.validate_state()
    return figures


@pytest.mark.parametrize("seed", range(3))
def test_at_four_times_capacity_what_is_done_in_time_stays_near_the_peak(seed: int) -> None:
    shares = {Priority.INTERACTIVE: 1.0}
    peak = simulate(1.0, seed, shares)
    over = simulate(4.0, seed, shares)
    assert over.good.total() >= 0.9 * peak.good.total()
    # What is begun is mostly finished in time: late answers are work for nobody.
    assert over.late.total() <= 0.1 * over.good.total()
    assert over.good.total() >= 0.9 * LENGTH_S * SLOTS / SERVICE_S
    assert over.refused.total() + over.good.total() + over.late.total() == over.offered.total()
    assert over.most_waiting <= 200


@pytest.mark.parametrize("seed", range(3))
def test_interactive_requests_hardly_notice_the_rest(seed: int) -> None:
    over = simulate(4.0, seed, {Priority.INTERACTIVE: 0.1, Priority.BATCH: 0.2, Priority.BACKGROUND: 0.7})
    assert over.good[Priority.INTERACTIVE] >= 0.98 * over.offered[Priority.INTERACTIVE]
    waits = sorted(over.interactive_s)
    assert waits[int(0.99 * len(waits))] <= 3 * SERVICE_S
    # Of the batch requests, 0.8 times what the slots can do, what interactive ones leave: some 0.6.
    assert over.good[Priority.BATCH] >= 0.6 * over.offered[Priority.BATCH]
    # Background gets what is left, which is less than it asks for.
    assert over.good[Priority.BACKGROUND] <= 0.2 * over.offered[Priority.BACKGROUND]


@pytest.mark.parametrize("seed", range(3))
def test_batch_requests_that_are_taken_on_are_in_time(seed: int) -> None:
    """Interactive ones hold them up all the time; what could only be late is refused, and nothing begun is wasted."""
    over = simulate(4.0, seed, {Priority.INTERACTIVE: 0.125, Priority.BATCH: 0.375, Priority.BACKGROUND: 0.5})
    assert over.late.total() <= 0.05 * over.good[Priority.BATCH]
    assert over.good.total() >= 0.95 * LENGTH_S * SLOTS / SERVICE_S
