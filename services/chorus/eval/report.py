"""What a run came to: a row for each strategy, paired comparisons, and a page with plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from chorus.eval.running import Outcome
from chorus.eval.statistics import Interval, calibration_error, clopper_pearson, paired_difference

_WIDTH, _BAR, _LABEL = 640, 22, 200
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
svg text { font: 12px system-ui, sans-serif }"""
_COLORS = ("#3b6ea5", "#c2702e", "#4f8a4c", "#8b5a9e", "#a34848", "#5f6b73", "#b39a2c", "#3f8f8f")


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy. `better` is how much better it is than the first one on the items that both answered."""

    name: str
    count: int
    errors: int
    score: Interval
    median_s: float
    p95_s: float
    tokens: float
    cost_micro_usd: int
    calibration_error: float | None
    better: Interval | None


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for each strategy, in the order in which they came; the first one is what others are compared with."""
    by_name = _by_name(outcomes)
    first = next(iter(by_name.values()), {})
    return [_row(name, told, None if told is first else first) for name, told in by_name.items()]


def families(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Interval]]:
    """Each family's share of right answers, by strategy; empty where items have no families."""
    scores: dict[str, dict[str, list[float]]] = {}
    for outcome in outcomes:
        if outcome.family:
            scores.setdefault(outcome.family, {}).setdefault(outcome.contender, []).append(outcome.score)
    return {
        family: {name: clopper_pearson(round(sum(own)), len(own)) for name, own in told.items()}
        for family, told in sorted(scores.items())
    }


def page(outcomes: Sequence[Outcome], *, title: str, notes: Sequence[str] = ()) -> str:
    """The report as one HTML file that needs nothing else."""
    found = rows(outcomes)
    colors = {row.name: _COLORS[place % len(_COLORS)] for place, row in enumerate(found)}
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(text)}</p>" for text in notes),
        _table(found),
        "<h2>Right answers</h2><p>Lines are 95% intervals.</p>",
        _bars([(row.name, row.score, colors[row.name]) for row in found]),
        "<h2>Quality and time</h2>",
        _scatter(found, colors),
    ]
    for family, told in families(outcomes).items():
        parts += [f"<h3>{escape(family)}</h3>", _bars([(name, score, colors[name]) for name, score in told.items()])]
    return "\n".join(parts) + "\n"


def _by_name(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Outcome]]:
    found: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.contender, {})[outcome.item_id] = outcome
    return found


def _row(name: str, told: Mapping[str, Outcome], first: Mapping[str, Outcome] | None) -> Row:
    own = list(told.values())
    answered = [outcome for outcome in own if not outcome.error]
    times = sorted(outcome.seconds for outcome in answered) or [0.0]
    sure = [outcome for outcome in answered if outcome.confidence is not None]
    shared = [item for item in told if first is not None and item in first]
    return Row(
        name=name,
        count=len(own),
        errors=len(own) - len(answered),
        score=clopper_pearson(round(sum(outcome.score for outcome in own)), len(own)),
        median_s=statistics.median(times),
        p95_s=times[min(len(times) - 1, int(0.95 * len(times)))],
        tokens=statistics.fmean(outcome.tokens for outcome in own),
        cost_micro_usd=sum(outcome.cost_micro_usd for outcome in own),
        calibration_error=calibration_error(
            [outcome.confidence or 0.0 for outcome in sure], [outcome.score > 0 for outcome in sure]
        )
        if sure
        else None,
        better=paired_difference([told[item].score for item in shared], [first[item].score for item in shared])
        if first is not None and shared
        else None,
    )


def cells(row: Row) -> tuple[str, ...]:
    """A row in words, under `HEADINGS`."""
    return (
        row.name,
        str(row.count),
        str(row.errors) if row.errors else "",
        str(row.score),
        ""
        if row.better is None
        else f"{100 * row.better.mean:+.1f} [{100 * row.better.low:+.1f}, {100 * row.better.high:+.1f}]",
        f"{row.median_s:.2f}",
        f"{row.p95_s:.2f}",
        f"{row.tokens:.0f}",
        f"{row.cost_micro_usd / 1e6:.4f}" if row.cost_micro_usd else "",
        "" if row.calibration_error is None else f"{row.calibration_error:.3f}",
    )


HEADINGS = ("strategy", "items", "failed", "right, %", "to the first", "median s", "p95 s", "tokens", "USD", "ECE")


def _table(found: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(name)}" for name in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells(row)) for row in found)
    return f"<table><tr>{head}{body}</table>"


def _bars(told: Sequence[tuple[str, Interval, str]]) -> str:
    def at(share: float) -> float:
        return _LABEL + share * (_WIDTH - _LABEL - 50)

    parts = [f'<svg width="{_WIDTH}" height="{_BAR * len(told) + 4}" role="img">']
    for place, (name, score, color) in enumerate(told):
        top = place * _BAR + 2
        middle = top + _BAR / 2 - 2
        wide = at(score.mean) - _LABEL
        parts += [
            f'<text x="{_LABEL - 8}" y="{middle + 4}" text-anchor="end">{escape(name[:30])}</text>',
            f'<rect x="{_LABEL}" y="{top}" width="{wide:.1f}" height="{_BAR - 5}" fill="{color}"/>',
            f'<line x1="{at(score.low):.1f}" x2="{at(score.high):.1f}" y1="{middle}" y2="{middle}" stroke="#222"/>',
            f'<text x="{at(score.high) + 6:.1f}" y="{middle + 4}">{100 * score.mean:.1f}</text>',
        ]
    return "".join([*parts, "</svg>"])


def _scatter(found: Sequence[Row], colors: Mapping[str, str]) -> str:
    height, left, bottom = 260, 50, 36
    longest = max([row.median_s for row in found] or [0.0]) * 1.15 or 1.0
    parts = [
        f'<svg width="{_WIDTH}" height="{height}" role="img">',
        f'<line x1="{left}" x2="{left}" y1="0" y2="{height - bottom}" stroke="#888"/>',
        f'<line x1="{left}" x2="{_WIDTH}" y1="{height - bottom}" y2="{height - bottom}" stroke="#888"/>',
        f'<text x="{_WIDTH / 2}" y="{height - 6}" text-anchor="middle">median seconds (0 to {longest:.2f})</text>',
        f'<text x="4" y="12">100%</text><text x="4" y="{height - bottom}">0%</text>',
    ]
    for row in found:
        x = left + row.median_s / longest * (_WIDTH - left - 160)
        y = (1.0 - row.score.mean) * (height - bottom - 10) + 10
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colors[row.name]}"/>'
            f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">{escape(row.name[:30])}</text>'
        )
    return "".join([*parts, "</svg>"])
