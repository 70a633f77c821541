"""The simulated mesh: requests arrive, coordinators choose, machines decode, heartbeats tell of it a moment later.

A discrete-event simulation: a heap of what happens when. Heartbeats come once a second from each machine, at a time of
its own; coordinators get another directory ten times a second, as from a registry. A machine's death breaks its
connections, so it is known at once, and its requests go on elsewhere with the tokens that are left.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import MappingProxyType

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.resilience.breakers import Trial
from chorus.sim.machines import Fleet, Machine, Trouble, coordinator_name
from chorus.sim.policies import Asking, Ended, Policy

_HEARTBEAT_S = 1.0
_FLUSH_S = 0.1
_FAST_ERROR_S = 0.002
_MOST_ATTEMPTS = 3
_LONGEST_ANSWER = 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is asked for how long; what arrives before `warm_s` does not count.

    Answers have `tokens` on average, their lengths being log-normal.
    """

    seconds: float = 10.0
    warm_s: float = 2.0
    requests_per_second: float = 20_000.0
    tokens: float = 40.0
    spread: float = 0.8
    coordinators: int = 3


@dataclass(slots=True)
class Outcome:
    """What came of it. `waits_s` are from a request's arrival to the end of its answer."""

    asked: int = 0
    failed: int = 0
    attempts: int = 0
    waits_s: list[float] = field(default_factory=list)
    attempts_on: dict[Trouble, int] = field(default_factory=lambda: dict.fromkeys(Trouble, 0))

    @property
    def answered(self) -> int:
        """Requests with a whole answer."""
        return len(self.waits_s)

    def share_on(self, trouble: Trouble) -> float:
        """Of all attempts, those on machines that had been in that trouble for a second."""
        return self.attempts_on[trouble] / max(self.attempts, 1)


@dataclass(slots=True, eq=False)
class Job:
    """One request. `tokens` are what is left of its answer; `number` tells its attempts apart."""

    arrived: float
    coordinator: int
    tokens: int
    tried: set[str] = field(default_factory=set)
    number: int = 0
    began: float = 0.0
    trial: Trial | None = None
    machine: Machine | None = None


