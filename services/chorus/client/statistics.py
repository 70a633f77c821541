"""How the mesh's requests fared lately: every coordinator's figures, added up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chorus.api.coordinator.v1 import stats_pb2
from chorus.client.coordinators import Coordinators
from chorus.core.errors import UnavailableError
from chorus.core.events.stats import Report
from chorus.wire.stats import decode_report


@dataclass(frozen=True, slots=True)
class MeshStats:
    """The figures of all coordinators that answered together, and why the others did not, by name."""

    report: Report
    asked: tuple[str, ...]
    missing: Mapping[str, str]


async def stats_of(coordinators: Sequence[tuple[str, Coordinators]]) -> MeshStats:
    """Asks everybody at once. Raises UnavailableError where nobody answers, and what asking again would not help."""

    async def ask(coordinator: Coordinators) -> Report | UnavailableError:
        try:
            answer: stats_pb2.GetStatsResponse = await coordinator.single("GetStats", stats_pb2.GetStatsRequest())
        except UnavailableError as error:
            return error
        return decode_report(answer)

    answers = await asyncio.gather(*(ask(coordinator) for _, coordinator in coordinators))
    whole, missing = Report(), {}
    for (name, _), answer in zip(coordinators, answers, strict=True):
        if isinstance(answer, UnavailableError):
            missing[name] = answer
        else:
            whole.merge(answer)
    if len(missing) == len(coordinators):
        raise next(iter(missing.values()))
    names = tuple(name for name, _ in coordinators)
    return MeshStats(whole, names, {name: error.message for name, error in missing.items()})
