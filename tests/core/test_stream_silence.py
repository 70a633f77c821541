"""When a stream on which nothing comes is left: its runner frozen, or stuck, and never for being slow."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from chorus.core.errors import ConfigError
from chorus.core.resilience.stream_silence import SECOND_LOOK_S, Look, Sight, StreamPatience, StreamWatch

PATIENCE = StreamPatience()


class World:
    """A watch with a clock, and a runner that answers or not; looks are made when they are due."""

    def __init__(self, *, answers: bool, patience: StreamPatience = PATIENCE) -> None:
        self.now = 100.0
        self.watch = StreamWatch(patience, self.now)
        self.answers = answers
        self.asked = 0
        self.seen: list[Look] = []
        self._due = self.now

    def comes(self, *, tokens: bool = True) -> None:
        """A message comes, and is passed on at once."""
        self.watch.heard(self.now, tokens=tokens)
        self.watch.listening(self.now)

    def passes(self, seconds: float, late_s: float = 0.0) -> None:
        """Time passes; each look is `late_s` late."""
        end = self.now + seconds
        while self._due + late_s <= end:
            self.now = max(self.now, self._due + late_s)
            look = self.watch.look(self.now)
            self.seen.append(look)
            if look.sight is Sight.ASK:
                self.asked += 1
                if self.answers:
                    self.watch.answered(self.now)
            self._due = self.now + look.again_in_s
        self.now = end

    def sights(self) -> set[Sight]:
        return {look.sight for look in self.seen}

    def first(self, sight: Sight) -> Look:
        return next(look for look in self.seen if look.sight is sight)


def paced(gap_s: float, count: int, *, answers: bool) -> World:
    world = World(answers=answers)
    for _ in range(count):
        world.passes(gap_s)
        world.comes()
    world.seen.clear()
    return world


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_a_frozen_runner_is_noticed_within_three_seconds_whatever_it_was_at(tokens: int) -> None:
    world = paced(0.05, tokens, answers=False)
    world.passes(3.0)
    assert world.first(Sight.SILENT).quiet_s == pytest.approx(PATIENCE.silent_s + SECOND_LOOK_S)
    assert world.asked == 1


def test_a_long_prompt_on_a_runner_that_answers_is_waited_for() -> None:
    world = World(answers=True)
    world.passes(3600.0)
    assert world.sights() == {Sight.FINE, Sight.ASK}
    assert 3600 / PATIENCE.silent_s <= world.asked <= 3600 / PATIENCE.ask_after_s


@settings(deadline=None)  # a busy machine is no failure
@given(st.floats(0.0, 30.0))
def test_it_is_noticed_as_soon_when_it_freezes_later(lives_s: float) -> None:
    world = World(answers=True)
    world.passes(lives_s)
    assert Sight.SILENT not in world.sights()
    world.answers = False
    world.passes(3.0)
    assert world.first(Sight.SILENT).quiet_s <= 3.0  # what it was quiet before, and lived, does not count


@pytest.mark.parametrize(("gap_s", "allowed_s"), [(0.02, 5.0), (0.25, 5.0), (0.5, 10.0), (2.0, 40.0)])
def test_a_stream_that_had_a_pace_and_lost_it_is_stuck(gap_s: float, allowed_s: float) -> None:
    world = paced(gap_s, 20, answers=True)
    assert world.watch.stall_after_s == pytest.approx(allowed_s)
    world.passes(allowed_s + SECOND_LOOK_S - 0.01)
    assert Sight.STALLED not in world.sights()
    world.passes(0.02)
    assert world.first(Sight.STALLED).quiet_s == pytest.approx(allowed_s + SECOND_LOOK_S)
    world.passes(60.0)
    assert Sight.SILENT not in world.sights()


def test_before_the_first_token_nothing_is_stuck() -> None:
    world = paced(0.02, 0, answers=True)
    assert world.watch.stall_after_s is None
    world.passes(3600.0)
    assert Sight.STALLED not in world.sights()


@pytest.mark.parametrize("tokens", range(1, PATIENCE.gaps_at_least + 1))
def test_without_a_pace_it_takes_longer_until_it_is_stuck(tokens: int) -> None:
    world = paced(0.02, tokens, answers=True)
    assert world.watch.stall_after_s == PATIENCE.unpaced_s
    world.passes(PATIENCE.unpaced_s + SECOND_LOOK_S - 0.01)
    assert Sight.STALLED not in world.sights()
    world.passes(0.02)
    assert Sight.STALLED in world.sights()


def test_progress_after_tokens_is_no_pace() -> None:
    world = paced(0.02, 20, answers=True)
    world.comes(tokens=False)
    assert world.watch.stall_after_s is None


def test_one_long_gap_makes_patient_at_once_and_is_forgotten_slowly() -> None:
    world = paced(0.05, 20, answers=True)
    world.passes(3.0)
    world.comes()
    assert world.watch.stall_after_s == pytest.approx(60.0)
    for _ in range(100):
        world.passes(0.05)
        world.comes()
    assert world.watch.stall_after_s == PATIENCE.stall_s


@pytest.mark.parametrize("away_s", [4.0, 3600.0, 1e6])
def test_who_looks_too_late_begins_anew(away_s: float) -> None:
    watch = StreamWatch(PATIENCE, 0.0)
    due = watch.look(0.0).again_in_s
    look = watch.look(due + away_s)
    assert look.sight is Sight.FINE
    assert look.quiet_s == 0.0


def test_a_slow_caller_is_not_the_runners_silence() -> None:
    world = paced(0.05, 20, answers=False)
    world.watch.heard(world.now, tokens=True)  # and is being passed on
    world.passes(600.0)
    assert world.sights() == {Sight.FINE}
    world.watch.listening(world.now)
    world.passes(1.0)
    assert world.sights() == {Sight.FINE, Sight.ASK}


def test_silence_ends_with_a_word() -> None:
    world = World(answers=False)
    world.passes(3.0)
    assert Sight.SILENT in world.sights()
    world.seen.clear()
    world.comes()
    world.passes(0.5)
    assert world.sights() <= {Sight.FINE}
    world.watch.answered(world.now)
    world.passes(PATIENCE.ask_after_s - 0.01)
    assert world.sights() <= {Sight.FINE}


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["token", "progress", "answer", "nothing"]), st.floats(0.0, 4.0), st.floats(0.0, 0.9)
        ),
        max_size=40,
    )
)
def test_nobody_is_called_silent_who_said_something_lately_or_was_not_asked(
    steps: list[tuple[str, float, float]],
) -> None:
    world = World(answers=False)
    spoke = world.now
    for what, seconds, late_s in steps:
        before, asked = len(world.seen), world.asked
        world.passes(seconds, late_s)
        for look in world.seen[before:]:
            assert look.again_in_s > 0.0
            if look.sight is Sight.SILENT:
                assert world.now - spoke >= PATIENCE.silent_s - 1e-9
                assert world.asked > 0
            if look.sight is Sight.STALLED:
                assert look.quiet_s >= PATIENCE.stall_s
        assert world.asked - asked <= len(world.seen) - before
        if what in ("token", "progress"):
            world.comes(tokens=what == "token")
        elif what == "answer":
            world.watch.answered(world.now)
        if what != "nothing":
            spoke = world.now


@pytest.mark.parametrize("wrong", [{"ask_after_s": 3.0}, {"stall_factor": 0.0}, {"late_s": 0.0}, {"gaps_at_least": 0}])
def test_a_patience_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        StreamPatience(**wrong)  # type: ignore[arg-type]


class LateLooks(RuleBasedStateMachine):
    """Whoever looks is stopped again and again, or starved. A runner that sends and answers all the while is never
    left; one that is frozen is, once it was looked at for long enough.

    What comes while nobody is here waits, and is read only after the look that is due then.
    """

    GAP_S, ANSWER_S = 0.2, 0.05

    def __init__(self) -> None:
        super().__init__()
        self.now = self.due = 0.0
        self.watch = StreamWatch(PATIENCE, 0.0)
        self.alive = True
        self.answer_at: float | None = None
        self.next_token = self.GAP_S
        self.dead_s = 0.0  # for how long it was looked at since it froze, without what looks were late by
        self.found: set[Sight] = set()

    @initialize(reads_long=st.booleans(), steps=st.integers(0, 30))
    def begins(self, reads_long: bool, steps: int) -> None:
        """`reads_long`: its prompt is long, and it says nothing unless it is asked."""
        if reads_long:
            self.next_token = inf
        for _ in range(steps):
            self.on_time()

    def look(self) -> None:
        look = self.watch.look(self.now)
        self.found.add(look.sight)
        if look.sight is Sight.ASK:
            self.answer_at = self.now + self.ANSWER_S
        self.due = self.now + look.again_in_s

    def read(self) -> None:
        """All that has come by now."""
        if not self.alive:
            return
        if self.now >= self.next_token:
            self.watch.heard(self.now, tokens=True)
            self.watch.listening(self.now)
            self.next_token = self.now + self.GAP_S
        if self.answer_at is not None and self.now >= self.answer_at:
            self.watch.answered(self.now)
            self.answer_at = None

    @rule()
    def on_time(self) -> None:
        """Nobody is late for a while."""
        events = [self.due]
        if self.alive:
            events += [self.next_token, *([] if self.answer_at is None else [self.answer_at])]
        before, self.now = self.now, max(self.now, min(events))
        self.dead_s += 0.0 if self.alive else self.now - before
        if self.now >= self.due:
            self.look()
        self.read()

    @rule(late_s=st.floats(0.0, 60.0))
    def is_late(self, late_s: float) -> None:
        """Nothing is looked at nor read until so long after the next look's time."""
        self.dead_s += 0.0 if self.alive else max(0.0, self.due - self.now)
        self.now = max(self.now, self.due + late_s)
        if late_s > PATIENCE.late_s:
            self.dead_s = 0.0
        self.look()
        self.read()

    @precondition(lambda self: self.alive)
    @rule()
    def freezes(self) -> None:
        assert self.found <= {Sight.FINE, Sight.ASK}, "it lived all the while"
        self.alive, self.answer_at, self.dead_s = False, None, 0.0

    def teardown(self) -> None:
        if self.alive:
            assert self.found <= {Sight.FINE, Sight.ASK}, "it lived all the while"
            return
        while self.dead_s < PATIENCE.silent_s + PATIENCE.ask_after_s:
            self.on_time()
        assert Sight.SILENT in self.found


