"""What requests cost, as messages."""

from __future__ import annotations

from chorus.api.coordinator.v1 import costs_pb2 as pb
from chorus.core.costs.budget import DAY_S, Books, Limits, Period, next_month
from chorus.core.costs.records import Asked, Entry, Grouping, Line, Report, Where
from chorus.core.errors import InvalidRequestError
from chorus.wire.resources import encode_duration

LINES_MAX = 1000
DAYS_MAX = 36_500

GROUPINGS: dict[Grouping, pb.CostGrouping.ValueType] = {
    grouping: pb.CostGrouping.Value(f"COST_GROUPING_{grouping.name}") for grouping in Grouping
}
_GROUPINGS_BACK = {value: grouping for grouping, value in GROUPINGS.items()}
_PERIODS = {period: pb.CostPeriod.Value(f"COST_PERIOD_{period.name}") for period in Period}
_PLACES = {where: pb.CostPlace.Value(f"COST_PLACE_{where.name}") for where in Where}
_PLACES_BACK = {value: where for where, value in _PLACES.items()}
_PERIODS_BACK = {value: period for period, value in _PERIODS.items()}


def encode_costs_request(asked: Asked) -> pb.GetCostsRequest:
    """What somebody wants to know."""
    return pb.GetCostsRequest(grouping=GROUPINGS[asked.grouping], days=asked.days, latest_count=asked.latest)


def decode_costs_request(message: pb.GetCostsRequest) -> Asked:
    """What somebody wants to know. Raises InvalidRequestError."""
    grouping = message.grouping or pb.COST_GROUPING_DAY
    if grouping not in _GROUPINGS_BACK:
        raise InvalidRequestError("grouping", f"{grouping} is no grouping that this version knows")
    if message.days > DAYS_MAX:
        raise InvalidRequestError("days", f"should be at most {DAYS_MAX}, not {message.days}")
    if message.latest_count > LINES_MAX:
        raise InvalidRequestError("latest_count", f"should be at most {LINES_MAX}, not {message.latest_count}")
    days = message.days if message.HasField("days") else None
    return Asked(_GROUPINGS_BACK[grouping], days, message.latest_count)


def encode_costs(report: Report) -> pb.GetCostsResponse:
    """A report."""
    return pb.GetCostsResponse(
        grouping=GROUPINGS[report.grouping],
        lines=[_encode_line(line) for line in report.lines[:LINES_MAX]],
        total=_encode_line(Line.total(report.lines)),
        budgets=_encode_budgets(report.limits, report.books, report.now),
        baseline_micro_usd=report.baseline,
        unpriced_models=report.unpriced,
        ledger_id=report.ledger,
        latest=[_encode_entry(entry) for entry in report.latest],
    )


def _encode_line(line: Line) -> pb.CostLine:
    return pb.CostLine(
        name=line.name,
        local_request_count=line.local,
        external_request_count=line.external,
        cached_request_count=line.cached,
        prompt_token_count=line.prompt_tokens,
        completion_token_count=line.output_tokens,
        spent_micro_usd=line.spent,
        avoided_micro_usd=line.avoided,
    )


def decode_line(message: pb.CostLine) -> Line:
    """Sums of requests."""
    return Line(
        message.name,
        message.local_request_count,
        message.external_request_count,
        message.cached_request_count,
        message.prompt_token_count,
        message.completion_token_count,
        message.spent_micro_usd,
        message.avoided_micro_usd,
    )


def _encode_entry(entry: Entry) -> pb.CostEntry:
    message = pb.CostEntry(
        request_id=entry.request_id,
        caller=entry.caller,
        model=entry.model,
        place=_PLACES[entry.where],
        completed=entry.completed,
        prompt_token_count=entry.prompt_tokens,
        completion_token_count=entry.output_tokens,
        spent_micro_usd=entry.spent,
        avoided_micro_usd=entry.avoided,
    )
    message.at.FromNanoseconds(round(entry.at * 1e9))
    return message


def decode_entry(message: pb.CostEntry) -> Entry:
    """One request; a place that this version doesn't know counts as a paid provider, the most careful reading."""
    return Entry(
        at=message.at.ToNanoseconds() / 1e9,
        request_id=message.request_id,
        caller=message.caller,
        model=message.model,
        where=_PLACES_BACK.get(message.place, Where.EXTERNAL),
        completed=message.completed,
        prompt_tokens=message.prompt_token_count,
        output_tokens=message.completion_token_count,
        spent=message.spent_micro_usd,
        avoided=message.avoided_micro_usd,
    )


def _encode_budgets(limits: Limits, books: Books, now: float) -> list[pb.CostBudget]:
    found = (
        (Period.DAY, limits.day, books.spent_today, books.reserved_today, books.day + 1),
        (Period.MONTH, limits.month, books.spent_this_month, books.reserved_this_month, next_month(books.day)),
    )
    return [
        pb.CostBudget(
            period=_PERIODS[period],
            limit_micro_usd=limit,
            spent_micro_usd=spent,
            reserved_micro_usd=reserved,
            begins_anew_in=encode_duration(max(0.0, anew * DAY_S - now)),
        )
        for period, limit, spent, reserved, anew in found
        if limit is not None
    ]


def decode_period(value: pb.CostPeriod.ValueType) -> Period | None:
    """What a limit is for; None for what this version doesn't know."""
    return _PERIODS_BACK.get(value)
