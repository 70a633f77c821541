"""A coordinator's own requests under way, those that a runner's last load report can't know of, and its company.

Load reports are a heartbeat old. A coordinator that went by them alone would send everything of half a second to the
runner that was idle then. A report tells how many requests each coordinator had at the runner (`Load.by_coordinator`),
so its own are taken out and counted as they stand now, and only the others' are old.

What the others have sent since is not known, but they go by the same reports and choose as this one does: of what it
sent somewhere since, they will have sent as many times as much as they have requests in all. `company` is that factor;
without it, several coordinators that see one idle runner would each fill it.

An older runner does not tell whose requests it has. Then steps are kept, and those that are older than a report and its
way are taken to be in it. So it is where coordinators share one name, as the pods of a Deployment that share one
certificate do: each would take the others' requests for its own and see none of them. A report of more requests than
this one has had there lately gives that away. Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import inf

# How old what a report tells is when it arrives: it was counted before it went through a registry.
REPORT_LAG_S = 0.2
# Steps remembered for one runner without a report; beyond it the oldest are counted together.
MAX_STEPS = 256
# More than so many times its own are not expected of the others, however little this one has.
MAX_COMPANY = 8.0
# How old a report may be at most for its count of ours to be compared with what we have had.
PEAK_S = 10.0
# For so long after it was seen last, others are taken to have our name: also those of a process before this one end.
SHARED_S = 60.0


class InFlight:
    """Counts for every runner. `unreported`, which changes in place, is what placement takes as `in_flight`.

    `coordinator` is its own name as reports have it; empty where it has none, so that no report tells of it.
    """

    def __init__(self, coordinator: str = "") -> None:
        self._coordinator = coordinator
        self._steps: dict[str, deque[tuple[float, int]]] = {}
        self._unreported: dict[str, int] = {}
        self._running: dict[str, int] = {}
        self._told: dict[str, tuple[int, int]] = {}  # of the last report: ours and the others'
        self._ours = self._others = 0  # in all reports
        self._away: set[str] = set()  # those that left with requests of ours, until they report again
        self._peaks: dict[str, tuple[float, int, int]] = {}  # since when, the most since then, and in the time before
        self._shared_until = -inf

    @property
    def unreported(self) -> Mapping[str, int]:
        """By runner id: requests that it has of ours beyond those reported. Negative where it has fewer."""
        return self._unreported

    @property
    def company(self) -> float:
        """How many times as many requests all coordinators have as this one; at least 1."""
        return min(MAX_COMPANY, (self._ours + self._others + 1) / (self._ours + 1))

    def running(self, runner_id: str) -> int:
        """Requests of ours that are under way at a runner."""
        return self._running.get(runner_id, 0)

    def began(self, runner_id: str, now: float) -> None:
        """A request was sent to a runner."""
        self._running[runner_id] = self._running.get(runner_id, 0) + 1
        self._peak(runner_id, now)
        self._step(runner_id, now, 1)

    def ended(self, runner_id: str, now: float) -> None:
        """It has ended, however it did."""
        left = self._running.get(runner_id, 0) - 1
        if left > 0:
            self._running[runner_id] = left
        else:
            self._running.pop(runner_id, None)
        if runner_id not in self._away:
            self._step(runner_id, now, -1)
        elif left <= 0:
            self._away.discard(runner_id)

    def reported(self, runner_id: str, now: float, by_coordinator: Mapping[str, int] | None) -> None:
        """A load report of a runner has come; `by_coordinator` None: it does not tell whose its requests are."""
        self._forget(runner_id)
        self._away.discard(runner_id)
        ours = 0 if by_coordinator is None else by_coordinator.get(self._coordinator, 0)
        if ours > self._peak(runner_id, now):
            self._shared_until = now + SHARED_S
        if self._coordinator and by_coordinator is not None and now >= self._shared_until:
            others = sum(by_coordinator.values()) - ours
            self._told[runner_id] = (ours, others)
            self._ours, self._others = self._ours + ours, self._others + others
            self._steps.pop(runner_id, None)
            self._count(runner_id, ours)
            return
        steps = self._steps.get(runner_id)
        if steps is None:
            self._unreported.pop(runner_id, None)
            return
        while steps and steps[0][0] <= now - REPORT_LAG_S:
            self._unreported[runner_id] -= steps.popleft()[1]
        if not steps:
            del self._steps[runner_id], self._unreported[runner_id]

    def left(self, runner_id: str) -> None:
        """A runner has left the directory; another of its name starts from nothing. Its requests may go on."""
        self._forget(runner_id)
        if runner_id in self._running:
            self._away.add(runner_id)
        self._steps.pop(runner_id, None)
        self._unreported.pop(runner_id, None)
        self._peaks.pop(runner_id, None)

    def _peak(self, runner_id: str, now: float) -> int:
        """The most requests of ours that a runner has had at once within the last `PEAK_S`, or somewhat longer."""
        running = self.running(runner_id)
        since, most, before = self._peaks.get(runner_id, (now, 0, 0))
        if now - since >= PEAK_S:
            since, most, before = now, 0, most
        self._peaks[runner_id] = (since, max(most, running), before)
        return max(most, running, before)

    def _forget(self, runner_id: str) -> None:
        ours, others = self._told.pop(runner_id, (0, 0))
        self._ours, self._others = self._ours - ours, self._others - others

    def _count(self, runner_id: str, ours: int) -> None:
        """What is beyond `ours`, which were reported."""
        more = self._running.get(runner_id, 0) - ours
        if more:
            self._unreported[runner_id] = more
        else:
            self._unreported.pop(runner_id, None)

    def _step(self, runner_id: str, now: float, change: int) -> None:
        if runner_id in self._told:
            return self._count(runner_id, self._told[runner_id][0])
        steps = self._steps.setdefault(runner_id, deque())
        steps.append((now, change))
        self._unreported[runner_id] = self._unreported.get(runner_id, 0) + change
        if len(steps) > MAX_STEPS:
            (_, first), (at, second) = steps.popleft(), steps.popleft()
            steps.appendleft((at, first + second))
        return None
