"""Ensembles: between `chorus.api.coordinator.v1` and `chorus.core.ensemble.records`.

`decode_ensemble` checks what can be checked without the mesh; it raises `InvalidRequestError` naming the field.
"""

from __future__ import annotations

from chorus.api.coordinator.v1 import ensemble_pb2 as pb
from chorus.core.ensemble.facets import FACETS
from chorus.core.ensemble.planning import MAX_MEMBERS
from chorus.core.ensemble.records import (
    Complexity,
    EnsembleSpec,
    MemberOutcome,
    MemberSpec,
    MemberState,
    Strategy,
    Verdict,
)
from chorus.core.ensemble.strategies import STRATEGIES
from chorus.core.errors import InvalidRequestError, UnsupportedFeatureError
from chorus.wire.resources import decode_duration, encode_duration

MAX_ID_LENGTH = 64
MAX_ROUNDS = 4
_LONGEST_DEADLINE_S = 86_400.0

STRATEGY_VALUES: dict[Strategy, pb.Strategy.ValueType] = {
    strategy: pb.Strategy.Value(f"STRATEGY_{strategy.name}") for strategy in Strategy
}
COMPLEXITIES: dict[Complexity, pb.Complexity.ValueType] = {
    complexity: pb.Complexity.Value(f"COMPLEXITY_{complexity.name}") for complexity in Complexity
}
STATES: dict[MemberState, pb.MemberState.ValueType] = {
    state: pb.MemberState.Value(f"MEMBER_STATE_{state.name}") for state in MemberState
}
STRATEGIES_BACK = {value: strategy for strategy, value in STRATEGY_VALUES.items()}
_COMPLEXITIES_BACK = {value: complexity for complexity, value in COMPLEXITIES.items()}
_STATES_BACK = {value: state for state, value in STATES.items()}


def decode_ensemble(message: pb.EnsembleSpec) -> EnsembleSpec:
    """What is asked for. Raises `InvalidRequestError`; `UnsupportedFeatureError` for a strategy that is not here."""
    strategy = STRATEGIES_BACK.get(message.strategy) if message.strategy else Strategy.ROUTE
    if strategy is None or (strategy is not Strategy.AUTO and strategy not in STRATEGIES):
        raise UnsupportedFeatureError(
            f"this coordinator does not have the ensemble strategy {strategy or message.strategy}; "
            f"it has {', '.join(STRATEGIES)} and auto",
            metadata={"feature": "ensemble"},
        )
    complexity = _COMPLEXITIES_BACK.get(message.complexity)
    if message.complexity and complexity is None:
        raise InvalidRequestError("ensemble.complexity", f"{message.complexity} is none that this version knows")
    if message.facet_set and message.facet_set not in FACETS:
        raise InvalidRequestError("ensemble.facet_set", f"must be one of {', '.join(FACETS)}")
    threshold = message.confidence_threshold if message.HasField("confidence_threshold") else None
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise InvalidRequestError("ensemble.confidence_threshold", "must be between 0 and 1")
    if message.round_count > MAX_ROUNDS:
        raise InvalidRequestError("ensemble.round_count", f"must be at most {MAX_ROUNDS}")
    return EnsembleSpec(
        strategy=strategy,
        members=_decode_members(message),
        complexity=complexity,
        aggregator_model=message.aggregator_model,
        quorum=message.quorum,
        deadline_s=_decode_deadline(message),
        confidence_threshold=threshold,
        final_only=message.final_only,
        round_count=message.round_count,
        facet_set=message.facet_set,
    )


def encode_ensemble(spec: EnsembleSpec) -> pb.EnsembleSpec:
    """The message that says so."""
    return pb.EnsembleSpec(
        strategy=STRATEGY_VALUES[spec.strategy],
        members=[
            pb.Member(
                member_id=member.member_id,
                model=member.model,
                instructions=member.instructions,
                sample_count=member.sample_count,
            )
            for member in spec.members
        ],
        complexity=COMPLEXITIES[spec.complexity] if spec.complexity is not None else pb.COMPLEXITY_UNSPECIFIED,
        aggregator_model=spec.aggregator_model,
        quorum=spec.quorum,
        deadline=None if spec.deadline_s is None else encode_duration(spec.deadline_s),
        confidence_threshold=spec.confidence_threshold,
        final_only=spec.final_only,
        round_count=spec.round_count,
        facet_set=spec.facet_set,
    )


