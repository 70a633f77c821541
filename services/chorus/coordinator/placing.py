"""Placement at work: the pure decision, with this coordinator's directory, counts and retry budget."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from chorus.coordinator.carried import Carried
from chorus.coordinator.events import EventBoard, subject_of
from chorus.coordinator.live import LiveDirectory
from chorus.core.costs import Purse
from chorus.core.errors import CancelledError, ChorusError
from chorus.core.events import AttemptFailed, AttemptHedged, EventKind, RequestSubstituted, Subject
from chorus.core.fleet.directory import DirectoryChange
from chorus.core.placement import (
    NO_TRACE,
    Affinity,
    Candidate,
    FallingBack,
    InFlight,
    KnownModels,
    Needs,
    NodeLoad,
    PromptTrace,
    Roster,
    Situation,
    Survey,
    has_quiet_node,
    node_loads,
    place,
    refusal,
    slots_for,
    survey,
)
from chorus.core.resilience.breakers import BreakerRules, Breakers, BreakerState, Outcome, Trial, outcome_of
from chorus.core.resilience.failures import Failures, blames_runner
from chorus.core.resilience.resuming import Hold, ResumePolicy, Resuming
from chorus.core.resilience.retries import Attempts, GiveUp, RetryBudget, context_needed
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import GenerationMetrics

T = TypeVar("T")

# How long a request that waits for a runner waits at once.
_LOOK_S = 0.25
# Callers may make up names of models.
_MAX_LANES = 512
# Terms of a cost that make a runner no help to a request that is late already.
_NOT_AT_ONCE = frozenset({"queue", "load", "external"})
# Of an error's text that an event tells.
_MESSAGE_MAX = 500
_NAME_MAX = 100
_BREAKER_EVENTS = {
    BreakerState.OPEN: EventKind.BREAKER_OPENED,
    BreakerState.HALF_OPEN: EventKind.BREAKER_HALF_OPEN,
    BreakerState.CLOSED: EventKind.BREAKER_CLOSED,
}

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a request would go: every runner, and the refusal where nobody fits."""

    survey: Survey
    error: ChorusError | None


@dataclass(slots=True)
class Running:
    """An attempt under way. A hedge that was quicker takes its place, with all that follows from it."""

    candidate: Candidate
    trial: Trial
    number: int = 1
    attempts: Attempts | None = None
    subject: Subject = field(default_factory=Subject)  # the request, on this runner


