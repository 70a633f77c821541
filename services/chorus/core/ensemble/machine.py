"""An ensemble under way: a fold of what happens to its parts into what is to be done. Sans I/O.

Events come in (a part was placed, has answered, has failed; time passes), actions go out (ask this, cancel that, this
one's text is the answer). Steps are those of a strategy (`steps.py`). `now` is seconds on a clock that only goes
forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from chorus.core.ensemble.prompts import told_plainly
from chorus.core.ensemble.records import Answer, MemberOutcome, MemberState, Verdict
from chorus.core.ensemble.steps import Ask, Final, Round, Steps, Task
from chorus.core.ensemble.verdict import judged
from chorus.core.ensemble.waves import Room, Waves
from chorus.core.errors import ChorusError, UnavailableError

# --- what happens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartPlaced:
    """A runner has begun with a part, or goes on with it."""

    part_id: str
    node_id: str
    runner_id: str
    model: str = ""


@dataclass(frozen=True, slots=True)
class PartBegun:
    """The first words of a part were streamed as the answer."""

    part_id: str


@dataclass(frozen=True, slots=True)
class PartAnswered:
    """A part has its whole answer."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class PartFailed:
    """A part has ended without one. `begun`: some of its text was streamed as the answer."""

    part_id: str
    error: ChorusError
    begun: bool = False


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing happened, until `look_at`."""


PartEvent: TypeAlias = PartPlaced | PartBegun | PartAnswered | PartFailed | TimePassed

# --- what is to be done ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskPart:
    """Make this generation; `as_answer`: stream it as the answer, all but its end."""

    ask: Ask
    as_answer: bool = False


@dataclass(frozen=True, slots=True)
class CancelPart:
    """Nobody waits for this part any more."""

    part_id: str


@dataclass(frozen=True, slots=True)
class Give:
    """Tell the caller that part's text as the answer, then the verdict, then the end."""

    part_id: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Conclude:
    """The answer was streamed: tell the verdict, then its end."""

    part_id: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Fail:
    """There is no answer."""

    error: ChorusError


Action: TypeAlias = AskPart | CancelPart | Give | Conclude | Fail

# --- the fold -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Part:
    ask: Ask
    asked_at: float
    ended_at: float | None = None
    node_id: str = ""
    runner_id: str = ""
    model: str = ""
    answer: Answer | None = None
    error: ChorusError | None = None
    left: MemberState = MemberState.LATE

    def leave(self, state: MemberState, now: float) -> None:
        """It isn't waited for any more."""
        self.left, self.ended_at = state, now

    @property
    def state(self) -> MemberState:
        """How it has fared."""
        if self.answer is not None:
            return MemberState.ANSWERED
        return MemberState.FAILED if self.error is not None else self.left


@dataclass(slots=True)
class _Running:
    """The step under way."""

    waves: Waves
    quorum: int
    deadline: float | None
    step: Round | Final
    running: set[str] = field(default_factory=set)
    answers: list[Answer] = field(default_factory=list)

    @property
    def said(self) -> tuple[Answer, ...]:
        """The answers that say something; nobody is told of others."""
        return tuple(answer for answer in self.answers if not answer.is_blank)


