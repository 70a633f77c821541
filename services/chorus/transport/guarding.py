"""Looking after one call: a peer that is silent or stuck is left, where somebody else can go on.

The decision is `core/resilience/stream_silence.py`'s. Here are its clock, the question whether the peer lives, and the
end of the call. Nothing is armed again for each message: a timer looks now and then at when the last one came.

A coordinator looks after its calls to runners so, and a client after its calls to coordinators.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

from chorus.core.errors import UnavailableError
from chorus.core.resilience.retries import LOST
from chorus.core.resilience.stream_silence import Sight, StreamPatience, StreamWatch

QUESTION_TIMEOUT_S = 2.0
"""What an answer to the question whether a peer lives may take."""
# Statuses that a call can end with though the peer's process said nothing.
_NO_ANSWER = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Question:
    """Whether the peer at the other end of a channel lives: one question at a time, for all who ask meanwhile.

    `method` is a cheap unary RPC on that channel, and `request` what it is called with.
    """

    def __init__(self, method: Any, request: Any) -> None:
        self._method = method
        self._request = request
        self._asking: asyncio.Task[bool] | None = None

    def ask(self) -> asyncio.Task[bool]:
        """The result is whether the peer said anything, be it an error."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._answers())
        return self._asking

    async def close(self) -> None:
        """Nobody waits for an answer any more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    async def _answers(self) -> bool:
        try:
            await self._method(self._request, timeout=QUESTION_TIMEOUT_S)
        except grpc.RpcError as error:
            return error.code() not in _NO_ANSWER
        return True


class GuardedPeer(Protocol):
    """Whom a call is made to."""

    @property
    def called(self) -> str:
        """Who that is, as in `the runner alpha`."""
        ...

    @property
    def is_shut_out(self) -> bool:
        """Whether it was revoked, so that nothing that it says is to be believed."""
        ...

    def ask(self) -> asyncio.Task[bool]:
        """Asks whether it lives; the result is whether it said anything."""
        ...

    def suspect(self) -> None:
        """A call has found it silent."""
        ...


class StreamGuard:
    """Use it as `with` around the reading of `call`. Leaving a peer cancels the call, and `left` says why.

    `goes_elsewhere(alive)` says whether somebody else would go on at once, if this peer, which lives or not, were left.
    A peer that shows no sign of life for `wait_s` more is left even so.
    """

    def __init__(
        self,
        peer: GuardedPeer,
        call: Any,
        *,
        patience: StreamPatience,
        wait_s: float,
        goes_elsewhere: Callable[[bool], bool],
        clock: Callable[[], float],
    ) -> None:
        self._peer = peer
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
        if self._peer.is_shut_out:
            return self._leave("was revoked by an admin")
        if look.sight is Sight.ASK:
            self._peer.ask().add_done_callback(self._answered)
        elif look.sight is Sight.SILENT:
            self._peer.suspect()
            self._peer.ask().add_done_callback(self._answered)
            if self._goes_elsewhere(False) or look.quiet_s >= self._patience.silent_s + self._wait_s:
                return self._leave(f"has shown no sign of life for {look.quiet_s:.1f} s")
        elif look.sight is Sight.STALLED and self._goes_elsewhere(True):
            return self._leave(f"lives, but has sent nothing of this answer for {look.quiet_s:.1f} s")
        self._timer = asyncio.get_running_loop().call_later(look.again_in_s, self._look)
        return None

    def _leave(self, what: str) -> None:
        self.left = UnavailableError(f"{self._peer.called} {what}", metadata={LOST: "true"})
        self._call.cancel()

    def _answered(self, asked: asyncio.Task[bool]) -> None:
        if self._ended or asked.cancelled():
            return
        if asked.exception() is None and asked.result():
            self.watch.answered(self._clock())
        else:
            self.watch.unanswered()


def is_being_cancelled() -> bool:
    """Whether the task that asks was told to end, where a CancelledError may as well be that of a call of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
