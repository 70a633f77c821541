"""Whether a request whose attempt failed is tried on another runner, and which error its caller gets in the end.

Another runner is tried only while nothing was delivered (`resuming` decides what comes after), only where the trouble
was the runner's and not the request's, and only as long as attempts and the mesh's retry budget last. Times are seconds
on any clock that only goes forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from chorus.core.errors import (
    BudgetExhaustedError,
    ChorusError,
    DrainingError,
    EngineError,
    ModelFileError,
    OutOfMemoryError,
    OverloadedError,
    PromptTooLongError,
    RunnersUnavailableError,
    UnavailableError,
    UnknownModelError,
)

LOST = "runner_lost"
"""In an error's metadata: the runner itself said nothing; its process, or the way to it, is gone."""

# What may go better on another runner, and how much each tells a caller who has to be told one of several.
# Waiting for a place will help; a prompt that is too long everywhere will not get shorter.
_TELLING: dict[type[ChorusError], int] = {
    PromptTooLongError: 5,
    OverloadedError: 4,
    BudgetExhaustedError: 3,  # another coordinator was quicker; engines of the household cost nothing
    EngineError: 3,
    ModelFileError: 3,
    OutOfMemoryError: 3,
    UnavailableError: 2,
    DrainingError: 0,
    UnknownModelError: 0,  # the directory was out of date
}
_TELLING_OF_OTHERS = 1


def may_go_better_elsewhere(error: ChorusError) -> bool:
    """Whether an attempt's error is the runner's trouble, so that the same request may succeed on another one."""
    return type(error) in _TELLING


def context_needed(error: ChorusError) -> int:
    """How many tokens of context are known to be needed after an attempt that failed with `error`; 0 if it doesn't say.

    More than there was where it failed, at any rate.
    """
    return max(error.prompt_tokens, error.context_length) + 1 if isinstance(error, PromptTooLongError) else 0


class RetryBudget:
    """How much of the mesh's work may be retries, so that failing runners aren't answered with a multiple of the load.

    Every request earns `ratio` of a retry, and `floor_per_s` more come by themselves every second, for a mesh with
    little to do. At most `reserve` are saved up.
    """

    def __init__(self, *, ratio: float = 0.2, floor_per_s: float = 2.0, reserve: float = 20.0) -> None:
        self._ratio = ratio
        self._floor_per_s = floor_per_s
        self._reserve = reserve
        self._balance = reserve
        self._counted_at: float | None = None

    def earn(self, now: float) -> None:
        """A request has come."""
        self._refill(now)
        self._balance = min(self._reserve, self._balance + self._ratio)

    def spend(self, now: float) -> bool:
        """Takes one retry, and says whether there was one."""
        self._refill(now)
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True

    def _refill(self, now: float) -> None:
        if self._counted_at is not None:
            gained = max(0.0, now - self._counted_at) * self._floor_per_s
            self._balance = min(self._reserve, self._balance + gained)
        self._counted_at = now


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Place it anew, on none of the runners tried so far; `context_length` is what is now known to be needed, or 0."""

    context_length: int = 0


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Tell the caller this."""

    error: ChorusError


Decision: TypeAlias = TryAgain | GiveUp


@dataclass(slots=True)
class Attempts:
    """The attempts of one request. Ask `place` anew after each `TryAgain`; if it refuses, raise `refused`'s error.

    `avoided` is a runner that has failed its caller already; it counts as tried until nobody else can be asked.
    """

    max_attempts: int
    budget: RetryBudget
    tried: set[str] = field(default_factory=set)
    errors: list[ChorusError] = field(default_factory=list)
    lost_at: float | None = None
    """When a runner was lost that had the request, if one was."""
    count: int = 0
    """Attempts begun so far."""
    avoided: str = ""

    def __post_init__(self) -> None:
        if self.avoided:
            self.tried.add(self.avoided)

    def begin(self, runner_id: str) -> int:
        """Notes that an attempt begins; returns its number, from 1."""
        self.tried.add(runner_id)
        self.count += 1
        return self.count

    def failed(self, error: ChorusError, *, delivered: bool, now: float) -> Decision:
        """An attempt ended with `error`; `delivered` says whether the caller has got any part of the answer."""
        if delivered or not may_go_better_elsewhere(error):
            return GiveUp(error)
        self.errors.append(error)
        if LOST in error.metadata:
            self.lost_at = now
        if self.count >= self.max_attempts or not self.budget.spend(now):
            return GiveUp(most_telling(self.errors))
        return TryAgain(context_needed(error))

    def may_wait(self, refusal: ChorusError, now: float, wait_s: float) -> bool:
        """Whether somebody is waited for, though nobody can be asked now; all may be tried anew then.

        Only where a runner was lost with the request, less than `wait_s` ago: it was taken on, and the runner may be
        back in a moment. Who is refused from the beginning is told at once.
        """
        if self.lost_at is None or now >= self.lost_at + wait_s or not isinstance(refusal, RunnersUnavailableError):
            return False
        self.tried.clear()
        return True

    def avoids_no_more(self) -> bool:
        """Nobody can be asked: whether the avoided runner may be now, which is so once."""
        avoided, self.avoided = self.avoided, ""
        self.tried.discard(avoided)
        return bool(avoided)

    def refused(self, refusal: ChorusError) -> ChorusError:
        """The error for the caller where nobody is left to try: the placement's own, or one of the attempts before."""
        if not self.errors:
            return refusal
        return most_telling([*self.errors, refusal])


def most_telling(errors: Sequence[ChorusError]) -> ChorusError:
    """The error of several (at least one) that a caller learns most from; the last of equals.

    Of prompts that were too long, the one with the longest context; of overloads, the one with the shortest wait.
    """
    most = max(map(_telling, errors))
    found = [error for error in errors if _telling(error) == most]
    too_long = [error for error in found if isinstance(error, PromptTooLongError)]
    if too_long:
        return max(too_long, key=lambda error: error.context_length)
    hopeful = [error for error in found if isinstance(error, OverloadedError) and error.retry_after_s is not None]
    if hopeful:
        return min(hopeful, key=lambda error: error.retry_after_s or 0.0)
    return found[-1]


def _telling(error: ChorusError) -> int:
    # A refusal that only says that everybody was tried tells less than what they said, and more than "not me".
    if isinstance(error, RunnersUnavailableError):
        return _TELLING_OF_OTHERS
    return _TELLING.get(type(error), _TELLING_OF_OTHERS)
