"""Circuit breakers beside a reference that remembers everything that ever happened and counts it anew each time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from chorus.core import errors
from chorus.core.resilience.breakers import BreakerRules, Breakers, BreakerState, Outcome, Trial, outcome_of

RULES = BreakerRules(failures=3, window_s=60.0, open_s=30.0)
RUNNERS = ("r1", "r2")
MODELS = ("m1", "m2")


@dataclass
class Told:
    """One thing that happened to a breaker: a failure that counted, or a change of it."""

    what: str
    at: float
    step: int


class Reference:
    """A breaker as a list of what happened."""

    def __init__(self) -> None:
        self.history: list[Told] = []
        self.probes: dict[int, float] = {}  # under way: by step, since when

    def last_change(self) -> Told | None:
        return next((told for told in reversed(self.history) if told.what in ("opened", "closed")), None)

    def state(self, now: float) -> BreakerState:
        last = self.last_change()
        if last is None or last.what == "closed":
            return BreakerState.CLOSED
        return BreakerState.OPEN if now - last.at < RULES.open_s else BreakerState.HALF_OPEN

    def barred(self, now: float) -> bool:
        state = self.state(now)
        probed = any(now - since < RULES.open_s for since in self.probes.values())
        return state is BreakerState.OPEN or (state is BreakerState.HALF_OPEN and probed)

    def recent_failures(self, now: float) -> int:
        last = self.last_change()
        return sum(
            told.what == "failed" and now - told.at <= RULES.window_s and (last is None or told.step > last.step)
            for told in self.history
        )


class BreakersBesideReference(RuleBasedStateMachine):
    trials = Bundle("trials")

    def __init__(self) -> None:
        super().__init__()
        self.breakers = Breakers(RULES)
        self.now = 0.0
        self.step = 0
        self.incarnations = dict.fromkeys(RUNNERS, 1)
        self.references = {(runner, model): Reference() for runner in RUNNERS for model in MODELS}
        self.ended: set[int] = set()

    @rule(seconds=st.sampled_from([0.5, 10.0, 30.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=trials, runner=st.sampled_from(RUNNERS), model=st.sampled_from(MODELS))
    def an_attempt_begins(self, runner: str, model: str) -> tuple[Trial, int]:
        self.step += 1
        reference = self.references[runner, model]
        if reference.state(self.now) is BreakerState.HALF_OPEN and not reference.barred(self.now):
            reference.probes = {self.step: self.now}
        return self.breakers.began(runner, model, self.incarnations[runner], self.now), self.step

    @rule(begun=trials, outcome=st.sampled_from(Outcome))
    def an_attempt_ends(self, begun: tuple[Trial, int], outcome: Outcome) -> None:
        trial, step = begun
        if step in self.ended:
            return
        self.ended.add(step)
        told = self.breakers.ended(trial, outcome, self.now)
        if trial.incarnation != self.incarnations[trial.runner_id]:
            assert told is None
            return
        self.step += 1
        assert told == self.expect(self.references[trial.runner_id, trial.model], step, outcome)

    def expect(self, reference: Reference, began: int, outcome: Outcome) -> BreakerState | None:
        reference.probes.pop(began, None)
        last = reference.last_change()
        if outcome is Outcome.NEITHER or (last is not None and began < last.step):
            return None
        opened = reference.state(self.now) is not BreakerState.CLOSED
        if outcome is Outcome.GOOD:
            if not opened:
                return None
            reference.history.append(Told("closed", self.now, self.step))
            reference.probes = {}
            return BreakerState.CLOSED
        reference.history.append(Told("failed", self.now, self.step))
        if not opened and reference.recent_failures(self.now) < RULES.failures:
            return None
        reference.history.append(Told("opened", self.now, self.step))
        reference.probes = {}
        return BreakerState.OPEN

    @rule(runner=st.sampled_from(RUNNERS), told=st.booleans())
    def a_runner_restarts(self, runner: str, told: bool) -> None:
        self.incarnations[runner] += 1
        if told:
            self.breakers.incarnated(runner, self.incarnations[runner])
        else:  # only the next attempt tells
            self.breakers.ended(self.an_attempt_begins(runner, MODELS[0])[0], Outcome.NEITHER, self.now)
        self.start_afresh(runner)

    @rule(runner=st.sampled_from(RUNNERS))
    def a_runner_is_heard(self, runner: str) -> None:
        self.breakers.incarnated(runner, self.incarnations[runner])

    def start_afresh(self, runner: str) -> None:
        for model in MODELS:
            self.references[runner, model] = Reference()

    @rule(target=trials, runner=st.sampled_from(RUNNERS), model=st.sampled_from(MODELS))
    def it_fails_again_and_again(self, runner: str, model: str) -> object:
        for _ in range(RULES.failures):
            self.an_attempt_ends(self.an_attempt_begins(runner, model), Outcome.BAD)
        return multiple()

    @invariant()
    def they_agree(self) -> None:
        self.breakers.validate_state()
        barred = {key for key, reference in self.references.items() if reference.barred(self.now)}
        assert self.breakers.barred(self.now) == barred
        for (runner, model), reference in self.references.items():
            assert self.breakers.state(runner, model, self.now) is reference.state(self.now)


TestBreakersBesideReference = BreakersBesideReference.TestCase


def failing(breakers: Breakers, times: int, *, at: float = 0.0, incarnation: int = 1) -> BreakerState | None:
    told = None
    for _ in range(times):
        told = breakers.ended(breakers.began("r", "m", incarnation, at), Outcome.BAD, at)
    return told


def test_by_default_five_failures_in_a_minute_open_it_for_half_a_minute() -> None:
    breakers = Breakers()
    assert failing(breakers, 4) is None
    assert failing(breakers, 1, at=60.0) is BreakerState.OPEN
    assert breakers.barred(89.9) == {("r", "m")}
    assert breakers.state("r", "m", 90.0) is BreakerState.HALF_OPEN
    assert not breakers.barred(90.0)
    late = Breakers()
    failing(late, 4)
    assert failing(late, 1, at=60.1) is None


def test_one_probe_at_a_time_decides() -> None:
    breakers = Breakers()
    failing(breakers, 5)
    probe = breakers.began("r", "m", 1, 30.0)
    assert breakers.barred(31.0) == {("r", "m")}
    assert breakers.ended(probe, Outcome.BAD, 31.0) is BreakerState.OPEN
    assert breakers.barred(60.0) == {("r", "m")}
    again = breakers.began("r", "m", 1, 61.0)
    assert breakers.ended(again, Outcome.GOOD, 62.0) is BreakerState.CLOSED
    assert not breakers.barred(62.0)


def test_a_probe_whose_caller_goes_away_makes_way_for_another() -> None:
    breakers = Breakers()
    failing(breakers, 5)
    breakers.ended(breakers.began("r", "m", 1, 30.0), Outcome.NEITHER, 31.0)
    assert breakers.state("r", "m", 31.0) is BreakerState.HALF_OPEN
    assert not breakers.barred(31.0)


def test_a_probe_that_hangs_does_not_bar_the_runner_for_ever() -> None:
    breakers = Breakers()
    failing(breakers, 5)
    breakers.began("r", "m", 1, 30.0)
    assert breakers.barred(59.0)
    assert not breakers.barred(60.0)


def test_an_attempt_from_before_it_opened_closes_nothing() -> None:
    breakers = Breakers()
    old = breakers.began("r", "m", 1, 0.0)
    failing(breakers, 5)
    assert breakers.ended(old, Outcome.GOOD, 1.0) is None
    assert breakers.barred(1.0)


def test_a_success_on_an_open_one_closes_it() -> None:
    breakers = Breakers()
    failing(breakers, 5)
    assert breakers.ended(breakers.began("r", "m", 1, 1.0), Outcome.GOOD, 2.0) is BreakerState.CLOSED


def test_the_death_of_one_process_does_not_bar_the_next() -> None:
    breakers = Breakers()
    under_way = [breakers.began("r", "m", 1, 0.0) for _ in range(9)]
    breakers.incarnated("r", 2)
    assert [breakers.ended(trial, Outcome.BAD, 1.0) for trial in under_way] == [None] * 9
    assert not breakers.barred(1.0)


def test_who_left_is_forgotten() -> None:
    breakers = Breakers()
    failing(breakers, 5)
    assert breakers.states(0.0) == {("r", "m"): BreakerState.OPEN}
    breakers.forget("r")
    assert breakers.states(0.0) == {}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.UnavailableError("x"), Outcome.BAD),
        (errors.EngineError("x"), Outcome.BAD),
        (errors.InternalError("x"), Outcome.BAD),
        (errors.ModelFileError("x"), Outcome.BAD),
        (errors.CancelledError("x"), Outcome.NEITHER),
        (errors.DeadlineExceededError("x"), Outcome.NEITHER),
        (errors.InvalidRequestError("field", "x"), Outcome.NEITHER),
        (errors.PromptTooLongError(9, 8, model="m"), Outcome.NEITHER),
        (errors.OverloadedError("x"), Outcome.NEITHER),
        (errors.OutOfMemoryError("x"), Outcome.NEITHER),
        (errors.DrainingError("x"), Outcome.NEITHER),
    ],
)
def test_what_an_error_tells(error: errors.ChorusError, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome
