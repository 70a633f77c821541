"""How an ensemble fared, out of its members' answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from chorus.core.ensemble.answers import Similarity, support
from chorus.core.ensemble.records import Answer, MemberOutcome, Strategy, Verdict
from chorus.core.ensemble.steps import Task

# Pairs whose answers have no confidence at all still count a little, so that the mean is one.
_LEAST_WEIGHT = 1e-9


def judged(
    task: Task,
    answer: Answer,
    outcomes: Sequence[MemberOutcome],
    answers: Mapping[str, Answer],
    *,
    elapsed_s: float,
    fallback_count: int = 0,
) -> Verdict:
    """The verdict on an answer; `answers` are the members', by member id."""
    same = task.measures.same_answer
    agreeing = [own for own in answers.values() if own.part_id == answer.part_id or same(own.text, answer.text)]
    agreement = len(agreeing) / len(answers) if answers else 0.0
    members = tuple(
        replace(outcome, agrees_with=_agreeing_with(task, outcome.member_id, answers)) for outcome in outcomes
    )
    own = [member_id for member_id, one in answers.items() if one.part_id == answer.part_id]
    confidences = [one.confidence for one in agreeing] or [answer.confidence]
    return Verdict(
        strategy=task.strategy,
        complexity=task.complexity,
        agreement=agreement,
        coherence=coherence([one for one in answers.values() if not one.is_blank], task.measures.similarity),
        confidence=0.0
        if answer.is_blank
        else task.measures.confidence_of_all(
            agreement if own else max(agreement, _support(task, answer, answers)), confidences, len(answers)
        ),
        members=members,
        elapsed_s=elapsed_s,
        answered_by=own[0] if own else "",
        fallback_count=fallback_count,
    )


def _support(task: Task, answer: Answer, answers: Mapping[str, Answer]) -> float:
    """How much of a composed text its members' answers bear out, theirs more who are surer. Texts seldom are the same,
    so that agreement tells nothing of it. Facets are unlike by design: there one side is enough."""
    drafts = list(answers.values())
    weights = [draft.confidence + _LEAST_WEIGHT for draft in drafts]
    by_any = task.strategy is Strategy.FACETS
    return support(answer.text, [draft.text for draft in drafts], weights, by_any=by_any)


def coherence(answers: Sequence[Answer], similarity: Similarity) -> float:
    """Mean similarity of pairs, each weighted by both confidences; 1 where there is but one answer."""
    total = weights = 0.0
    for one, other in combinations(answers, 2):
        weight = one.confidence * other.confidence + _LEAST_WEIGHT
        total += weight * similarity(one.text, other.text)
        weights += weight
    return total / weights if weights else 1.0


def _agreeing_with(task: Task, member_id: str, answers: Mapping[str, Answer]) -> tuple[str, ...]:
    own = answers.get(member_id)
    if own is None:
        return ()
    same = task.measures.same_answer
    return tuple(other for other, answer in answers.items() if other != member_id and same(own.text, answer.text))
