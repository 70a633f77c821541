"""Ensembles in records: what is asked of one, what its members answered, and how it fared. Times are seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from chorus.core.fleet.records import Tier
from chorus.core.generation import FinishReason


class Strategy(StrEnum):
    """A way of making one answer from several generations."""

    ROUTE = "route"
    RACE = "race"
    VOTE = "vote"
    JUDGE = "judge"
    REFINE = "refine"
    CASCADE = "cascade"
    COUNCIL = "council"
    FACETS = "facets"
    AUTO = "auto"


class Complexity(StrEnum):
    """How hard a question is; in order."""

    SIMPLE = "simple"
    MEDIUM = "medium"
    COMPLEX = "complex"
    EXPERT = "expert"


@dataclass(frozen=True, slots=True)
class Member:
    """One model's part in an ensemble: one generation.

    `instructions` come before the conversation. `temperature` None: as the caller asked. `draw` tells samples apart,
    of one model that is told the same: the seed of the n-th is n more than the caller's. `depth` says of which of the
    simpler sets it is, to which an ensemble has fallen back; 0 is the first choice.
    """

    member_id: str
    model: str
    instructions: str = ""
    temperature: float | None = None
    draw: int = 0
    tier: Tier | None = None
    depth: int = 0


@dataclass(frozen=True, slots=True)
class EnsembleSpec:
    """What ensemble a caller asks for; each field is that of the proto's EnsembleSpec. `members` are not expanded."""

    strategy: Strategy = Strategy.AUTO
    members: tuple[MemberSpec, ...] = ()
    complexity: Complexity | None = None
    aggregator_model: str = ""
    quorum: int = 0
    deadline_s: float | None = None
    confidence_threshold: float | None = None
    final_only: bool = False
    round_count: int = 0
    facet_set: str = ""


@dataclass(frozen=True, slots=True)
class MemberSpec:
    """A model and how many samples of it; `member_id` empty: made from the model's name."""

    model: str
    sample_count: int = 1
    member_id: str = ""
    instructions: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one generation of an ensemble came to.

    `logprobs` are those of its tokens, natural, before sampling; None where its engine tells none. `confidence`, 0 to
    1, is how likely it is right by itself. `calls`: it has tools called, with or without a text.
    """

    part_id: str
    text: str
    reason: FinishReason = FinishReason.END
    logprobs: tuple[float, ...] | None = None
    tokens: int = 0
    model: str = ""
    confidence: float = 0.0
    calls: bool = False

    @property
    def is_blank(self) -> bool:
        """Whether it says nothing: as good as no answer, however sure of its end its model was."""
        return not self.calls and (not self.text or self.text.isspace())


class MemberState(StrEnum):
    """How a member fared."""

    ANSWERED = "answered"
    LATE = "late"  # not done when the quorum or the deadline came
    FAILED = "failed"
    SKIPPED = (
        "skipped"  # never asked: the answer was good enough without, or its turn hadn't come by the quorum or deadline
    )
    UNNEEDED = "unneeded"  # asked, and cancelled: the answer was good enough, or nothing could change it any more


@dataclass(frozen=True, slots=True)
class MemberOutcome:
    """How a member fared. `took_s` is from its being asked to its end, or until it was not waited for any more."""

    member_id: str
    state: MemberState
    model: str
    node_id: str = ""
    runner_id: str = ""
    agrees_with: tuple[str, ...] = ()
    confidence: float = 0.0
    reason: str = ""
    took_s: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an ensemble fared. `answered_by` is the member whose answer it is; empty where one was composed."""

    strategy: Strategy
    agreement: float
    coherence: float
    confidence: float
    members: tuple[MemberOutcome, ...]
    elapsed_s: float
    complexity: Complexity | None = None
    answered_by: str = ""
    fallback_count: int = 0
    cost_micro_usd: int = 0

    def count(self, state: MemberState) -> int:
        """How many members fared so."""
        return sum(outcome.state is state for outcome in self.members)

    @property
    def asked(self) -> int:
        """How many members were asked."""
        return len(self.members) - self.count(MemberState.SKIPPED)


@dataclass(frozen=True, slots=True)
class Level:
    """What a complexity is given: how many members, of which tiers, and how long they are waited for."""

    members: int
    tiers: tuple[Tier, ...]
    deadline_s: float


PROFILE: Mapping[Complexity, Level] = {
    Complexity.SIMPLE: Level(3, (Tier.MICRO, Tier.SMALL), 30.0),
    Complexity.MEDIUM: Level(5, (Tier.MICRO, Tier.SMALL, Tier.FULL), 45.0),
    Complexity.COMPLEX: Level(8, (Tier.SMALL, Tier.FULL, Tier.LARGE), 90.0),
    Complexity.EXPERT: Level(12, (Tier.FULL, Tier.LARGE), 120.0),
}
"""As shipped."""
