"""What a strategy is: steps that it wants done, one after the other, and the answer that it ends with.

A strategy is a generator. It yields a Round (several generations, of which it gets the answers) or a Final (one whose
text is streamed to the caller as the answer), is sent what came of it, and returns the answer. It knows nothing of
time, waves, deadlines, failures and blank answers: `machine.py` folds events into what it is sent.

    def vote(task: Task) -> Steps:
        answers = yield from drafts(task)
        return best_agreed(task, answers)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from chorus.core.ensemble.answers import SameAnswer, Similarity, clusters, same_answer, similarity
from chorus.core.ensemble.confidence import confidence_of, confidence_of_all
from chorus.core.ensemble.prompts import member_request
from chorus.core.ensemble.records import Answer, Complexity, Member, Strategy
from chorus.core.ensemble.weighing import Learned
from chorus.core.generation import GenerationRequest

DEFAULT_THRESHOLD = 0.75


@dataclass(frozen=True, slots=True)
class Measures:
    """What answers are judged by."""

    same_answer: SameAnswer = same_answer
    similarity: Similarity = similarity
    confidence_of: Callable[[Answer], float] = confidence_of
    confidence_of_all: Callable[[float, Sequence[float], int], float] = confidence_of_all


@dataclass(frozen=True, slots=True)
class Task:
    """What an ensemble is to do. `simpler` are the sets of members to fall back to where none of one can answer.

    `quorum` 0: all are waited for, `deadline_s` seconds in each round. `with_logprobs` names the models that tell
    log-probabilities, `without_chat` those that have no chat template. With `learned` a vote is weighed.
    """

    request: GenerationRequest
    strategy: Strategy
    members: tuple[Member, ...]
    aggregator_model: str
    simpler: tuple[tuple[Member, ...], ...] = ()
    quorum: int = 0
    deadline_s: float | None = None
    threshold: float = DEFAULT_THRESHOLD
    round_count: int = 1
    complexity: Complexity | None = None
    with_logprobs: frozenset[str] = frozenset()
    without_chat: frozenset[str] = frozenset()
    measures: Measures = field(default_factory=Measures)
    learned: Learned | None = None


SIDE_MARK = "+"
"""The ids of parts that are no member's own answer begin with it; no member's does."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One generation to be made; `member` is whose answer it is, None for a judge's, a reviewer's and the like."""

    part_id: str
    request: GenerationRequest
    member: Member | None = None


Enough: TypeAlias = Callable[[Sequence[Answer], Sequence[Ask]], bool]


@dataclass(frozen=True, slots=True)
class Round:
    """Generations beside each other. It ends when all have ended, `quorum` (0: all) have answered, `enough` says so of
    the answers so far and of what may still come, or the deadline comes. `waits`: there is nothing to go on with where
    nobody has answered by then, so that the first one is waited for."""

    asks: tuple[Ask, ...]
    quorum: int = 0
    enough: Enough | None = None
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Final:
    """One generation whose text is the answer, streamed as it comes; of it nothing can be taken back. It has to have
    begun by the deadline, unless it `waits`: there is no other answer."""

    ask: Ask
    waits: bool = False


Gathered: TypeAlias = tuple[Answer, ...]  # in the order in which they came
Steps: TypeAlias = Generator[Round | Final, Gathered, Answer | None]
StrategySteps: TypeAlias = Callable[[Task], Steps]


def ask_member(task: Task, member: Member) -> Ask:
    """The caller's own question to a member."""
    with_logprobs = member.model in task.with_logprobs
    return Ask(member.member_id, member_request(task.request, member, with_logprobs=with_logprobs), member)


def drafts(
    task: Task, *, quorum: int | None = None, enough: Enough | None = None
) -> Generator[Round | Final, Gathered, Gathered]:
    """The members' answers; where none of them could answer, those of the next simpler set."""
    wanted = task.quorum if quorum is None else quorum
    for depth, members in enumerate(sets := all_sets(task), start=1):
        asks = tuple(ask_member(task, member) for member in members)
        answers = yield Round(asks, wanted, enough, waits=depth == len(sets))
        if answers:
            return answers
    return ()


def all_sets(task: Task) -> list[tuple[Member, ...]]:
    """The members, then the simpler sets, whose members are told apart from those of the same name in others."""
    return [
        tuple(_at_depth(member, depth) for member in members)
        for depth, members in enumerate((task.members, *task.simpler))
    ]


def _at_depth(member: Member, depth: int) -> Member:
    return replace(member, member_id=f"{member.member_id}~{depth}", depth=depth) if depth else member


def member_of(task: Task, answer: Answer) -> Member:
    """The member whose answer to the caller's own question it is."""
    return next(one for members in all_sets(task) for one in members if one.member_id == answer.part_id)


def distinct(task: Task, answers: Sequence[Answer]) -> list[Answer]:
    """The most confident of each party of answers that say the same: the greatest party's first, of equal ones the more
    confident one's; what says nothing last."""
    parties = [
        [answers[index] for index in party]
        for party in clusters([answer.text for answer in answers], task.measures.same_answer)
    ]
    parties.sort(key=lambda party: (party[0].is_blank, -len(party), -sum(answer.confidence for answer in party)))
    return [max(party, key=lambda answer: answer.confidence) for party in parties]


def is_agreed(task: Task, answers: Sequence[Answer], coming: int) -> bool:
    """Whether what most agree on is settled, whatever `coming` more answers say. How it is put may still change: the
    most confident one's words are taken."""
    sizes = [len(party) for party in clusters([answer.text for answer in answers], task.measures.same_answer)]
    return bool(sizes) and sizes[0] > max(sizes[1:], default=0) + coming


def best_agreed(task: Task, answers: Sequence[Answer]) -> Answer | None:
    """The answer that most agree on; None where there is none."""
    return next(iter(distinct(task, answers)), None)
