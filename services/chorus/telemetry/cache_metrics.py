"""What a coordinator's answer cache has done, for Prometheus and for whoever asks the coordinator."""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter


class CacheMetrics:
    """Counts; `outcomes` are those of the wire's CacheOutcome, by name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.outcomes: Tally[str] = Tally()
        self.explored: Tally[bool] = Tally()
        self.saved_tokens = 0
        self._requests = Counter(
            "chorus_cache_requests_total",
            "Requests that had to do with the answer cache, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        self._explored = Counter(
            "chorus_cache_explored_total",
            "Would-be semantic hits that were generated anyway, by whether the two answers were alike.",
            ["alike"],
            registry=registry,
        )
        self._saved = Counter(
            "chorus_cache_saved_tokens_total", "Tokens that nobody had to generate again.", registry=registry
        )

    def request(self, outcome: str, saved_tokens: int = 0) -> None:
        """A request's outcome is certain."""
        self.outcomes[outcome] += 1
        self.saved_tokens += saved_tokens
        self._requests.labels(outcome).inc()
        self._saved.inc(saved_tokens)

    def compared(self, *, alike: bool) -> None:
        """A would-be hit was compared with a new answer."""
        self.explored[alike] += 1
        self._explored.labels(str(alike).lower()).inc()
