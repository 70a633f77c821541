"""Prometheus metrics of what happens at a coordinator: how requests ended, answers that broke off and went on."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from chorus.core.events import (
    AttemptFailed,
    AttemptResumed,
    Event,
    EventKind,
    RequestFinished,
    RequestRefused,
)
from chorus.telemetry.histogram import BoundedLabel
from chorus.telemetry.metrics import error_reasons

_GAP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30)
_QUEUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class EventMetrics:
    """Counts events; `take` is a listener of the event board."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"chorus_{name}_total", documentation, labels, registry=registry)

        self._reason = BoundedLabel(error_reasons(), limit=0)
        self._finished = counter(
            "requests_finished", "Requests for which a runner was asked, by how they ended.", "outcome"
        )
        self._refused = counter("requests_refused", "Requests for which no runner was asked, by why.", "reason")
        self._breaks = counter(
            "generation_breaks", "Tries that failed when part of the answer had been delivered, by why.", "reason"
        )
        self._resumes = counter("generation_resumes", "Answers that another runner went on with, by why.", "reason")
        self._lost = counter("runners_lost", "Runners that left the directory.")
        self._gap = Histogram(
            "chorus_generation_resume_gap_seconds",
            "Time without a token until another runner went on with an answer.",
            buckets=_GAP_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "chorus_admission_wait_seconds",
            "Time that a request waited at the coordinator for its turn.",
            buckets=_QUEUE_BUCKETS,
            registry=registry,
        )

    def take(self, event: Event) -> None:
        """Something happened."""
        match event.detail:
            case RequestFinished() as ended:
                self._finished.labels(ended.outcome).inc()
                self._queue.observe(ended.queue_s)
            case RequestRefused() as refused:
                self._refused.labels(self._reason(refused.reason)).inc()
            case AttemptFailed(begun=True) as broken:
                self._breaks.labels(self._reason(broken.reason)).inc()
            case AttemptResumed() as resumed:
                self._resumes.labels(self._reason(resumed.reason)).inc()
                self._gap.observe(resumed.gap_s)
            case _ if event.kind is EventKind.RUNNER_LOST:
                self._lost.inc()
            case _:
                return
