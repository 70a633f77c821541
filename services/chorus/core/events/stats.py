"""How requests fared lately, by model and by machine: counted from events, over a window that slides in steps.

The window is made of slices; the oldest is dropped as a whole. So a request costs a few additions, and memory depends
on how many models and machines had something to do, not on how many requests there were.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from chorus.core.events.records import (
    AttemptFailed,
    AttemptResumed,
    Event,
    Outcome,
    RequestFinished,
    RequestRefused,
)
from chorus.core.events.sketch import Sketch
from chorus.core.fleet.records import EngineKind

WINDOW_S = 300.0
SLICE_S = 15.0
# Names told apart in one slice. Callers may make up models; a mesh has as many machines as it has.
MAX_MODELS = 256
MAX_NODES = 2048
OTHERS = "(others)"


@dataclass(slots=True)
class Figures:
    """Counts and distributions of the requests of one model or machine, or of all. Queue and first token in seconds."""

    completed: int = 0
    cancelled: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failed_attempts: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    engines: Counter[EngineKind] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue: Sketch = field(default_factory=Sketch)
    first_token: Sketch = field(default_factory=Sketch)
    tokens_per_second: Sketch = field(default_factory=Sketch)

    @property
    def requests(self) -> int:
        """Requests that have ended, however they did."""
        return self.completed + self.cancelled + self.failed.total() + self.refused.total()

    @property
    def local_share(self) -> float | None:
        """What share of the completed requests this mesh's own engines answered; None where there was none."""
        answered = self.engines.total()
        return self.engines[EngineKind.LOCAL] / answered if answered else None

    def take(self, event: Event) -> None:
        """Counts what happened."""
        match event.detail:
            case RequestFinished() as ended:
                self._take_finished(ended)
            case RequestRefused() as refused:
                self.refused[refused.reason] += 1
            case AttemptFailed() as failed:
                self.failed_attempts[failed.reason] += 1
            case AttemptResumed():
                self.resumed += 1
            case _:
                return

    def merge(self, other: Figures) -> None:
        """Adds another one's."""
        self.completed += other.completed
        self.cancelled += other.cancelled
        self.failed.update(other.failed)
        self.refused.update(other.refused)
        self.failed_attempts.update(other.failed_attempts)
        self.resumed += other.resumed
        self.engines.update(other.engines)
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        self.queue.merge(other.queue)
        self.first_token.merge(other.first_token)
        self.tokens_per_second.merge(other.tokens_per_second)

    def _take_finished(self, ended: RequestFinished) -> None:
        match ended.outcome:
            case Outcome.COMPLETED:
                self.completed += 1
                self.engines[ended.engine] += 1
            case Outcome.CANCELLED:
                self.cancelled += 1
            case Outcome.FAILED:
                self.failed[ended.reason] += 1
        self.prompt_tokens += ended.prompt_tokens
        self.output_tokens += ended.output_tokens
        self.queue.add(ended.queue_s)
        if ended.first_token_s is not None:
            self.first_token.add(ended.first_token_s)
        if ended.tokens_per_second:
            self.tokens_per_second.add(ended.tokens_per_second)


@dataclass(slots=True)
class Report:
    """Figures of everything, by model and by machine, over the last `window_s` seconds."""

    window_s: float = 0.0
    total: Figures = field(default_factory=Figures)
    models: dict[str, Figures] = field(default_factory=dict)
    nodes: dict[str, Figures] = field(default_factory=dict)

    def merge(self, other: Report) -> None:
        """Adds another coordinator's; the window is the longer one of both."""
        self.window_s = max(self.window_s, other.window_s)
        self.total.merge(other.total)
        for mine, theirs in ((self.models, other.models), (self.nodes, other.nodes)):
            for name, figures in theirs.items():
                mine.setdefault(name, Figures()).merge(figures)


@dataclass(slots=True)
class _Slice:
    began: float
    report: Report = field(default_factory=Report)


class Stats:
    """The figures of one coordinator. `now` is monotonic seconds, `began` when it started to count."""

    def __init__(self, began: float, *, window_s: float = WINDOW_S, slice_s: float = SLICE_S) -> None:
        self._began = began
        self._window_s = window_s
        self._slice_s = slice_s
        self._slices: deque[_Slice] = deque()

    def take(self, event: Event, now: float) -> None:
        """Counts what happened; most kinds of events are nothing to count."""
        if not isinstance(event.detail, RequestFinished | RequestRefused | AttemptFailed | AttemptResumed):
            return
        report = self._slice(now).report
        report.total.take(event)
        if event.subject.model:
            _of(report.models, event.subject.model, MAX_MODELS).take(event)
        if event.subject.node_id:
            _of(report.nodes, event.subject.node_id, MAX_NODES).take(event)

    def report(self, now: float) -> Report:
        """What was counted within the window, a slice more or less."""
        self._drop_old(now)
        whole = Report()
        for one in self._slices:
            whole.merge(one.report)
        whole.window_s = min(self._window_s, max(0.0, now - self._began))
        return whole

    def _slice(self, now: float) -> _Slice:
        if not self._slices or now >= self._slices[-1].began + self._slice_s:
            self._drop_old(now)
            self._slices.append(_Slice(now))
        return self._slices[-1]

    def _drop_old(self, now: float) -> None:
        while self._slices and self._slices[0].began <= now - self._window_s:
            self._slices.popleft()


def busiest(figures: Mapping[str, Figures], count: int) -> Iterable[tuple[str, Figures]]:
    """At most `count` of them, those with most requests or failed tries, by name."""
    chosen = sorted(figures, key=lambda name: -(figures[name].requests + figures[name].failed_attempts.total()))
    return [(name, figures[name]) for name in sorted(chosen[:count])]


def _of(figures: dict[str, Figures], name: str, most: int) -> Figures:
    found = figures.get(name)
    if found is None:
        found = figures.setdefault(name if len(figures) < most else OTHERS, Figures())
    return found
