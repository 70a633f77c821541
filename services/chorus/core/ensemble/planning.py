"""From what a caller asks for and what the mesh has to what an ensemble is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from chorus.core.ensemble.auto import choose_strategy, weighed_members
from chorus.core.ensemble.choosing import Offer, by_size, choose_aggregator, choose_members, expanded
from chorus.core.ensemble.complexity import estimate_complexity
from chorus.core.ensemble.facets import facet_instructions
from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.prompts import question_of
from chorus.core.ensemble.records import PROFILE, Complexity, EnsembleSpec, Level, Member, Strategy
from chorus.core.ensemble.steps import DEFAULT_THRESHOLD, SIDE_MARK, Measures, Task
from chorus.core.errors import InvalidRequestError
from chorus.core.generation import GenerationRequest, TokenPrompt

MAX_MEMBERS = 32
# Those that ask a model about the question's text.
_READS_THE_QUESTION = {Strategy.JUDGE, Strategy.REFINE, Strategy.COUNCIL, Strategy.FACETS}


@dataclass(frozen=True, slots=True)
class Policy:
    """What a coordinator goes by: what each complexity is given, the cascade's threshold, and measures of answers."""

    profile: Mapping[Complexity, Level] = field(default_factory=lambda: PROFILE)
    threshold: float = DEFAULT_THRESHOLD
    measures: Measures = field(default_factory=Measures)


def plan(spec: EnsembleSpec, request: GenerationRequest, available: Sequence[Offer], policy: Policy) -> Task:
    """What to do. `available` is what the mesh has for the request (`choosing.offers`).

    Raises InvalidRequestError, which names the field, where what is asked for can't be.
    """
    _check(spec, request)
    complexity = spec.complexity or estimate_complexity(request)
    level = policy.profile[complexity]
    if spec.members:
        members = expanded(spec.members, available)
    else:
        members = choose_members(request, available, level) or (Member("default", request.model),)
    strategy, learned = spec.strategy, None
    if strategy is Strategy.AUTO:
        strategy = choose_strategy(request, complexity, len(members))
        if strategy is Strategy.VOTE:
            members, learned = weighed_members(members), LEARNED
    if any(member.member_id.startswith(SIDE_MARK) for member in members):
        raise InvalidRequestError("ensemble.members", f"must have no ids that begin with {SIDE_MARK}: it marks judges")
    if strategy in _READS_THE_QUESTION and not question_of(request.prompt):
        raise InvalidRequestError("input", f"has no text that {strategy} could show to a model; send text")
    if strategy is Strategy.CASCADE:
        members = by_size(members, available)
    if strategy is Strategy.FACETS:
        members = facet_instructions(members, spec.facet_set)
    if len({member.member_id for member in members}) < len(members):
        problem = "have samples or sides whose ids are those of other members; rename them"
        raise InvalidRequestError("ensemble.members", problem)
    simpler = () if spec.members else _simpler(request, available, policy, complexity, strategy, spec)
    return Task(
        request=request,
        strategy=strategy,
        members=members,
        aggregator_model=spec.aggregator_model or choose_aggregator(available, members),
        simpler=tuple(other for other in simpler if other != members),
        quorum=spec.quorum,
        deadline_s=level.deadline_s if spec.deadline_s is None else spec.deadline_s,
        threshold=policy.threshold if spec.confidence_threshold is None else spec.confidence_threshold,
        round_count=spec.round_count or 1,
        complexity=complexity,
        with_logprobs=frozenset(name for offer in available if offer.tells_logprobs for name in offer.names),
        without_chat=frozenset(name for offer in available if not offer.chats for name in offer.names),
        measures=policy.measures,
        learned=learned,
    )


def _simpler(
    request: GenerationRequest,
    available: Sequence[Offer],
    policy: Policy,
    complexity: Complexity,
    strategy: Strategy,
    spec: EnsembleSpec,
) -> tuple[tuple[Member, ...], ...]:
    """The sets of the simpler levels, the next one first; a single model at the end."""
    order = list(Complexity)
    levels = [policy.profile[one] for one in reversed(order[: order.index(complexity)])]
    alone = replace(policy.profile[order[0]], members=1)
    sets = [choose_members(request, available, level) for level in (*levels, alone)]
    if strategy is Strategy.CASCADE:
        sets = [by_size(members, available) for members in sets]
    if strategy is Strategy.FACETS:
        sets = [facet_instructions(members, spec.facet_set) for members in sets]
    return tuple(dict.fromkeys(members for members in sets if members))


def _check(spec: EnsembleSpec, request: GenerationRequest) -> None:
    count = sum(member.sample_count for member in spec.members)
    if count > MAX_MEMBERS:
        raise InvalidRequestError(
            "ensemble.members", f"are {count} with their samples; at most {MAX_MEMBERS} are taken"
        )
    if request.choice_count > 1:
        raise InvalidRequestError("choice_count", "must be 1 with an ensemble, which has one answer; ask for samples")
    if request.resume:
        raise InvalidRequestError("resume", "can't go with an ensemble; ask for it anew, or for the rest without one")
    if request.tools and spec.strategy is not Strategy.ROUTE:
        raise InvalidRequestError("tools", f"can't go with {spec.strategy}, which compares texts; use route")
    if isinstance(request.prompt, TokenPrompt) and any(member.instructions for member in spec.members):
        raise InvalidRequestError("token_ids", "leave no room for a member's instructions; send text")
