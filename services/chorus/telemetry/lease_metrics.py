"""How old each runner's lease is, as a scrape finds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from chorus.core.fleet.records import RunnerState


class LeaseMetrics(Collector):
    """The leases of one registry. Ages are computed at the scrape, by `clock`; at most `limit` runners are told apart.

    The times given as `now` are of that clock. Any thread may call.
    """

    def __init__(
        self, registry: CollectorRegistry, *, clock: Callable[[], float] = time.monotonic, limit: int = 1024
    ) -> None:
        self._clock = clock
        self._limit = limit
        self._lock = threading.Lock()
        self._leases: dict[str, tuple[RunnerState, float]] = {}
        self._registrations = Counter(
            "chorus_registry_registrations_total", "Leases granted to runners that had none.", registry=registry
        )
        self._expirations = Counter(
            "chorus_registry_lease_expirations_total", "Leases that lapsed without a word.", registry=registry
        )
        registry.register(self)

    def registered(self) -> None:
        """A runner that had no lease got one."""
        self._registrations.inc()

    def heard(self, runner_id: str, state: RunnerState, now: float) -> None:
        """A runner gave a sign of life."""
        with self._lock:
            self._leases[runner_id] = (state, now)

    def gone(self, runner_id: str, *, expired: bool) -> None:
        """A runner's lease has ended: it lapsed, or the runner said goodbye."""
        with self._lock:
            self._leases.pop(runner_id, None)
        if expired:
            self._expirations.inc()

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Tells the registry the names of these metrics, so that no other can take them."""
        yield from self._families()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Called by the registry at every scrape."""
        age, runners = self._families()
        counts = dict.fromkeys(RunnerState, 0)
        with self._lock:
            leases = list(self._leases.items())
        now = self._clock()
        for number, (runner_id, (state, heard_at)) in enumerate(leases):
            counts[state] += 1
            if number < self._limit:
                age.add_metric([runner_id], max(0.0, now - heard_at))
        for state, count in counts.items():
            runners.add_metric([state.value], count)
        yield from (age, runners)

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(
                "chorus_registry_lease_age_seconds", "Time since a runner's last sign of life.", labels=["runner"]
            ),
            GaugeMetricFamily("chorus_registry_runners", "Runners that hold a lease, by state.", labels=["state"]),
        )
