"""Bounded queues before the mesh: by class, fair between callers, and honest about deadlines. Sans I/O.

Requests that nobody has a slot for wait here rather than at a runner, where the first to come would be the first served
whoever sent it, and where it could not change its mind about the runner. What counts:

- A lane is what shares slots: the requests for one model. It is filled to a multiple of the slots that the mesh has for
  it, which differs by class: interactive requests may queue a little at the runners (which put others back for them),
  so that no slot idles for the length of a message's way; background ones leave a fifth of the slots alone, and go only
  while some node is less busy than that.
- Classes come in their order, interactive first: under overload background work stands still.
- Within a class, callers take turns by start-time fair queueing (P. Goyal, H. M. Vin, H. Cheng, 1996), a request's
  length being the seconds that it is expected to take; what it really took is settled when it ends. A caller with a
  thousand requests waiting delays another one's first by no more than one request.
- Each class's queue is bounded. Where it is full, the caller who has most waiting makes way for one who has fewer.
- Who can't be done before the deadline, by the pace of requests that ended lately, is refused at once: on arrival, or
  when its turn comes. The wait is that of its class, which more urgent ones hold up; the time it takes is that of the
  slow ones of its class, since an answer that comes too late is work for nobody, or the usual time where nobody as
  urgent waits for the place. A lane with nothing under way refuses nobody: its pace is out of date, and has to be
  measured.

`now` is seconds on a clock that only goes forward; deadlines are on the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Protocol

from chorus.core.admission.pace import Flow, Overrun, Pace
from chorus.core.errors import OverloadedError
from chorus.core.generation import Priority

# How full of each class a lane may be, in multiples of its slots; the greater, the more urgent.
FILL = {Priority.INTERACTIVE: 2.0, Priority.BATCH: 1.25, Priority.BACKGROUND: 0.8}
# Where slots are free, a request is hopeless only if not even one that takes so much of the typical time would make it:
# the typical time may still be that of a fuller hour, and answers differ in length.
HOPE = 0.5
# What a request is taken to need where none has ended yet.
UNMEASURED_S = 1.0
RETRY_MIN_S = 0.1
RETRY_MAX_S = 30.0
# Callers remembered whose turn is not affected any more.
_MAX_IDLE_CALLERS = 1024
# Lanes and classes remembered in which nobody waits.
_MAX_FLOWS = 1024


class Capacity(Protocol):
    """What the mesh has, as of now."""

    def slots(self, lane: str) -> int | None:
        """Requests of a lane that runners decode at once; None where waiting here would help nobody."""
        ...

    def has_quiet_node(self, lane: str) -> bool:
        """Whether some node that serves the lane is no more than 80% busy."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One request, waiting or under way. `tag` is its place in its class, `cost_s` the seconds that it stands for."""

    number: int
    caller: str
    priority: Priority
    lane: str
    cost_s: float
    deadline: float | None
    tag: float


@dataclass(slots=True)
class Turn:
    """What follows from what has happened: who may go, and who is not waited with any longer, and why."""

    admitted: list[Ticket] = field(default_factory=list)
    refused: list[tuple[Ticket, OverloadedError]] = field(default_factory=list)


