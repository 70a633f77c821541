"""One stream over all of its attempts, whatever its runners do: the caller has the answer's beginning, once, and hears
the truth at the end.

The model is a list of tokens for each choice: token `index` of choice `choice` is `1000 * choice + index`. Runners are
simple ones that go on from what they were given, send again what was delivered before, leave something out, contradict
it, or die.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.core.errors import ChorusError, DrainingError, EngineError, InvalidRequestError, UnavailableError
from chorus.core.resilience.delivered import Delivered
from chorus.core.resilience.resuming import Hold, Place, ResumePolicy, Resuming
from chorus.core.resilience.retries import GiveUp, RetryBudget

CHOICES = 2
RUNNERS = ("alpha", "beta", "gamma")
LOSSES = (UnavailableError, DrainingError, EngineError)
POLICY = ResumePolicy(wait_s=5.0, fruitless=3, most=6, again_after_s=0.1)


def token(choice: int, index: int) -> int:
    return 1000 * choice + index


class FailoverWorld(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.budget = RetryBudget(ratio=0.2, floor_per_s=0.5, reserve=3.0)
        self.resuming = Resuming(POLICY, self.budget)
        self.delivered = Delivered(CHOICES)
        self.caller: dict[int, list[int]] = {choice: [] for choice in range(CHOICES)}
        self.runner: str | None = None
        self.sent: dict[int, int] = {}  # the index that the runner sends next, by choice
        self.at_begin = 0
        self.breaks = 0
        self.fruitless = 0  # attempts in a row that brought no token
        self.waiting_since: float | None = None
        self.end: ChorusError | None = None
        self.finished = False

    @property
    def count(self) -> int:
        return sum(map(len, self.caller.values()))

    @property
    def over(self) -> bool:
        return self.finished or self.end is not None

    def attempt(self, runner: str) -> None:
        self.delivered.begin(with_ids=True, can_resume=True)
        given = {choice.choice: choice.token_ids for choice in self.delivered.choices()}
        assert given == {choice: tuple(tokens) for choice, tokens in self.caller.items() if tokens}
        self.runner = runner
        self.sent = {choice: len(tokens) for choice, tokens in self.caller.items()}
        self.at_begin = self.count

    def broke(self, error: ChorusError) -> None:
        """The attempt has ended with an error, as the coordinator is told it."""
        assert self.runner is not None
        gained = self.count > self.at_begin
        foreseen = self.resuming.may_break(self.count)
        gave_up = self.resuming.broken(error, self.runner, delivered=self.count, obstacle="", now=self.now)
        if isinstance(error, LOSSES):
            self.breaks += 1
            if gained or self.breaks == 1:
                self.fruitless, self.waiting_since = 0, self.now
            self.fruitless += 1
            assert foreseen == (gave_up is None)
            bounded = self.fruitless <= POLICY.fruitless and self.breaks <= POLICY.most
            assert (gave_up is None) == bounded
        else:
            assert gave_up is not None, "the request's own fault is nobody else's to mend"
        self.runner = None
        if gave_up is not None:
            self.given_up(gave_up)

    def given_up(self, gave_up: GiveUp) -> None:
        self.end = gave_up.error
        # What was delivered stays the caller's, who is told how much that is.
        assert self.end.metadata["delivered_tokens"] == str(self.count)

    @initialize(runner=st.sampled_from(RUNNERS))
    def begins(self, runner: str) -> None:
        self.attempt(runner)
        self.tells(0, 1)

    @precondition(lambda self: self.runner is not None)
    @rule(choice=st.integers(0, CHOICES - 1), count=st.integers(1, 4))
    def tells(self, choice: int, count: int) -> None:
        """The runner goes on, some tokens in one message."""
        index = self.sent[choice]
        ids = [token(choice, index + k) for k in range(count)]
        told = self.delivered.take(choice, index, ids, now=self.now)
        self.sent[choice] += count
        assert told == len(self.caller[choice])
        self.caller[choice] += ids

    @precondition(lambda self: self.runner is not None)
    @rule(choice=st.integers(0, CHOICES - 1), data=st.data())
    def repeats(self, choice: int, data: st.DataObject) -> None:
        """It sends again what the caller has: nothing of it is delivered."""
        have = self.caller[choice]
        if have:
            index = data.draw(st.integers(0, len(have) - 1))
            end = data.draw(st.integers(index + 1, len(have)))
            assert self.delivered.take(choice, index, have[index:end], now=self.now) is None

    @precondition(lambda self: self.runner is not None)
    @rule(choice=st.integers(0, CHOICES - 1), gap=st.integers(1, 3))
    def leaves_out(self, choice: int, gap: int) -> None:
        """It leaves tokens out: an error of its own, and somebody else goes on."""
        index = len(self.caller[choice]) + gap
        self.fails_to_take(choice, index, token(choice, index))

    @precondition(lambda self: self.runner is not None and self.count > 0)
    @rule(choice=st.integers(0, CHOICES - 1), data=st.data())
    def contradicts(self, choice: int, data: st.DataObject) -> None:
        have = self.caller[choice]
        if have:
            index = data.draw(st.integers(0, len(have) - 1))
            self.fails_to_take(choice, index, have[index] + 1)

    def fails_to_take(self, choice: int, index: int, token_id: int) -> None:
        try:
            self.delivered.take(choice, index, [token_id], now=self.now)
        except EngineError as error:
            self.broke(error)
        else:
            raise AssertionError("it was taken")

    @precondition(lambda self: self.runner is not None)
    @rule(kind=st.sampled_from(LOSSES))
    def is_lost(self, kind: type[ChorusError]) -> None:
        self.broke(kind("it is gone"))

    @precondition(lambda self: self.runner is not None)
    @rule()
    def is_refused(self) -> None:
        self.broke(InvalidRequestError("prompt", "is no prompt"))

    @precondition(lambda self: self.runner is not None)
    @rule()
    def ends(self) -> None:
        """The runner is done, and says how many tokens each choice has in all."""
        for choice, have in self.caller.items():
            assert self.delivered.token_count(choice, len(have)) == len(have)
        self.runner, self.finished = None, True

    @precondition(lambda self: self.runner is None and not self.over)
    @rule(seconds=st.floats(0.0, 2.0), runner=st.sampled_from(RUNNERS), found=st.booleans())
    def looks(self, seconds: float, runner: str, found: bool) -> None:
        """Somebody is looked for, some time later."""
        self.now += seconds
        step = self.resuming.look(self.now)
        assert self.waiting_since is not None
        waited = self.now - self.waiting_since
        match step:
            case GiveUp():
                assert waited >= POLICY.wait_s
                self.given_up(step)
            case Hold(wait_s):
                assert 0.0 <= wait_s <= 0.25
            case Place(anybody, wait_s):
                assert 0.0 <= wait_s <= 0.25
                if found and (anybody or runner not in self.resuming.failed):
                    self.attempt(runner)
                else:
                    self.resuming.refused(UnavailableError("nobody has a place"))

    @precondition(lambda self: self.over)
    @rule()
    def nothing_more(self) -> None:
        """It has ended, well or with one error."""
        assert self.finished != (self.end is not None)

    @invariant()
    def the_caller_has_the_beginning_of_the_answer_once(self) -> None:
        for choice, have in self.caller.items():
            assert have == [token(choice, index) for index in range(len(have))]
        assert self.delivered.output_tokens == self.count

    @invariant()
    def it_is_bounded(self) -> None:
        assert self.breaks <= POLICY.most + 1
        assert self.fruitless <= POLICY.fruitless + 1


TestFailoverWorld = FailoverWorld.TestCase
TestFailoverWorld.settings = settings(max_examples=150, stateful_step_count=40)
