"""What a mesh's requests cost, by the ledgers of its coordinators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chorus.api.coordinator.v1 import costs_pb2
from chorus.client.caching import of_each
from chorus.client.coordinators import Coordinators
from chorus.core.costs.budget import Period
from chorus.core.costs.records import Asked, Entry, Grouping, Line
from chorus.wire.costs import decode_entry, decode_line, decode_period, encode_costs_request
from chorus.wire.resources import decode_duration


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit for paid providers, and how it stands, in micro USD. `coordinators` are those that hold it together."""

    coordinators: tuple[str, ...]
    period: Period
    limit: int
    spent: int
    reserved: int
    anew_in_s: float


@dataclass(frozen=True, slots=True)
class MeshCosts:
    """What requests cost, those of all ledgers together; money is micro USD.

    `lines` are by `grouping`, `total` is of all. `budgets` are each ledger's own. `baseline` is what a request is taken
    to cost elsewhere (the least that a coordinator is configured with), None where no coordinator is. `unpriced` are
    models of paid providers that seem to cost nothing, since nobody has said what they do. `missing` says why others
    did not answer.
    """

    grouping: Grouping
    lines: tuple[Line, ...]
    total: Line
    budgets: tuple[Budget, ...]
    baseline: int | None
    unpriced: tuple[str, ...]
    latest: tuple[Entry, ...]
    missing: Mapping[str, str]


async def costs_of(coordinators: Sequence[tuple[str, Coordinators]], asked: Asked) -> MeshCosts:
    """Asks everybody at once. Raises UnavailableError where nobody answers."""
    request = encode_costs_request(asked)

    async def ask(coordinator: Coordinators) -> costs_pb2.GetCostsResponse:
        answer: costs_pb2.GetCostsResponse = await coordinator.single("GetCosts", request)
        return answer

    found, missing = await of_each(coordinators, [ask(coordinator) for _, coordinator in coordinators])
    ledgers: dict[str, costs_pb2.GetCostsResponse] = {}
    sharing: dict[str, list[str]] = {}
    for name, answer in found.items():
        ledgers[answer.ledger_id] = answer
        sharing.setdefault(answer.ledger_id, []).append(name)
    baselines = [one.baseline_micro_usd for one in found.values() if one.HasField("baseline_micro_usd")]
    latest = [decode_entry(entry) for one in ledgers.values() for entry in one.latest]
    return MeshCosts(
        grouping=asked.grouping,
        lines=_together([decode_line(line) for one in ledgers.values() for line in one.lines], asked.grouping),
        total=Line.total(decode_line(one.total) for one in ledgers.values()),
        budgets=tuple(
            Budget(
                tuple(sharing[ledger]),
                period,
                budget.limit_micro_usd,
                budget.spent_micro_usd,
                budget.reserved_micro_usd,
                decode_duration(budget.begins_anew_in),
            )
            for ledger, one in ledgers.items()
            for budget in one.budgets
            if (period := decode_period(budget.period)) is not None
        ),
        baseline=min(baselines, default=None),
        unpriced=tuple(sorted({model for one in found.values() for model in one.unpriced_models})),
        latest=tuple(sorted(latest, key=lambda entry: -entry.at)[: asked.latest]),
        missing=missing,
    )


def _together(lines: Sequence[Line], grouping: Grouping) -> tuple[Line, ...]:
    """Lines of one name added up, in the order in which a ledger has them."""
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        by_name.setdefault(line.name, []).append(line)
    sums = [Line.total(own, name) for name, own in by_name.items()]
    if grouping in (Grouping.DAY, Grouping.MONTH):
        return tuple(sorted(sums, key=lambda line: line.name, reverse=True))
    return tuple(sorted(sums, key=lambda line: (-line.spent, -line.requests, line.name)))