class _Waiting:
    """The queue of one class: tickets by their tags, a heap for each lane, and who has how many."""

    def __init__(self) -> None:
        self.virtual = 0.0
        self.tickets: dict[int, Ticket] = {}
        self.of_caller: Counter[str] = Counter()
        self.of_lane: Counter[str] = Counter()
        self._heaps: dict[str, list[tuple[float, int]]] = {}
        self._finish: dict[str, float] = {}  # where each caller's next request begins at the earliest

    def next_tag(self, caller: str) -> float:
        return max(self.virtual, self._finish.get(caller, 0.0))

    def add(self, ticket: Ticket) -> None:
        self.tickets[ticket.number] = ticket
        self.of_caller[ticket.caller] += 1
        self.of_lane[ticket.lane] += 1
        self._finish[ticket.caller] = ticket.tag + ticket.cost_s
        heappush(self._heaps.setdefault(ticket.lane, []), (ticket.tag, ticket.number))

    def remove(self, ticket: Ticket) -> None:
        """Takes a ticket out; its place in the heap is cleared when it comes to the top."""
        del self.tickets[ticket.number]
        for counter, key in ((self.of_caller, ticket.caller), (self.of_lane, ticket.lane)):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]
        left = self.of_lane[ticket.lane]
        heap = self._heaps[ticket.lane]
        if not left:
            del self._heaps[ticket.lane]
        elif len(heap) > 2 * left + 16:  # mostly requests that went away
            heap[:] = sorted(head for head in heap if head[1] in self.tickets)

    def unsent(self, ticket: Ticket) -> None:
        """It goes without having been served: its caller's next one need not stand behind it."""
        self.remove(ticket)
        if self._finish.get(ticket.caller) == ticket.tag + ticket.cost_s:
            self._finish[ticket.caller] = ticket.tag

    def served(self, ticket: Ticket) -> None:
        self.remove(ticket)
        self._advance(ticket)

    def passed(self, ticket: Ticket) -> None:
        """One is served that never stood here."""
        self._finish[ticket.caller] = ticket.tag + ticket.cost_s
        self._advance(ticket)

    def _advance(self, ticket: Ticket) -> None:
        self.virtual = max(self.virtual, ticket.tag)
        if len(self._finish) > _MAX_IDLE_CALLERS:
            self._finish = {
                caller: at for caller, at in self._finish.items() if at > self.virtual or self.of_caller[caller]
            }

    def settle(self, ticket: Ticket, took_s: float) -> None:
        """A request took another time than it was counted for."""
        if ticket.caller in self._finish:
            self._finish[ticket.caller] += took_s - ticket.cost_s

    def first(self, has_room: Callable[[str], bool]) -> Ticket | None:
        """The ticket whose turn it is, of those lanes that have room."""
        heads = [head for lane in list(self._heaps) if has_room(lane) and (head := self._head(lane)) is not None]
        return self.tickets[min(heads)[1]] if heads else None

    def last_of(self, caller: str) -> Ticket:
        """The request of a caller whose turn would come last."""
        return max(
            (ticket for ticket in self.tickets.values() if ticket.caller == caller),
            key=lambda ticket: (ticket.tag, ticket.number),
        )

    def _head(self, lane: str) -> tuple[float, int] | None:
        heap = self._heaps[lane]
        while heap and heap[0][1] not in self.tickets:
            heappop(heap)
        return heap[0] if heap else None


