"""The supervisor's one decision, against a model of it written another way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.core.errors import InternalError
from chorus.core.resilience.restarts import LeaveDown, ProcessPhase, RestartPolicy, Restarts, StartAgain

POLICIES = st.builds(
    RestartPolicy,
    supervised=st.booleans(),
    first_backoff_s=st.floats(0.01, 5),
    backoff_factor=st.floats(1, 10),
    longest_backoff_s=st.floats(5, 100),
    healthy_after_s=st.floats(0.5, 60),
    failures_allowed=st.integers(1, 6),
)


def test_three_failures_in_a_row_leave_it_down() -> None:
    restarts = Restarts(RestartPolicy())
    decisions = []
    for moment in range(3):
        restarts.started()
        decisions.append(restarts.ended(float(moment)))
    assert decisions == [StartAgain(at=0.5, failures=1), StartAgain(at=2.0, failures=2), LeaveDown(failures=3)]
    assert restarts.phase is ProcessPhase.DOWN


def test_a_process_that_proved_itself_starts_counting_anew() -> None:
    restarts = Restarts(RestartPolicy(healthy_after_s=10))
    for moment in (0.0, 1.0):
        restarts.started()
        restarts.ended(moment)
    restarts.started()
    restarts.healthy(2.0)
    assert restarts.ended(12.0) == StartAgain(at=12.5, failures=1)


def test_running_long_without_ever_serving_proves_nothing() -> None:
    restarts = Restarts(RestartPolicy(healthy_after_s=10))
    for moment in (1000.0, 2000.0):
        restarts.started()
        assert isinstance(restarts.ended(moment), StartAgain)
    restarts.started()
    assert restarts.ended(3000.0) == LeaveDown(failures=3)


def test_without_supervision_the_first_end_is_the_last() -> None:
    restarts = Restarts(RestartPolicy(supervised=False))
    restarts.started()
    restarts.healthy(0.0)
    assert restarts.ended(1e6) == LeaveDown(failures=1)


def test_started_by_hand_it_has_all_its_tries_again() -> None:
    restarts = Restarts(RestartPolicy())
    for _ in range(3):
        restarts.started()
        restarts.ended(0.0)
    restarts.started()
    assert restarts.failures == 0
    assert restarts.ended(1.0) == StartAgain(at=1.5, failures=1)


def test_what_cannot_happen_is_refused() -> None:
    restarts = Restarts(RestartPolicy())
    with pytest.raises(InternalError):
        restarts.healthy(0.0)
    restarts.started()
    with pytest.raises(InternalError):
        restarts.started()


@given(policy=POLICIES, failures=st.integers(1, 10_000))
def test_the_backoff_grows_to_its_cap_and_no_further(policy: RestartPolicy, failures: int) -> None:
    wait = policy.backoff_s(failures)
    assert min(policy.first_backoff_s, policy.longest_backoff_s) <= wait <= policy.longest_backoff_s
    assert wait <= policy.backoff_s(failures + 1)


class RestartsAgainstItsHistory(RuleBasedStateMachine):
    """The model keeps the whole history of runs and counts failures from it, where the code keeps two numbers."""

    @initialize(policy=POLICIES)
    def begin(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self.restarts = Restarts(policy)
        self.now = 0.0
        self.proofs: list[bool] = []  # for each end in a row: whether its run had proved itself
        self.healthy_at: float | None = None

    @rule(seconds=st.floats(0, 120))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: not self.restarts.running)
    @rule()
    def start(self) -> None:
        if self.restarts.phase is not ProcessPhase.WAITING:
            self.proofs = []
        self.healthy_at = None
        self.restarts.started()

    @precondition(lambda self: self.restarts.running)
    @rule()
    def health(self) -> None:
        self.restarts.healthy(self.now)
        self.healthy_at = self.now if self.healthy_at is None else self.healthy_at

    @precondition(lambda self: self.restarts.running)
    @rule()
    def end(self) -> None:
        proved = self.healthy_at is not None and self.now - self.healthy_at >= self.policy.healthy_after_s
        self.proofs.append(proved)
        self.healthy_at = None
        last_proof = max((place for place, proof in enumerate(self.proofs) if proof), default=0)
        in_a_row = len(self.proofs) - last_proof
        decision = self.restarts.ended(self.now)
        assert decision.failures == in_a_row
        if in_a_row >= self.policy.failures_allowed or not self.policy.supervised:
            assert decision == LeaveDown(in_a_row)
        else:
            assert isinstance(decision, StartAgain)
            assert 0 < decision.at - self.now <= self.policy.longest_backoff_s * (1 + 1e-9) + 1e-6

    @rule()
    def stop(self) -> None:
        self.restarts.stopped()
        self.healthy_at = None

    @invariant()
    def never_beyond_the_allowance(self) -> None:
        if hasattr(self, "restarts"):
            assert self.restarts.failures <= self.policy.failures_allowed


RestartsAgainstItsHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRestartsAgainstItsHistory = RestartsAgainstItsHistory.TestCase
