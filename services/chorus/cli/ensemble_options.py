"""The options with which `chorus ask` asks several models."""

from __future__ import annotations

from typing import Annotated

import typer

from chorus.client import EnsembleSpec, ensemble_spec
from chorus.core.ensemble import records
from chorus.core.ensemble.facets import FACETS

_PANEL = "Several models"

Strategy = Annotated[
    records.Strategy | None,
    typer.Option(
        "--strategy",
        help="How several models become one answer. Default with any option below: auto.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Members = Annotated[
    list[str] | None,
    typer.Option(
        "--member",
        metavar="MODEL[*SAMPLES]",
        help="A model that takes part; give it for each. Default: chosen by what the question needs.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Complexity = Annotated[
    records.Complexity | None,
    typer.Option(
        "--complexity",
        help="How hard the question is: it decides how many models think, and for how long. Default: estimated.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Judge = Annotated[
    str,
    typer.Option(
        "--judge",
        metavar="MODEL",
        help="The model that judges, composes or chairs. Default: the greatest there is.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Quorum = Annotated[
    int,
    typer.Option(
        "--quorum",
        min=0,
        max=32,
        help="Go on once so many have answered. Default: all, until the deadline, or until a vote is settled.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        "--deadline",
        metavar="SECONDS",
        min=0.1,
        help="How long members are waited for. Default: by the complexity.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        min=0.0,
        max=1.0,
        help="A cascade asks greater models while it is less confident than this. Default: 0.75.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Rounds = Annotated[
    int,
    typer.Option(
        "--rounds",
        min=0,
        max=4,
        help="How often drafts are written by refine. Default: once.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Facets = Annotated[
    str,
    typer.Option(
        "--facets",
        metavar="|".join(FACETS),
        help="Which sides members take in facets. Default: decision.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]


def ensemble_options(
    strategy: records.Strategy | None,
    members: list[str] | None,
    complexity: records.Complexity | None,
    judge: str,
    quorum: int,
    deadline_s: float | None,
    threshold: float | None,
    *,
    rounds: int,
    facet_set: str,
) -> EnsembleSpec | None:
    """What ensemble is asked for; None where no option asks for one. Raises BadParameter."""
    given = (strategy, members, complexity, judge, quorum, deadline_s, threshold, rounds, facet_set)
    if not any(option not in (None, "", 0, []) for option in given):
        return None
    if strategy is None and facet_set:
        strategy = records.Strategy.FACETS
    try:
        return ensemble_spec(
            strategy or records.Strategy.AUTO,
            tuple(members or ()),
            complexity=complexity,
            aggregator_model=judge,
            quorum=quorum,
            deadline_s=deadline_s,
            confidence_threshold=threshold,
            round_count=rounds,
            facet_set=facet_set,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
