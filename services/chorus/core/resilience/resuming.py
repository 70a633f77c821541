"""Whether and when a stream that broke off goes on at another runner.

Other than before its first token, nobody can take its place: a caller who has half an answer would have to ask anew.
So nobody gives up at once where no runner has a place: for `wait_s` one may come back, restart, or end other work. And
a runner that failed may be asked again after a while, if there is no other, since an engine's broken thread is replaced
in its process.

Who looks can be late himself, when his process was stopped or starved. He did not look around then, and does so once
more before he gives up.

Attempts that bring no token are bounded (`fruitless`), and so are all of them (`most`). One that was refused because a
place was taken meanwhile failed nowhere: it is bounded by the wait alone. The first resume of a request
costs nothing of the mesh's retry budget: the work that it asks for was given up elsewhere a moment ago. Those after it
wait for the budget.

Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from chorus.core.errors import ChorusError, OverloadedError, UnavailableError
from chorus.core.resilience.retries import GiveUp, RetryBudget, may_go_better_elsewhere

# Loads change without a change of the directory, so a place is looked for this often.
_LOOK_S = 0.25
_LATE_S = 1.0
_AGAIN_MOST_S = 2.0


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """How long a stream that broke off waits for a runner, and how often it may break off.

    A runner that failed it is asked again after `again_after_s`, twice as long after each attempt that brought nothing,
    but two seconds at most.
    """

    wait_s: float = 10.0
    fruitless: int = 3
    most: int = 16
    again_after_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Place:
    """Place it now: on nobody who failed it, or, where they may be asked again, on `anybody`.

    Where that is refused, look again in `seconds`, or as soon as the directory changes.
    """

    anybody: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Look again in so many seconds."""

    seconds: float


Step: TypeAlias = Place | Hold | GiveUp


class Resuming:
    """The breaks of one stream. After each `broken` that returns None, do as `look` says until an attempt begins."""

    def __init__(self, policy: ResumePolicy, budget: RetryBudget) -> None:
        self._policy = policy
        self._budget = budget
        self._delivered = 0
        self._count = 0
        self._fruitless = 0
        self._attempts = 0  # since it last went on
        self._waiting_since = 0.0
        self._broken_at = 0.0
        self._looked = False
        self._looked_again = False  # after the wait was over
        self._due = 0.0  # when the next look is to come at the latest, if there was one
        self._paid = False
        self._last: ChorusError = UnavailableError("the stream broke off")
        self._refusal = ""
        self.failed: set[str] = set()
        """Ids of the runners that have failed it since it last went on."""

    def may_break(self, delivered: int) -> bool:
        """Whether it would go on elsewhere if it broke off now, with so many tokens delivered."""
        fruitless = 1 if delivered > self._delivered else self._fruitless + 1
        return fruitless <= self._policy.fruitless and self._count < self._policy.most

    def broken(self, error: ChorusError, runner_id: str, *, delivered: int, obstacle: str, now: float) -> GiveUp | None:
        """An attempt at a runner ended with `error`, when `delivered` tokens had been delivered in all.

        `obstacle` says why nobody else can go on, and is empty where somebody can.
        """
        if not may_go_better_elsewhere(error):
            error.metadata = {**error.metadata, "delivered_tokens": str(delivered)}
            return GiveUp(error)
        went_on = delivered > self._delivered or not self._count
        full = not went_on and isinstance(error, OverloadedError) and self._count < self._policy.most
        may_go_on = full or self.may_break(delivered)
        if went_on:
            self._fruitless = self._attempts = 0
            self._waiting_since = now
            self.failed.clear()
        self._fruitless += not full
        self._attempts += 1
        self._count += 1
        self._delivered = delivered
        self._broken_at = now
        self._looked = self._looked_again = False
        self._paid = self._count == 1
        self._last, self._refusal = error, ""
        self.failed.add(runner_id)
        if obstacle:
            return self._give_up(f"it cannot go on elsewhere: {obstacle}")
        if not may_go_on:
            return self._give_up("every attempt to go on with it failed")
        if full and now >= self._waiting_since + self._policy.wait_s:
            return self._give_up(self._nobody())
        return None

    def look(self, now: float) -> Step:
        """What to do next."""
        policy = self._policy
        left_s = self._waiting_since + policy.wait_s - now
        late, self._due = self._looked and now - self._due > _LATE_S, now + _LOOK_S
        if self._looked and left_s <= 0 and late and not self._looked_again:
            self._looked_again = True
            left_s = _LOOK_S
        elif self._looked and left_s <= 0:
            return self._give_up(self._nobody())
        self._looked = True
        if not self._paid:
            self._paid = self._budget.spend(now)
        seconds = min(_LOOK_S, max(left_s, 0.0))
        if not self._paid:
            return Hold(seconds)
        again_in_s = self._broken_at + min(policy.again_after_s * 2.0 ** (self._attempts - 1), _AGAIN_MOST_S) - now
        if again_in_s <= 0:
            return Place(anybody=True, seconds=seconds)
        return Place(anybody=False, seconds=min(seconds, again_in_s))

    def refused(self, refusal: ChorusError) -> None:
        """Nobody could be found; what the refusal says is told if it comes to that."""
        self._refusal = refusal.message

    def _nobody(self) -> str:
        because = f" ({self._refusal})" if self._refusal else ""
        return f"nobody could go on with it within {self._policy.wait_s:g} s{because}"

    def _give_up(self, why: str) -> GiveUp:
        """UNAVAILABLE whatever it was: the request was right, and another coordinator may go on with what there is."""
        told = f"{self._last.message}; the answer broke off after {self._delivered} tokens, and {why}"
        facts = {"delivered_tokens": str(self._delivered), "cause": self._last.reason}
        return GiveUp(UnavailableError(told, metadata={**self._last.metadata, **facts}))