def encode_verdict(verdict: Verdict) -> pb.Verdict:
    """How an ensemble fared."""
    complexity = verdict.complexity
    return pb.Verdict(
        strategy=STRATEGY_VALUES[verdict.strategy],
        agreement=verdict.agreement,
        coherence=verdict.coherence,
        confidence=verdict.confidence,
        members=[_encode_outcome(outcome) for outcome in verdict.members],
        cost_micro_usd=verdict.cost_micro_usd,
        elapsed=encode_duration(verdict.elapsed_s),
        complexity=COMPLEXITIES[complexity] if complexity is not None else pb.COMPLEXITY_UNSPECIFIED,
        answered_by=verdict.answered_by,
        fallback_count=verdict.fallback_count,
    )


def decode_verdict(message: pb.Verdict) -> Verdict:
    """How an ensemble fared; what is of a newer version is left out, or read as the nearest there is."""
    return Verdict(
        strategy=STRATEGIES_BACK.get(message.strategy, Strategy.ROUTE),
        agreement=message.agreement,
        coherence=message.coherence,
        confidence=message.confidence,
        members=tuple(_decode_outcome(outcome) for outcome in message.members),
        elapsed_s=decode_duration(message.elapsed),
        complexity=_COMPLEXITIES_BACK.get(message.complexity),
        answered_by=message.answered_by,
        fallback_count=message.fallback_count,
        cost_micro_usd=message.cost_micro_usd,
    )


def _decode_members(message: pb.EnsembleSpec) -> tuple[MemberSpec, ...]:
    if len(message.members) > MAX_MEMBERS:  # so many are not even decoded one by one
        problem = f"has {len(message.members)} entries; at most {MAX_MEMBERS} are taken"
        raise InvalidRequestError("ensemble.members", problem)
    seen: set[str] = set()
    members = []
    for index, member in enumerate(message.members):
        field, name = f"ensemble.members[{index}]", member.member_id
        if len(name) > MAX_ID_LENGTH or not name.isprintable() or name != name.strip():
            problem = f"must be at most {MAX_ID_LENGTH} printable characters, without blanks around them"
            raise InvalidRequestError(f"{field}.member_id", problem)
        if name and name in seen:
            raise InvalidRequestError(f"{field}.member_id", f"{name} is the id of another member; each has its own")
        seen.add(name)
        members.append(MemberSpec(member.model, member.sample_count or 1, name, member.instructions))
    return tuple(members)


def _decode_deadline(message: pb.EnsembleSpec) -> float | None:
    if not message.HasField("deadline"):
        return None
    seconds = decode_duration(message.deadline)
    if not 0.0 < seconds <= _LONGEST_DEADLINE_S:
        raise InvalidRequestError("ensemble.deadline", "must be over 0 and at most a day")
    return seconds


def _encode_outcome(outcome: MemberOutcome) -> pb.MemberOutcome:
    return pb.MemberOutcome(
        member_id=outcome.member_id,
        state=STATES[outcome.state],
        model=outcome.model,
        node_id=outcome.node_id,
        agrees_with=outcome.agrees_with,
        confidence=outcome.confidence,
        reason=outcome.reason,
        runner_id=outcome.runner_id,
        elapsed=encode_duration(outcome.took_s),
        completion_token_count=outcome.tokens,
    )


def _decode_outcome(message: pb.MemberOutcome) -> MemberOutcome:
    return MemberOutcome(
        member_id=message.member_id,
        state=_STATES_BACK.get(message.state, MemberState.FAILED),
        model=message.model,
        node_id=message.node_id,
        runner_id=message.runner_id,
        agrees_with=tuple(message.agrees_with),
        confidence=message.confidence,
        reason=message.reason,
        took_s=decode_duration(message.elapsed),
        tokens=message.completion_token_count,
    )