class AdmissionQueue:
    """Who may go, and who waits. After anything that happens, `turn` says what follows from it.

    At most `limit` are under way and `max_queued` of each class wait.
    """

    def __init__(self, capacity: Capacity, *, limit: int, max_queued: int) -> None:
        self._capacity = capacity
        self._limit = limit
        self._max_queued = max_queued
        self._queues = {priority: _Waiting() for priority in Priority}
        self._running: dict[int, tuple[Ticket, float]] = {}
        self._running_of: Counter[str] = Counter()
        self._paces: dict[str, Pace] = {}
        self._overruns: dict[tuple[str, Priority], Overrun] = {}
        self._flows: dict[tuple[str, Priority], Flow] = {}
        self._evicted: list[tuple[Ticket, OverloadedError]] = []
        self._number = 0

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(queue.tickets) for queue in self._queues.values())

    def waiting_of_lanes(self) -> Counter[str]:
        """How many requests wait, by lane."""
        return sum((queue.of_lane for queue in self._queues.values()), Counter[str]())

    def offer(
        self,
        caller: str,
        priority: Priority,
        lane: str,
        now: float,
        *,
        most_tokens: int = 0,
        deadline: float | None = None,
    ) -> Ticket:
        """A request has come; it waits until a turn admits it. `most_tokens` is what it may generate (0: untold).

        Raises OverloadedError, with the seconds after which to try again, where it can't be done before its deadline
        or its class's queue is full and nobody has more waiting than its caller.
        """
        queue = self._queues[priority]
        cost_s = self._cost_s(lane, most_tokens)
        wait_s = self.wait_seconds(priority, lane)
        flow = self._flows.get((lane, priority))
        if flow is not None:
            wait_s = max(wait_s, flow.wait_s(queue.of_lane[lane], now))
        if self._is_hopeless(priority, lane, now + wait_s, cost_s, deadline, others=self._as_urgent(priority, lane)):
            raise self._too_late(wait_s, cost_s)
        if len(queue.tickets) >= self._max_queued and not self._has_room(lane, priority):
            self._make_way(queue, caller, priority, lane)
        self._number += 1
        ticket = Ticket(self._number, caller, priority, lane, cost_s, deadline, queue.next_tag(caller))
        if not queue.of_lane[lane] and not self._has_room(lane, priority):
            self._flow_of(lane, priority).queued(now)
        queue.add(ticket)
        return ticket

    def take(
        self,
        caller: str,
        priority: Priority,
        lane: str,
        now: float,
        *,
        most_tokens: int = 0,
        deadline: float | None = None,
    ) -> Ticket | None:
        """Admits a request as `offer` and `turn` would where nobody waits and there is room; None where that isn't so.

        It is the way of almost every request, and a good deal quicker. Raises OverloadedError as `offer` does.
        """
        if self.waiting or self._evicted or not self._has_room(lane, priority):
            return None
        queue = self._queues[priority]
        cost_s = self._cost_s(lane, most_tokens)
        if deadline is not None and self._is_hopeless(priority, lane, now, cost_s, deadline, others=0):
            raise self._too_late(0.0, cost_s)
        self._number += 1
        ticket = Ticket(self._number, caller, priority, lane, cost_s, deadline, queue.next_tag(caller))
        queue.passed(ticket)
        self._begin(ticket, now)
        return ticket

    def turn(self, now: float) -> Turn:
        """Admits everybody who may go now."""
        turn = Turn(refused=self._evicted)
        self._evicted = []
        for priority, queue in self._queues.items():
            while len(self._running) < self._limit:
                ticket = queue.first(partial(self._has_room, priority=priority))
                if ticket is None:
                    break
                others = self._as_urgent(priority, ticket.lane) - 1
                if self._is_hopeless(priority, ticket.lane, now, ticket.cost_s, ticket.deadline, others=others):
                    queue.unsent(ticket)
                    turn.refused.append((ticket, self._too_late(0.0, ticket.cost_s)))
                    continue
                queue.served(ticket)
                if (flow := self._flows.get((ticket.lane, priority))) is not None:
                    flow.went(now, last=not queue.of_lane[ticket.lane])
                self._begin(ticket, now)
                turn.admitted.append(ticket)
        return turn

    def withdraw(self, ticket: Ticket) -> None:
        """A request that waits is taken back."""
        queue = self._queues[ticket.priority]
        if ticket.number in queue.tickets:
            queue.unsent(ticket)

    def ended(self, ticket: Ticket, now: float, *, tokens: int = 0, well: bool = True) -> None:
        """A request under way has ended; only those that ended `well` tell how long one takes."""
        _, began = self._running.pop(ticket.number)
        self._running_of[ticket.lane] -= 1
        if not self._running_of[ticket.lane]:
            del self._running_of[ticket.lane]
        took_s = max(0.0, now - began)
        self._queues[ticket.priority].settle(ticket, took_s)
        pace = self._paces.get(ticket.lane)
        # One that was cut off tells something only once it took longer than expected: its end would be later still.
        if pace is not None and pace.is_known and (well or took_s > ticket.cost_s):
            self._overruns.setdefault((ticket.lane, ticket.priority), Overrun()).note(ticket.cost_s, took_s)
        if well:
            self._paces.setdefault(ticket.lane, Pace()).note(took_s, tokens)

    def position(self, ticket: Ticket) -> int:
        """How many requests of its lane and class, or a more urgent class, come before one that waits."""
        before = sum(self._queues[priority].of_lane[ticket.lane] for priority in _more_urgent(ticket.priority))
        own = self._queues[ticket.priority].tickets.values()
        mine = (ticket.tag, ticket.number)
        return before + sum(other.lane == ticket.lane and (other.tag, other.number) < mine for other in own)

    def wait_seconds(self, priority: Priority, lane: str) -> float:
        """How long one more request would wait, by the pace of those that ended lately; 0 where nothing is known."""
        pace = self._paces.get(lane)
        if pace is None:
            return 0.0
        classes = [*_more_urgent(priority), priority]
        of_all = sum(len(self._queues[other].tickets) for other in classes)
        wait_s = _drained_s(of_all, len(self._running), self._limit, pace.typical_s)
        slots = self._capacity.slots(lane)
        if slots is None:
            return wait_s
        of_lane = self._as_urgent(priority, lane)
        return max(wait_s, _drained_s(of_lane, self._running_of[lane], _places(priority, slots), pace.typical_s))

    def _begin(self, ticket: Ticket, now: float) -> None:
        self._running[ticket.number] = (ticket, now)
        self._running_of[ticket.lane] += 1

    def _cost_s(self, lane: str, most_tokens: int) -> float:
        pace = self._paces.get(lane)
        return pace.expected_s(most_tokens) if pace is not None else UNMEASURED_S

    def _has_room(self, lane: str, priority: Priority) -> bool:
        if len(self._running) >= self._limit:
            return False
        slots = self._capacity.slots(lane)
        if slots is None:
            return True
        if self._running_of[lane] >= _places(priority, slots):
            return False
        return priority is not Priority.BACKGROUND or self._capacity.has_quiet_node(lane)

    def _as_urgent(self, priority: Priority, lane: str) -> int:
        """How many wait for a place of that lane who are as urgent, or more so."""
        return sum(self._queues[other].of_lane[lane] for other in (*_more_urgent(priority), priority))

    def _is_hopeless(
        self, priority: Priority, lane: str, start: float, cost_s: float, deadline: float | None, *, others: int
    ) -> bool:
        pace = self._paces.get(lane)
        if deadline is None or pace is None or not pace.is_known or not self._running_of[lane]:
            return False
        slots = self._capacity.slots(lane)
        if self._running_of[lane] < (self._limit if slots is None else min(slots, self._limit)):
            return start + HOPE * cost_s > deadline
        overrun = self._overruns.get((lane, priority))
        # A place that others wait for had better not be spent on one who may be late; else there is nothing to lose.
        if overrun is None or not others or start + overrun.factor * cost_s <= deadline:
            return start + cost_s > deadline
        overrun.doubted()
        return True

    def _flow_of(self, lane: str, priority: Priority) -> Flow:
        if len(self._flows) >= _MAX_FLOWS:  # callers may make up names
            self._flows = {key: flow for key, flow in self._flows.items() if self._queues[key[1]].of_lane[key[0]]}
        return self._flows.setdefault((lane, priority), Flow())

    def _make_way(self, queue: _Waiting, caller: str, priority: Priority, lane: str) -> None:
        """Has somebody give up a place in a full queue, or raises OverloadedError."""
        most, count = max(queue.of_caller.items(), key=lambda item: (item[1], item[0]), default=("", 0))
        if count <= queue.of_caller[caller] + 1:
            waiting = f"and {len(queue.tickets)} {priority} requests are waiting" if queue.tickets else ""
            raise OverloadedError(
                f"this coordinator has {len(self._running)} requests under way {waiting}".rstrip()
                + "; coordinator.max_requests and coordinator.max_queued bound both",
                retry_after_s=self._retry_s(priority, lane),
            )
        victim = queue.last_of(most)
        queue.unsent(victim)
        error = OverloadedError(
            f"{count} {priority} requests of this caller were waiting, and the last made way for another caller's",
            retry_after_s=self._retry_s(priority, victim.lane),
        )
        self._evicted.append((victim, error))

    def _too_late(self, wait_s: float, cost_s: float) -> OverloadedError:
        return OverloadedError(
            f"the request can't be done before its deadline: at the present pace it waits {wait_s:.1f} s and takes "
            f"{cost_s:.1f} s",
            retry_after_s=min(max(wait_s, RETRY_MIN_S), RETRY_MAX_S),
        )

    def _retry_s(self, priority: Priority, lane: str) -> float:
        """When one of those that wait will have gone."""
        pace, slots = self._paces.get(lane), self._capacity.slots(lane)
        places = min(self._limit, _places(priority, slots) if slots is not None else self._limit)
        typical_s = pace.typical_s if pace is not None else UNMEASURED_S
        return min(max(typical_s / places, RETRY_MIN_S), RETRY_MAX_S)

    def validate_state(self) -> None:
        """Raises AssertionError where the counts are not what is there."""
        assert len(self._running) <= self._limit, "more are under way than may be"
        assert self._running_of == Counter(ticket.lane for ticket, _ in self._running.values())
        for queue in self._queues.values():
            assert queue.of_caller == Counter(ticket.caller for ticket in queue.tickets.values())
            assert queue.of_lane == Counter(ticket.lane for ticket in queue.tickets.values())


def _more_urgent(priority: Priority) -> Iterator[Priority]:
    for other in Priority:
        if other is priority:
            return
        yield other


def _places(priority: Priority, slots: int) -> int:
    """How many of a lane may be under way when one of this class is admitted."""
    return max(1, int(FILL[priority] * slots))


def _drained_s(waiting: int, running: int, places: int, typical_s: float) -> float:
    """How long until one more than `waiting` has found a place, each place being free again after `typical_s`."""
    return max(0, waiting + 1 - max(0, places - running)) * typical_s / places
