"""The strategies there are, by name."""

from __future__ import annotations

from collections.abc import Mapping

from chorus.core.ensemble.race import race
from chorus.core.ensemble.records import Strategy
from chorus.core.ensemble.route import route
from chorus.core.ensemble.steps import StrategySteps
from chorus.core.ensemble.vote import vote

STRATEGIES: Mapping[Strategy, StrategySteps] = {
    Strategy.ROUTE: route,
    Strategy.RACE: race,
    Strategy.VOTE: vote,
}