class Placing:
    """Chooses runners, and tries requests on them one after another."""

    def __init__(
        self,
        live: LiveDirectory,
        *,
        default_model: str | None,
        max_attempts: int,
        resume: ResumePolicy | None = None,
        breaker_rules: BreakerRules | None = None,
        weights: Mapping[str, float] | None = None,
        metrics: GenerationMetrics | None = None,
        events: EventBoard | None = None,
        coordinator: str = "",
        purse: Callable[[], Purse | None] = lambda: None,
        rng: random.Random | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`coordinator` is this one's SPIFFE id, by which runners tell of its requests; empty where it has none.

        `purse` tells what paid providers may cost now, None: whatever they do. `wall` is seconds since the Unix epoch.
        """
        self._live = live
        self._default_model = default_model
        self._max_attempts = max_attempts
        self._resume = resume or ResumePolicy()
        self._metrics = metrics
        self._events = events
        self._rng = rng if rng is not None else random.Random()
        self._weights = dict(weights or {})
        self._roster = Roster()
        self._affinity = Affinity()
        self._wall = wall
        self.known = KnownModels()
        self._sized = live.directory
        self._slots: dict[str, int] = {}  # by lane, in the directory above
        self._node_loads: dict[str, tuple[NodeLoad, ...]] = {}
        self._in_flight = InFlight(coordinator)
        self._budget = RetryBudget()
        self._failures = Failures()
        self._breakers = Breakers(breaker_rules)
        self._purse = purse
        self._on_start: list[Callable[[Candidate], None]] = []
        live.on_change(self._follow)

    def on_start(self, listener: Callable[[Candidate], None]) -> None:
        """Has `listener` told of every attempt that begins. It must be quick and must not raise."""
        self._on_start.append(listener)

    def default_model(self) -> str:
        """The family that answers generations which name no model; empty where there is none."""
        return self._roster.resolve(Needs(), self._live.directory, self._default_model).model

    def explain(self, needs: Needs, trace: PromptTrace = NO_TRACE) -> Explanation:
        """Where a request with these resolved needs would go now; `trace` is its prompt's."""
        directory = self._live.directory
        situation = self._situation(trace)
        found = survey(needs, directory, situation=situation)
        if found.candidates:
            return Explanation(found, None)
        missed = [(rejected.entry, rejected.miss) for rejected in found.rejected]
        return Explanation(found, refusal(needs, directory, missed, situation))

    def resolved(self, needs: Needs) -> Needs:
        """The needs with the default model where they name none."""
        return self._roster.resolve(needs, self._live.directory, self._default_model)

    def has_place(self, needs: Needs, *, without: Container[str] = frozenset()) -> bool:
        """Whether some runner of the directory, but for those, would take the request now."""
        try:
            self._place(needs, NO_TRACE, without)
        except ChorusError:
            return False
        return True

    def resuming(self) -> Resuming:
        """The breaks of a new stream."""
        return Resuming(self._resume, self._budget)

    # --- what admission goes by: a lane is a resolved model's name --------------------------------------------------

    def slots(self, lane: str) -> int | None:
        """Requests of a lane that runners decode at once; None where nobody does, so that waiting would help nobody."""
        self._follow_sizes()
        found = self._slots.get(lane)
        if found is None:
            directory = self._sized
            found = self._slots[lane] = slots_for(
                lane, self._roster.pool(Needs(model=lane), directory).everybody, directory
            )
        return found or None

    def has_quiet_node(self, lane: str) -> bool:
        """Whether some node that serves the lane is no more than 80% busy."""
        self._follow_sizes()
        found = self._node_loads.get(lane)
        if found is None:
            directory = self._sized
            pool = self._roster.pool(Needs(model=lane), directory)
            found = self._node_loads[lane] = node_loads(lane, pool.everybody, directory)
        return has_quiet_node(found, self._in_flight.unreported)

    def _follow_sizes(self) -> None:
        """Forgets what was counted in an older directory; counting a large mesh for each request would be too slow."""
        if self._live.directory is not self._sized or len(self._slots) > _MAX_LANES:
            self._sized, self._slots, self._node_loads = self._live.directory, {}, {}

    # --- attempts ---------------------------------------------------------------------------------------------------

    async def attempt(
        self,
        needs: Needs,
        run: Callable[[Running], Awaitable[T]],
        *,
        trace: PromptTrace = NO_TRACE,
        carried: Carried | None = None,
        resuming: Resuming | None = None,
        avoided: str = "",
    ) -> T:
        """Runs `run(running)` on one runner after another until it succeeds, and returns what it returned.

        `running.number` counts from 1. `trace` is that of the request's prompt, by which the next one that begins alike
        is placed. Once the caller has got part of the answer, the next runner goes on with it, as `resuming` allows;
        until then another model may take its place, as `carried` allows. `needs` are resolved; `avoided` is a
        runner that has failed the caller already. Raises the error that tells most, with the runner and the number of
        attempts in its metadata.
        """
        self._budget.earn(self._live.now)
        attempts = Attempts(self._max_attempts, self._budget, avoided=avoided)
        resuming = resuming if resuming is not None else self.resuming()
        last: Candidate | None = None
        why = ""  # the attempt before this one failed
        while True:
            going_on = carried is not None and carried.begun
            try:
                if carried is not None and going_on:
                    candidate = await self._place_again(needs, trace, carried, resuming)
                else:
                    spares = carried is not None and carried.falling_back.is_open
                    candidate = self._place(needs, trace, attempts.tried, last_resort=not spares)
            except ChorusError as refused:
                if not going_on and attempts.avoids_no_more():
                    continue
                if not going_on and attempts.may_wait(refused, self._live.now, self._patience_s(carried)):
                    await self._a_moment()
                    continue
                told = refused if going_on else attempts.refused(refused)
                if carried is not None and not going_on and carried.falling_back.applies_to(needs, told):
                    needs = carried.needs = self._another_model(needs, told, carried.falling_back)
                    attempts.tried.clear()
                    continue
                raise _with_facts(told, last, attempts.count) from None
            last = candidate
            if why and self._metrics is not None:
                self._metrics.retry(why)
            running = self._start(candidate, trace, attempts)
            try:
                result = await run(running)
            except ChorusError as error:
                last = candidate = running.candidate
                begun = carried is not None and carried.begun
                self.settle(running, error, begun=begun)
                why = error.reason
                if carried is not None and begun:
                    ended = resuming.broken(
                        error,
                        candidate.runner_id,
                        delivered=carried.tokens,
                        obstacle=carried.obstacle,
                        now=self._live.now,
                    )
                    if ended is not None:
                        raise _with_facts(ended.error, candidate, attempts.count) from error
                    needs = carried.broken(why).with_context(context_needed(error))
                else:
                    decision = attempts.failed(error, delivered=False, now=self._live.now)
                    if isinstance(decision, GiveUp):
                        raise _with_facts(decision.error, candidate, attempts.count) from error
                    needs = needs.with_context(decision.context_length)
                _log.info(
                    "attempt.failed",
                    attempt=running.number,
                    runner_id=candidate.runner_id,
                    model=candidate.model.artifact.name,
                    reason=why,
                    why=error.message,
                    begun=begun,
                )
            except BaseException:  # the caller went away: a probe must make way for another one
                self.settle(running, None, tried=False)
                raise
            else:
                self.settle(running, None)
                return result

    async def _a_moment(self) -> None:
        """Until the directory changes, or loads may have."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await self._live.wait_newer(self._live.directory)

    def _patience_s(self, carried: Carried | None) -> float:
        """For how long somebody is waited for; another model that may answer needs part of the time, too."""
        left_s = carried.time_left() if carried is not None and carried.falling_back.is_open else None
        return self._resume.wait_s if left_s is None else min(self._resume.wait_s, left_s / 2)

    def fall_back(self, needs: Needs, falling_back: FallingBack) -> Needs:
        """The needs with which a request goes on: those of another model where nobody can serve its own and it may."""
        if falling_back.is_open:
            try:
                self._place(needs, NO_TRACE, frozenset(), last_resort=False)
            except ChorusError as refused:
                if falling_back.applies_to(needs, refused):
                    return self._another_model(needs, refused, falling_back)
        return needs

    def _another_model(self, needs: Needs, refused: ChorusError, falling_back: FallingBack) -> Needs:
        """The needs of the model that stands in for the request's own, or those it has where there is none."""
        found = falling_back.instead(
            needs,
            refused,
            self._live.directory,
            self.situation(),
            known=self.known,
            default=self.default_model(),
            now=self._wall(),
        )
        if falling_back.substitution is None:
            return needs
        _log.info("request.substituted", requested=needs.model[:_NAME_MAX], model=found.model, reason=refused.reason)
        if self._events is not None:
            self._events.of_request(RequestSubstituted(needs.model[:_NAME_MAX], refused.reason), found.model)
        return found

    def reserve(self, needs: Needs, trace: PromptTrace) -> Running:
        """Chooses a runner for an attempt that its caller makes itself, and counts on it; `settle` must follow.

        Raises the refusal where nobody fits.
        """
        self._budget.earn(self._live.now)
        return self._start(self._place(needs, trace, frozenset()), trace)

    def again(self, running: Running) -> Running:
        """Counts once more on an attempt that was settled as not tried, and is made after all; `settle` must follow."""
        self._in_flight.began(running.candidate.runner_id, self._live.now)
        return replace(running, trial=self._begin(running.candidate, NO_TRACE))

    def hedge(self, running: Running, needs: Needs, trace: PromptTrace, *, after_s: float = 0.0) -> Running | None:
        """Begins a second attempt beside one that is late by `after_s`; `outrun` or `settle` must follow. None where
        nobody would answer at once, or the retry budget is spent."""
        attempts = running.attempts
        if attempts is None or attempts.count >= self._max_attempts:
            return None
        try:
            candidate = self._place(needs, trace, attempts.tried)
        except ChorusError:
            return None
        if not _NOT_AT_ONCE.isdisjoint(name for name, _ in candidate.terms) or not self._budget.spend(self._live.now):
            return None
        hedge = self._start(candidate, trace, attempts)
        if self._events is not None:
            self._events.note(AttemptHedged(hedge.number, after_s), hedge.subject)
        return hedge

    def outrun(self, running: Running, hedge: Running, error: ChorusError | None = None) -> None:
        """A hedge takes the place of its attempt, which was slower, or has failed with `error`."""
        self.settle(running, error, tried=error is not None)
        running.candidate, running.trial, running.number = hedge.candidate, hedge.trial, hedge.number
        running.subject = hedge.subject

    def settle(self, running: Running, error: ChorusError | None, *, tried: bool = True, begun: bool = False) -> None:
        """An attempt has ended, well or with `error`; where it was not `tried` to its end, that says nothing.

        `begun`: the caller had got part of the answer.
        """
        runner_id, trial = running.candidate.runner_id, running.trial
        self._in_flight.ended(runner_id, self._live.now)
        if not tried:
            return self._end(trial, Outcome.NEITHER)
        self._end(trial, Outcome.GOOD if error is None else outcome_of(error))
        if error is None:
            self._failures.succeeded(runner_id, trial.incarnation, self._live.now)
        elif blames_runner(error):
            self._failures.failed(runner_id, trial.incarnation, self._live.now)
        if self._metrics is not None:
            self._metrics.attempt("" if error is None else error.reason)
        if self._events is not None and error is not None and not isinstance(error, CancelledError):
            failed = AttemptFailed(running.number, error.reason, error.message[:_MESSAGE_MAX], begun)
            self._events.note(failed, running.subject)
        return None

    def _start(self, candidate: Candidate, trace: PromptTrace, attempts: Attempts | None = None) -> Running:
        number = attempts.begin(candidate.runner_id) if attempts is not None else 1
        self._in_flight.began(candidate.runner_id, self._live.now)
        for listener in self._on_start:
            listener(candidate)
        return Running(candidate, self._begin(candidate, trace), number, attempts, subject_of(candidate))

    async def _place_again(self, needs: Needs, trace: PromptTrace, carried: Carried, resuming: Resuming) -> Candidate:
        """Who goes on with a stream that broke off; waits for somebody. Raises what `resuming` gives up with."""
        while True:
            directory = self._live.directory
            step = resuming.look(self._live.now)
            if isinstance(step, GiveUp):
                raise step.error
            if not isinstance(step, Hold):
                try:
                    return self._place(needs, trace, frozenset() if step.anybody else resuming.failed)
                except ChorusError as refusal:
                    resuming.refused(refusal)
            left_s = carried.time_left()
            with suppress(TimeoutError):
                async with asyncio.timeout(step.seconds if left_s is None else min(step.seconds, left_s)):
                    await self._live.wait_newer(directory)

    def situation(self) -> Situation:
        """What this coordinator knows beyond the directory now, whatever the request."""
        return self._situation(NO_TRACE)

    def _situation(self, trace: PromptTrace, tried: Container[str] = frozenset()) -> Situation:
        return Situation(
            in_flight=self._in_flight.unreported,
            company=self._in_flight.company,
            tried=tried,
            barred=self._breakers.barred(self._live.now),
            penalties=self._failures.penalties(self._live.now),
            weights=self._weights,
            shared=self._affinity.shared(trace),
            purse=self._purse(),
        )

    def _place(self, needs: Needs, trace: PromptTrace, tried: Container[str], *, last_resort: bool = True) -> Candidate:
        directory = self._live.directory
        found = place(
            needs,
            directory,
            rng=self._rng,
            situation=self._situation(trace, tried),
            pool=self._roster.pool(needs, directory),
            home=self._roster.home(needs, directory),
            last_resort=last_resort,
        )
        if found.home:
            self._roster.remember_home(needs, found.home)
        return found

    def _begin(self, candidate: Candidate, trace: PromptTrace) -> Trial:
        runner = candidate.entry.record.runner
        self._affinity.sent((runner.runner_id, candidate.model.artifact.name), runner.incarnation, trace)
        now = self._live.now
        trial = self._breakers.began(runner.runner_id, candidate.model.artifact.name, runner.incarnation, now)
        if self._breakers.is_probe(trial):
            self._breaker_is(BreakerState.HALF_OPEN, trial)
        return trial

    def _end(self, trial: Trial, outcome: Outcome) -> None:
        state = self._breakers.ended(trial, outcome, self._live.now)
        if state is not None:
            self._breaker_is(state, trial)

    def _breaker_is(self, state: BreakerState, trial: Trial) -> None:
        tell = _log.warning if state is BreakerState.OPEN else _log.info
        tell(f"breaker.{state}", runner_id=trial.runner_id, model=trial.model)
        if self._metrics is not None:
            self._metrics.breaker(state)
        if self._events is not None:
            self._events.note(_BREAKER_EVENTS[state], self._subject_of(trial))

    def _subject_of(self, trial: Trial) -> Subject:
        """A runner with a model, whichever request showed how it fares."""
        entry = self._live.directory.get(trial.runner_id)
        if entry is None:
            return Subject(artifact=trial.model, runner_id=trial.runner_id)
        artifacts = (status.artifact for status in entry.record.runner.models)
        family = next((artifact.family for artifact in artifacts if artifact.name == trial.model), "")
        return Subject(model=family, artifact=trial.model, runner_id=trial.runner_id, node_id=entry.record.node.node_id)

    def _follow(self, change: DirectoryChange) -> None:
        now = self._live.now
        self._roster.follow(change, self._live.directory)
        for record in change.removed:
            self._in_flight.left(record.runner.runner_id)
            self._failures.forget(record.runner.runner_id)
            self._breakers.forget(record.runner.runner_id)
            self._affinity.forget(record.runner.runner_id)
            self.known.left(record, self._wall())
        for entry in change.upserts:
            runner = entry.record.runner
            self._breakers.incarnated(runner.runner_id, runner.incarnation)
            self._affinity.incarnated(runner.runner_id, runner.incarnation)
            self._in_flight.reported(runner.runner_id, now, entry.record.load.by_coordinator)
            self.known.has(entry.record, self._wall())


def _with_facts(error: ChorusError, candidate: Candidate | None, attempts: int) -> ChorusError:
    """Adds who was asked last, and how many were."""
    if candidate is not None:
        facts = {"runner_id": candidate.runner_id, "node_id": candidate.node_id, "attempts": str(attempts)}
        error.metadata = {**facts, **error.metadata}
    return error
