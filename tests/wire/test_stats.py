"""Figures over the wire: what goes in comes out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from chorus.api.coordinator.v1 import stats_pb2
from chorus.core.events.sketch import Sketch
from chorus.core.events.stats import Figures, Report
from chorus.core.fleet.records import EngineKind
from chorus.wire.stats import decode_report, encode_report
from tests.wire.strategies import name, uint32


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    sketch = Sketch()
    for value in draw(st.lists(st.floats(0, 1e6), max_size=4)):
        sketch.add(value)
    return sketch


reasons = st.dictionaries(name, st.integers(1, 99), max_size=2).map(Counter)
figures = st.builds(
    Figures,
    completed=uint32,
    cancelled=uint32,
    failed=reasons,
    refused=reasons,
    failed_attempts=reasons,
    resumed=uint32,
    engines=st.dictionaries(st.sampled_from(EngineKind), st.integers(1, 99)).map(Counter),
    prompt_tokens=uint32,
    output_tokens=uint32,
    queue=sketches(),
    first_token=sketches(),
    tokens_per_second=sketches(),
)
named = st.dictionaries(name, figures, max_size=2)


def plain(report: Report) -> list[object]:
    """What can be compared of a report."""
    found: list[object] = [report.window_s]
    for key, one in [("", report.total), *sorted(report.models.items()), *sorted(report.nodes.items())]:
        values = (getattr(one, field) for field in Figures.__dataclass_fields__)
        found.append((key, *((dict(v.counts), v.zeros, v.sum) if isinstance(v, Sketch) else v for v in values)))
    return found


@given(st.builds(Report, st.integers(0, 600).map(float), figures, named, named))
def test_a_report(report: Report) -> None:
    message = stats_pb2.GetStatsResponse.FromString(encode_report(report).SerializeToString())
    assert plain(decode_report(message)) == plain(report)
    assert message.total.first_token.p95 == report.total.first_token.quantile(0.95)
    assert message.total.tokens_per_second.p99 == report.total.tokens_per_second.quantile(0.01)
