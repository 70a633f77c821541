"""How requests fared: between `chorus.api.coordinator.v1` and `chorus.core.events.stats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from chorus.api.coordinator.v1 import stats_pb2 as pb
from chorus.core.events.sketch import Sketch
from chorus.core.events.stats import Figures, Report, busiest
from chorus.core.fleet.records import EngineKind
from chorus.wire.resources import decode_duration, encode_duration

MAX_NAMED = 2048
"""Models, and machines, that one answer tells of: so many take about a megabyte."""


def encode_report(report: Report) -> pb.GetStatsResponse:
    """Everything that was counted."""
    return pb.GetStatsResponse(
        window=encode_duration(report.window_s),
        total=_encode_figures(report.total),
        models=[_encode_named(*named) for named in busiest(report.models, MAX_NAMED)],
        nodes=[_encode_named(*named) for named in busiest(report.nodes, MAX_NAMED)],
    )


def decode_report(message: pb.GetStatsResponse) -> Report:
    """Everything that a coordinator counted."""
    return Report(
        window_s=decode_duration(message.window),
        total=_decode_figures(message.total),
        models={named.name: _decode_figures(named.figures) for named in message.models},
        nodes={named.name: _decode_figures(named.figures) for named in message.nodes},
    )


def _encode_named(name: str, figures: Figures) -> pb.NamedFigures:
    return pb.NamedFigures(name=name, figures=_encode_figures(figures))


def _encode_figures(figures: Figures) -> pb.Figures:
    return pb.Figures(
        completed_count=figures.completed,
        cancelled_count=figures.cancelled,
        failed=_encode_reasons(figures.failed),
        refused=_encode_reasons(figures.refused),
        failed_attempts=_encode_reasons(figures.failed_attempts),
        resumed_count=figures.resumed,
        local_count=figures.engines[EngineKind.LOCAL],
        remote_count=figures.engines[EngineKind.REMOTE],
        external_count=figures.engines[EngineKind.EXTERNAL],
        prompt_token_count=figures.prompt_tokens,
        output_token_count=figures.output_tokens,
        queue=_encode_sketch(figures.queue),
        first_token=_encode_sketch(figures.first_token),
        tokens_per_second=_encode_sketch(figures.tokens_per_second, rates=True),
    )


def _decode_figures(message: pb.Figures) -> Figures:
    engines = {
        EngineKind.LOCAL: message.local_count,
        EngineKind.REMOTE: message.remote_count,
        EngineKind.EXTERNAL: message.external_count,
    }
    return Figures(
        completed=message.completed_count,
        cancelled=message.cancelled_count,
        failed=_decode_reasons(message.failed),
        refused=_decode_reasons(message.refused),
        failed_attempts=_decode_reasons(message.failed_attempts),
        resumed=message.resumed_count,
        engines=Counter({kind: count for kind, count in engines.items() if count}),
        prompt_tokens=message.prompt_token_count,
        output_tokens=message.output_token_count,
        queue=_decode_sketch(message.queue),
        first_token=_decode_sketch(message.first_token),
        tokens_per_second=_decode_sketch(message.tokens_per_second),
    )


def _encode_reasons(reasons: Counter[str]) -> list[pb.ReasonCount]:
    return [pb.ReasonCount(reason=reason, count=count) for reason, count in sorted(reasons.items())]


def _decode_reasons(message: Iterable[pb.ReasonCount]) -> Counter[str]:
    return Counter({told.reason: told.count for told in message})


def _encode_sketch(sketch: Sketch, *, rates: bool = False) -> pb.Distribution:
    buckets = sorted(sketch.counts.items())
    return pb.Distribution(
        buckets=[bucket for bucket, _ in buckets],
        counts=[count for _, count in buckets],
        zero_count=sketch.zeros,
        sum=sketch.sum,
        p50=sketch.quantile(0.5),
        p95=sketch.quantile(0.05 if rates else 0.95),
        p99=sketch.quantile(0.01 if rates else 0.99),
    )


def _decode_sketch(message: pb.Distribution) -> Sketch:
    sketch = Sketch()
    sketch.counts = Counter(dict(zip(message.buckets, message.counts, strict=False)))
    sketch.zeros = message.zero_count
    sketch.sum = message.sum
    return sketch
