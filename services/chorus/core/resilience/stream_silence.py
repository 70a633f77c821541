"""Whether a stream on which nothing comes is only slow, or its runner is frozen, cut off, or stuck.

Silence alone says little: a prompt may be long, a queue too. So after a short silence the runner is asked whether it
lives. As long as it answers, only a stream that had a pace and lost it is held to be stuck, `stall_factor` times its
usual gap later; one that had too few tokens for a pace has `unpaced_s`. A runner that says nothing at all, neither on
the stream nor when asked, is silent after `silent_s`.

Who looks can stand still himself, when a laptop sleeps: what he missed then says nothing of the runner, and the count
begins anew. Where his machine is starved, each of his looks is late by less than that, and by so much longer the runner
has time. He may have been still between two looks that were both in time, too, and what came meanwhile lies unread: so
nobody is left before a second look a moment later. And while he is busy with a message, a slow caller is not the
runner's silence.

Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from chorus.core.errors import ConfigError
from chorus.core.generation import Priority

# How fast a longer gap than usual is forgotten; a longer one counts at once.
_FADING = 0.1
_LEAST_WAIT_S = 0.01
# What lies unread is read within that, unless this look is late as well; so many are put off at most.
SECOND_LOOK_S = 0.1
_SECOND_LOOK_LATE_S = 0.25
_MOST_PUT_OFF = 8


@dataclass(frozen=True, slots=True)
class StreamPatience:
    """How long a stream may be silent. `stall_s` is the least that counts as stuck where the runner answers.

    A gap is usual once `gaps_at_least` have been measured; until then, `unpaced_s` after a token is stuck. A look that
    comes `late_s` after its time begins anew; by what it is late otherwise, silences are held to be shorter.
    """

    ask_after_s: float = 0.75
    silent_s: float = 2.5
    stall_factor: float = 20.0
    stall_s: float = 5.0
    unpaced_s: float = 30.0
    gaps_at_least: int = 4
    late_s: float = 1.0

    def __post_init__(self) -> None:
        times = (self.ask_after_s, self.stall_factor, self.stall_s, self.unpaced_s, self.late_s)
        if not self.ask_after_s < self.silent_s or min(times) <= 0 or self.gaps_at_least < 1:
            raise ConfigError(f"no stream can be watched like this: {self}")


PATIENCE = StreamPatience()
_MORE_PATIENCE = StreamPatience(stall_s=60.0, unpaced_s=360.0)


def patience_with(priority: Priority) -> StreamPatience:
    """A stream that others may be put before stands still at times, and that is no fault of its runner's."""
    return PATIENCE if priority is Priority.INTERACTIVE else _MORE_PATIENCE


class Sight(StrEnum):
    """What a look at a stream finds. ASK: ask the runner now whether it lives."""

    FINE = "fine"
    ASK = "ask"
    SILENT = "silent"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class Look:
    """What was found, and in how many seconds to look again.

    `quiet_s`: for so long nothing had come on the stream; of SILENT, nor any other sign of life.
    """

    sight: Sight
    quiet_s: float
    again_in_s: float


class StreamWatch:
    """The decision for one attempt of one stream, which begins to be read at `now`."""

    __slots__ = ("_answered", "_asked", "_due", "_gaps", "_looks", "_patience", "_reading", "_since", "_usual_s")

    def __init__(self, patience: StreamPatience, now: float) -> None:
        self._patience = patience
        self._reading = True
        self._since = now  # since when the next message has been awaited
        self._answered = now
        self._asked: float | None = None
        self._due: float | None = None
        self._looks = 0  # that have found it silent or stuck since it last said something
        self._gaps = 0
        self._usual_s = 0.0

    def heard(self, now: float, *, tokens: bool) -> None:
        """A message came, with tokens or without; nothing is awaited until `listening`."""
        if tokens:
            gap = max(0.0, now - self._since)
            if self._gaps:  # what came before the first tokens is no gap
                self._usual_s = max(gap, self._usual_s + (gap - self._usual_s) * _FADING)
            self._gaps += 1
        else:
            self._gaps = 0
            self._usual_s = 0.0
        self._reading = False
        self._asked = None
        self._looks = 0

    def listening(self, now: float) -> None:
        """The message was dealt with, and the next one is awaited."""
        self._reading = True
        self._since = now

    def answered(self, now: float) -> None:
        """The runner was asked whether it lives, and it does."""
        self._answered = max(self._answered, now)
        self._asked = None
        self._looks = 0

    def unanswered(self) -> None:
        """It was asked, and did not answer in the time that a question has; it may be asked again."""
        self._asked = None

    @property
    def stall_after_s(self) -> float | None:
        """After what silence the stream is stuck, though its runner answers; None before its first token, since nobody
        knows how long a prompt takes."""
        patience = self._patience
        if not self._gaps:
            return None
        least_s = patience.stall_s if self._gaps > patience.gaps_at_least else patience.unpaced_s
        return max(least_s, patience.stall_factor * self._usual_s)

    def look(self, now: float) -> Look:
        """What to make of the stream at `now`; the next look is due in `again_in_s`."""
        late_s = 0.0 if self._due is None else max(0.0, now - self._due)
        if late_s:
            self._excuse(late_s, now)
        found = self._look(now)
        if found.sight is Sight.SILENT or found.sight is Sight.STALLED:
            self._looks += 1
            put_off = late_s > _SECOND_LOOK_LATE_S and self._looks < _MOST_PUT_OFF
            if self._looks == 1 or put_off:
                found = Look(Sight.FINE, found.quiet_s, SECOND_LOOK_S)
        self._due = now + found.again_in_s
        return found

    def _excuse(self, late_s: float, now: float) -> None:
        """For so long nobody was here to notice what came."""
        if late_s > self._patience.late_s:
            self._since = self._answered = now
            self._asked = None
            return
        self._since = min(self._since + late_s, now)
        self._answered = min(self._answered + late_s, now)
        if self._asked is not None:
            self._asked = min(self._asked + late_s, now)

    def _look(self, now: float) -> Look:
        patience = self._patience
        if not self._reading:
            return Look(Sight.FINE, 0.0, patience.ask_after_s)
        quiet_s = now - self._since
        lifeless_s = now - max(self._since, self._answered)
        time_to_answer_s = (patience.silent_s - patience.ask_after_s) / 2
        if lifeless_s >= patience.silent_s:
            if self._asked is None:
                self._asked = now
                return Look(Sight.ASK, quiet_s, time_to_answer_s)
            missing_s = self._asked + time_to_answer_s - now
            if missing_s > 0:
                return Look(Sight.FINE, quiet_s, max(missing_s, _LEAST_WAIT_S))
            return Look(Sight.SILENT, lifeless_s, patience.ask_after_s)
        stall_after_s = self.stall_after_s
        if stall_after_s is not None and quiet_s >= stall_after_s:
            return Look(Sight.STALLED, quiet_s, patience.ask_after_s)
        waits = [patience.silent_s - lifeless_s]
        if stall_after_s is not None:
            waits.append(stall_after_s - quiet_s)
        sight = Sight.FINE
        if self._asked is None:
            if lifeless_s >= patience.ask_after_s:
                sight, self._asked = Sight.ASK, now
            else:
                waits.append(patience.ask_after_s - lifeless_s)
        return Look(sight, quiet_s, max(min(waits), _LEAST_WAIT_S))