class Ensemble:
    """One ensemble. `begin` comes first, then `take` for every event, until one of the actions ends it (`over`)."""

    def __init__(self, task: Task, steps: Steps, room: Room | None = None) -> None:
        self._task = task
        self._steps = steps
        self._room = room if room is not None else Room()
        self._parts: dict[str, _Part] = {}
        self._step: _Running | None = None
        self._began_at = 0.0
        self.over = False

    @property
    def look_at(self) -> float | None:
        """When TimePassed is due, where nothing happens before."""
        return self._step.deadline if self._step is not None else None

    def begin(self, now: float) -> list[Action]:
        """The first actions."""
        self._began_at = now
        return self._go_on(None, now)

    def take(self, event: PartEvent, now: float) -> list[Action]:
        """What follows from an event. What is told of parts that are not waited for changes nothing."""
        step = self._step
        if self.over or step is None:
            return []
        if isinstance(event, TimePassed):
            return self._look(step, now)
        part_id = event.answer.part_id if isinstance(event, PartAnswered) else event.part_id
        part = self._parts.get(part_id)
        if part is None or part_id not in step.running:
            return []
        if isinstance(event, PartPlaced):
            part.node_id, part.runner_id, part.model = event.node_id, event.runner_id, event.model or part.model
            return []
        if isinstance(event, PartBegun):
            step.deadline = None  # of what the caller has read nothing can be taken back
            return []
        step.running.discard(part_id)
        step.waves.ended(part.ask)
        part.ended_at = now
        if isinstance(event, PartAnswered):
            part.answer = self._measured(event.answer)
            step.answers.append(part.answer)
        else:
            part.error = event.error
            if event.begun:
                return self._end([Fail(event.error)])
        return self._look(step, now)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _look(self, step: _Running, now: float) -> list[Action]:
        """Whether the step under way has ended, and what comes next."""
        if not self._has_ended(step, now):
            return self._ask_next(step, now)
        cancels: list[Action] = [CancelPart(part_id) for part_id in sorted(step.running)]
        has_enough = self._has_enough(step)
        for part_id in step.running:
            self._parts[part_id].leave(MemberState.UNNEEDED if has_enough else MemberState.LATE, now)
        for ask in step.waves.waiting:
            self._parts[ask.part_id] = part = _Part(ask, now)
            part.leave(MemberState.SKIPPED, now)
        return cancels + self._go_on(step.said, now)

    def _has_ended(self, step: _Running, now: float) -> bool:
        if not step.running and not step.waves.waiting:
            return True
        if step.deadline is not None and now >= step.deadline:
            if step.said or not step.step.waits:
                return True
            step.quorum, step.deadline = 1, None
        if step.quorum and len(step.said) >= step.quorum:
            return True
        return self._has_enough(step)

    def _has_enough(self, step: _Running) -> bool:
        """Whether the strategy needs no more answers than there are."""
        enough = step.step.enough if isinstance(step.step, Round) else None
        if enough is None or not step.said:
            return False
        coming = [self._parts[part_id].ask for part_id in sorted(step.running)]
        return enough(step.said, (*coming, *step.waves.waiting))

    def _ask_next(self, step: _Running, now: float) -> list[Action]:
        actions: list[Action] = []
        for ask in step.waves.next():
            self._parts[ask.part_id] = _Part(ask, now)
            step.running.add(ask.part_id)
            actions.append(AskPart(ask, as_answer=isinstance(step.step, Final)))
        return actions

    def _go_on(self, sent: tuple[Answer, ...] | None, now: float) -> list[Action]:
        try:
            step = next(self._steps) if sent is None else self._steps.send(sent)
        except StopIteration as end:
            return self._conclude(end.value, now)
        asks = [self._adapted(ask) for ask in step.asks] if isinstance(step, Round) else [self._measurable(step.ask)]
        assert not any(ask.part_id in self._parts for ask in asks), "parts have ids of their own"
        is_bound = isinstance(step, Round) or not step.waits
        deadline = now + self._task.deadline_s if is_bound and self._task.deadline_s is not None else None
        quorum = step.quorum if isinstance(step, Round) else 0
        self._step = _Running(Waves(asks, self._room), quorum, deadline, step)
        return self._look(self._step, now)

    def _adapted(self, ask: Ask) -> Ask:
        """What its model can be asked."""
        has_chat = ask.request.model not in self._task.without_chat
        return ask if has_chat else replace(ask, request=told_plainly(ask.request))

    def _measurable(self, ask: Ask) -> Ask:
        """The answer with its log-probabilities, where its model tells them: the verdict says how sure one may be."""
        ask = self._adapted(ask)
        if ask.request.logprobs is not None or ask.request.model not in self._task.with_logprobs:
            return ask
        return replace(ask, request=replace(ask.request, logprobs=0))

    def _conclude(self, answer: Answer | None, now: float) -> list[Action]:
        if answer is None:  # then nobody has said anything, and somebody has done that to the end
            blank = [part.answer for part in self._parts.values() if part.ask.member is not None and part.answer]
            answer = next(reversed(blank), None)
        if answer is None:
            return self._end([Fail(self._failure())])
        was_streamed = self._step is not None and isinstance(self._step.step, Final) and answer in self._step.answers
        members = [part.ask.member for part in self._parts.values() if part.ask.member is not None]
        verdict = judged(
            self._task,
            answer,
            self._outcomes(now),
            self._answers(),
            elapsed_s=now - self._began_at,
            fallback_count=max((member.depth for member in members), default=0),
        )
        verb = Conclude if was_streamed else Give
        return self._end([verb(answer.part_id, verdict)])

    def _end(self, actions: list[Action]) -> list[Action]:
        self.over = True
        self._steps.close()
        return actions

    def _failure(self) -> ChorusError:
        """Why nobody has answered: the first failure, which the others are most likely alike."""
        errors = [part.error for part in self._parts.values() if part.error is not None]
        if not errors:
            return UnavailableError("no member of the ensemble has answered; ask again")
        error = errors[0]
        error.metadata = {**error.metadata, "members_failed": str(len(errors))}
        return error

    def _measured(self, answer: Answer) -> Answer:
        return replace(answer, confidence=self._task.measures.confidence_of(answer))

    def _answers(self) -> Mapping[str, Answer]:
        """The members' answers, by member id."""
        return {
            part.ask.member.member_id: part.answer
            for part in self._parts.values()
            if part.ask.member is not None and part.answer is not None
        }

    def _outcomes(self, now: float) -> list[MemberOutcome]:
        """How each member has fared, those that were never asked at the end."""
        outcomes = [self._outcome(part, now) for part in self._parts.values() if part.ask.member is not None]
        known = {outcome.member_id for outcome in outcomes}
        skipped = [member for member in self._task.members if member.member_id not in known]
        return outcomes + [MemberOutcome(member.member_id, MemberState.SKIPPED, member.model) for member in skipped]

    def _outcome(self, part: _Part, now: float) -> MemberOutcome:
        assert part.ask.member is not None, "of members alone"
        return MemberOutcome(
            part.ask.member.member_id,
            part.state,
            part.model or part.ask.member.model,
            node_id=part.node_id,
            runner_id=part.runner_id,
            confidence=part.answer.confidence if part.answer is not None else 0.0,
            reason=part.error.reason if part.error is not None else "",
            took_s=(part.ended_at if part.ended_at is not None else now) - part.asked_at,
            tokens=part.answer.tokens if part.answer is not None else 0,
        )