TestLateLooks = LateLooks.TestCase
TestLateLooks.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_look_that_is_a_little_late_again_and_again_is_no_silence() -> None:
    watch, now = StreamWatch(PATIENCE, 0.0), 0.0
    for _ in range(3):
        due = now + watch.look(now).again_in_s
        now = due + 0.9
    assert now > PATIENCE.silent_s
    assert watch.look(now).quiet_s == pytest.approx(now - 3 * 0.9)


def test_who_was_stopped_between_two_looks_reads_what_came_before_anybody_is_left() -> None:
    watch = StreamWatch(PATIENCE, 0.0)
    asked_at = watch.look(0.0).again_in_s
    asked = watch.look(asked_at)
    assert asked.sight is Sight.ASK
    now = asked_at + asked.again_in_s  # in time, and not run in between
    assert watch.look(now) == Look(Sight.FINE, now, SECOND_LOOK_S)
    watch.answered(now)  # it had come long ago
    assert watch.look(now + SECOND_LOOK_S).sight is Sight.FINE


def test_a_second_look_that_is_late_again_and_again_is_put_off_for_a_bounded_time() -> None:
    watch, now, looks = StreamWatch(PATIENCE, 0.0), 0.0, 0
    while (look := watch.look(now)).sight is not Sight.SILENT:
        now += look.again_in_s + 0.9
        looks += 1
    assert looks <= 20
