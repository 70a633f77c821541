"""What each complexity of a question is given where several models answer, and other keys of ensembles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from chorus.config.section import Section
from chorus.core.ensemble.records import PROFILE, Complexity, Level
from chorus.core.ensemble.steps import DEFAULT_THRESHOLD
from chorus.core.fleet.records import Tier


def _tiers(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in list(Tier)]:
        raise ValueError(f"{unknown[0][:40]!r} is no tier; there are {', '.join(Tier)}")
    return ",".join(dict.fromkeys(names))


Tiers = Annotated[str, AfterValidator(_tiers)]


def _members(complexity: Complexity) -> int:
    description = f"How many models, or samples of fewer models, a question taken as {complexity} is given."
    count: int = Field(default=PROFILE[complexity].members, ge=1, le=32, description=description)
    return count


def _of_tiers(complexity: Complexity) -> str:
    tiers: str = Field(
        default=",".join(PROFILE[complexity].tiers),
        description=f"Tiers of those models, where the mesh has any of them: some of {', '.join(Tier)}.",
    )
    return tiers


def _deadline(complexity: Complexity) -> float:
    description = "Seconds for which they are waited for in each round; the caller may say otherwise."
    seconds: float = Field(default=PROFILE[complexity].deadline_s, gt=0, le=86_400, description=description)
    return seconds


class EnsembleSettings(Section):
    """Several models for one answer: how many, of which tiers, and for how long, by how hard the question is."""

    simple_members: int = _members(Complexity.SIMPLE)
    simple_tiers: Tiers = _of_tiers(Complexity.SIMPLE)
    simple_deadline_s: float = _deadline(Complexity.SIMPLE)
    medium_members: int = _members(Complexity.MEDIUM)
    medium_tiers: Tiers = _of_tiers(Complexity.MEDIUM)
    medium_deadline_s: float = _deadline(Complexity.MEDIUM)
    complex_members: int = _members(Complexity.COMPLEX)
    complex_tiers: Tiers = _of_tiers(Complexity.COMPLEX)
    complex_deadline_s: float = _deadline(Complexity.COMPLEX)
    expert_members: int = _members(Complexity.EXPERT)
    expert_tiers: Tiers = _of_tiers(Complexity.EXPERT)
    expert_deadline_s: float = _deadline(Complexity.EXPERT)
    confidence_threshold: float = Field(
        default=DEFAULT_THRESHOLD, ge=0, le=1, description="A cascade asks greater models while confidence is below."
    )

    learning: Literal["off", "watch", "on"] = Field(
        default="off",
        description="Learn from how answers fare and are rated which models and strategies suit: off, watch (learn, "
        "and do nothing with it), on (auto goes by it). Measured so far, auto is better without.",
    )

    @property
    def profile(self) -> Mapping[Complexity, Level]:
        """What each complexity is given."""
        return {
            complexity: Level(
                getattr(self, f"{complexity}_members"),
                tuple(Tier(name) for name in getattr(self, f"{complexity}_tiers").split(",")),
                getattr(self, f"{complexity}_deadline_s"),
            )
            for complexity in Complexity
        }
