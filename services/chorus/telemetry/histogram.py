"""A histogram that takes many observations at once, and labels that cannot grow without bound."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

UNKNOWN = "unknown"


class BoundedLabel:
    """Lets at most `limit` values through, those in `known` and then the first that come; others become `unknown`.

    A label whose values come from outside (methods, models, reasons) would otherwise let a caller fill the memory.
    """

    def __init__(self, known: Iterable[str] = (), *, limit: int = 64) -> None:
        self._values = {value: value for value in known}
        self._limit = max(limit, len(self._values))
        self._lock = threading.Lock()

    def __call__(self, value: str) -> str:
        """Returns the label for `value`."""
        kept = self._values.get(value)
        if kept is not None:
            return kept
        with self._lock:
            if not value or len(value) > 200 or len(self._values) >= self._limit:
                return UNKNOWN
            return self._values.setdefault(value, value)


class HistogramCell:
    """The counts for one value of the label."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe_many(self, values: Iterable[float]) -> None:
        """Counts `values` under one lock."""
        bounds, counts = self._bounds, self._counts
        with self._lock:
            for value in values:
                counts[bisect_left(bounds, value)] += 1
                self._sum += value

    def snapshot(self) -> tuple[list[int], float]:
        """Returns the counts of each bucket by itself, and the sum of all values."""
        with self._lock:
            return list(self._counts), self._sum


class BatchHistogram(Collector):
    """A Prometheus histogram with one label, for values that come in batches: one lock for all of them.

    prometheus_client's own takes two locks and walks the buckets for each value, which is felt at thousands of tokens a
    second.
    """

    def __init__(
        self, name: str, documentation: str, label: str, buckets: Sequence[float], *, registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._label = label
        self._bounds = tuple(sorted(buckets))
        self._cells: dict[str, HistogramCell] = {}
        registry.register(self)

    def cell(self, value: str) -> HistogramCell:
        """Returns the counts for one value of the label; keep it where observations are frequent."""
        return self._cells.setdefault(value, HistogramCell(self._bounds))

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Tells the registry this metric's name, so that no other can take it."""
        yield HistogramMetricFamily(self._name, self._documentation, labels=[self._label])

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Called by the registry at every scrape."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label])
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        for value, cell in list(self._cells.items()):
            counts, total = cell.snapshot()
            running = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip(bounds, counts, strict=True):
                running += count
                buckets.append((bound, running))
            family.add_metric([value], buckets, total)
        yield family
