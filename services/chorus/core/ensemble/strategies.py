"""The strategies there are, by name."""

from __future__ import annotations

from collections.abc import Mapping

from chorus.core.ensemble.cascade import cascade
from chorus.core.ensemble.council import council
from chorus.core.ensemble.facets import facets
from chorus.core.ensemble.judge import judge
from chorus.core.ensemble.race import race
from chorus.core.ensemble.records import Strategy
from chorus.core.ensemble.refine import refine
from chorus.core.ensemble.route import route
from chorus.core.ensemble.steps import StrategySteps
from chorus.core.ensemble.vote import vote

STRATEGIES: Mapping[Strategy, StrategySteps] = {
    Strategy.ROUTE: route,
    Strategy.RACE: race,
    Strategy.VOTE: vote,
    Strategy.JUDGE: judge,
    Strategy.REFINE: refine,
    Strategy.CASCADE: cascade,
    Strategy.COUNCIL: council,
    Strategy.FACETS: facets,
}
