"""Looking after one attempt's call: a runner that is silent or stuck is left, where somebody else can go on.

The decision is `core/resilience/stream_silence.py`'s. Here are its clock, the question whether the runner lives, and
the end of the call. Nothing is armed again for each message: a timer looks now and then at when the last one came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from chorus.coordinator.channels import RunnerChannel
from chorus.core.errors import UnavailableError
from chorus.core.resilience.stream_silence import Look, Sight, StreamPatience, StreamWatch


class StreamGuard:
    """Use it as `with` around the reading of `call`. Leaving a runner cancels the call, and `left` says why.

    `goes_elsewhere(alive)` says whether somebody else would go on at once, if this runner, which lives or not, were
    left. A runner that shows no sign of life for `wait_s` more is left even so.
    """

    def __init__(
        self,
        channel: RunnerChannel,
        call: Any,
        *,
        patience: StreamPatience,
        wait_s: float,
        goes_elsewhere: Callable[[bool], bool],
        clock: Callable[[], float],
    ) -> None:
        self._channel = channel
        self._call = call
        self._wait_s = wait_s
        self._goes_elsewhere = goes_elsewhere
        self._clock = clock
        self.watch = StreamWatch(patience, clock())
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self.left: UnavailableError | None = None

    def __enter__(self) -> Self:
        self._look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        look = self.watch.look(self._clock())
        if look.sight is Sight.ASK:
            self._channel.ask().add_done_callback(self._answered)
        elif look.sight is Sight.SILENT:
            self._channel.suspect()
            self._channel.ask().add_done_callback(self._answered)
            if self._goes_elsewhere(False) or look.quiet_s >= self._patience.silent_s + self._wait_s:
                return self._leave(look, "has shown no sign of life")
        elif look.sight is Sight.STALLED and self._goes_elsewhere(True):
            return self._leave(look, "lives, but has sent nothing of this answer")
        self._timer = asyncio.get_running_loop().call_later(look.again_in_s, self._look)
        return None

    def _leave(self, look: Look, what: str) -> None:
        self.left = UnavailableError(f"the runner {self._channel.runner_id} {what} for {look.quiet_s:.1f} s")
        self._call.cancel()

    def _answered(self, asked: asyncio.Task[bool]) -> None:
        if self._ended or asked.cancelled():
            return
        if asked.exception() is None and asked.result():
            self.watch.answered(self._clock())
        else:
            self.watch.unanswered()