class World:
    """One run of one policy, of which each coordinator has its own."""

    def __init__(self, fleet: Fleet, plan: Plan, policy: Callable[[Random], Policy], seed: int = 0) -> None:
        """The same arguments give the same run: arrivals and troubles are those of any other policy, too."""
        self._fleet, self._plan = fleet, plan
        self._arrivals, self._heartbeats = Random(seed), Random(seed + 1)
        self._policies = [policy(Random(seed + 2 + number)) for number in range(plan.coordinators)]
        for number, made in enumerate(self._policies):
            made.named(coordinator_name(number))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._entries: dict[str, DirectoryEntry] = {}
        self._directory = Directory()
        self._machines = {machine.name: machine for machine in fleet.machines}
        self._since: dict[str, float] = {}  # in trouble from then on
        self._changed = False
        self.now = 0.0
        self.open: set[Job] = set()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Until every request that arrived in time has ended."""
        for machine in self._fleet.machines:
            self._entries[machine.name] = machine.entry(0.0)
            self._at(self._heartbeats.random() * _HEARTBEAT_S, partial(self._heartbeat, machine))
        self._changed = True
        self._flush()
        for when, index, trouble in self._fleet.troubles:
            self._at(when, partial(self._befall, self._fleet.machines[index], trouble))
        self._at(0.0, self._arrive)
        while self._events and (self.now < self._plan.seconds or self.open):
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        return self.outcome

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    # --- what machines tell -----------------------------------------------------------------------------------------

    def _heartbeat(self, machine: Machine) -> None:
        self._at(self.now + _HEARTBEAT_S, partial(self._heartbeat, machine))
        if machine.trouble is not Trouble.DEAD:
            self._entries[machine.name] = machine.entry(self.now)
            self._changed = True

    def _flush(self) -> None:
        self._at(self.now + _FLUSH_S, self._flush)
        if self._changed:
            self._changed = False
            newer = Directory(self._directory.version + 1, MappingProxyType(dict(self._entries)), synced=True)
            change = newer.changes_since(self._directory)
            self._directory = newer
            for policy in self._policies:
                policy.changed(newer, change, self.now)

    def _befall(self, machine: Machine, trouble: Trouble | None) -> None:
        machine.trouble = trouble
        self._since[machine.name] = self.now
        if trouble is not Trouble.DEAD:
            return
        del self._entries[machine.name]
        self._changed = True
        lost = [*sorted(machine.running, key=lambda job: job.arrived), *machine.queue]
        left = {job: self._left(job) for job in machine.running}
        machine.running.clear()
        machine.queue.clear()
        for job in lost:
            job.tokens = left.get(job, job.tokens)
            self._attempt_failed(job, machine)

    def _left(self, job: Job) -> int:
        """The tokens of its answer that its caller has not got."""
        assert job.machine is not None
        return max(1, job.tokens - int((self.now - job.began) * job.machine.rate / 2))

    # --- requests ---------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        plan, draw = self._plan, self._arrivals
        if self.now >= plan.seconds:
            return
        self._at(self.now + draw.expovariate(plan.requests_per_second), self._arrive)
        median = math.log(plan.tokens) - plan.spread**2 / 2
        tokens = min(max(1, round(draw.lognormvariate(median, plan.spread))), _LONGEST_ANSWER)
        job = Job(self.now, draw.randrange(plan.coordinators), tokens)
        self.open.add(job)
        self.outcome.asked += self._counts(job)
        self._attempt(job)

    def _attempt(self, job: Job) -> None:
        policy = self._policies[job.coordinator]
        asking = Asking(job.tokens, job.tried, self.now)
        name = policy.choose(asking) if job.number < _MOST_ATTEMPTS else None
        if name is None:
            self.open.discard(job)
            self.outcome.failed += self._counts(job)
            return
        machine = self._machines[name]
        job.number += 1
        job.tried.add(name)
        job.trial, job.machine = policy.began(name, self.now), machine
        if self._counts(job):
            self.outcome.attempts += 1
            if machine.trouble is not None and self.now > self._since[name] + 1.0:
                self.outcome.attempts_on[machine.trouble] += 1
        number = job.number
        if machine.trouble in (Trouble.FAILS, Trouble.DEAD):
            self._at(self.now + _FAST_ERROR_S, partial(self._attempt_failed, job, machine))
        elif len(machine.running) < machine.slots:
            self._begin(job, machine, number)
        else:
            machine.queue.append(job)

    def _begin(self, job: Job, machine: Machine, number: int) -> None:
        seconds = machine.seconds(job.tokens)
        job.began = self.now
        machine.running.add(job)
        self._at(self.now + seconds, partial(self._end, job, machine, number, seconds))

    def _end(self, job: Job, machine: Machine, number: int, seconds: float) -> None:
        if job.number != number or job not in machine.running:
            return  # the machine died meanwhile
        machine.running.discard(job)
        machine.ended(job.tokens, seconds)
        self._policies[job.coordinator].ended(Ended(machine.name, job.trial, failed=False), self.now)
        self.open.discard(job)
        if self._counts(job):
            self.outcome.waits_s.append(self.now - job.arrived)
        if machine.queue:
            waiting = machine.queue.popleft()
            self._begin(waiting, machine, waiting.number)

    def _attempt_failed(self, job: Job, machine: Machine) -> None:
        self._policies[job.coordinator].ended(Ended(machine.name, job.trial, failed=True), self.now)
        self._attempt(job)

    def _counts(self, job: Job) -> bool:
        return job.arrived >= self._plan.warm_s


def simulate(fleet: Fleet, plan: Plan, policy: Callable[[Random], Policy], seed: int = 0) -> Outcome:
    """Runs one policy on a fleet, which it leaves used up: make another one for the next."""
    return World(fleet, plan, policy, seed).run()
