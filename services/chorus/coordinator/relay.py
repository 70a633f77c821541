"""Passing a runner's stream on, byte for byte: the hot path of the mesh.

A runner's message and a coordinator's have the event in the same field, so a message is passed on as it came, with
whatever fields a newer runner put into it. It is parsed once, to see what kind of event it is and what it delivers.

What a runner says before its first token binds nobody: another runner may still take over. So Queued and Progress go
through at once (a caller should see that work goes on), while Started and PromptScored, which come once in a stream,
are held back until the first token of the same attempt follows.

An attempt that goes on with what another one began has its Started told as AttemptChanged, when its first token comes.
Only there are messages changed: what the last runner cannot know of the attempts before it is put right.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from chorus.api.runner.v1 import runner_pb2
from chorus.core.errors import EngineError, UnavailableError
from chorus.core.resilience.delivered import Delivered
from chorus.telemetry.metrics import StreamTimer

Write = Callable[[bytes], Awaitable[None]]

# A prompt's log-probabilities may fill a message; Started and a little progress come beside them.
_HELD_MAX_BYTES = 8 << 20
_MESSAGE_BYTES = 64  # what one takes beside its content

_parse = runner_pb2.GenerateResponse.FromString


class Attempt(Protocol):
    """What the relay has to be told of an attempt, and tells of it."""

    def started(self, message: runner_pb2.GenerateResponse) -> None:
        """The runner has read the prompt."""

    def substituted(self) -> bytes | None:
        """The message that says so where another model answers than the one asked for; asked as `taken_over` is."""

    def taken_over(self) -> bytes | None:
        """The message that says so where this attempt goes on with another's answer; asked once, at its first token."""

    def finished(self, message: runner_pb2.GenerateResponse) -> bytes | None:
        """The last message with what the runner cannot know, or None where nothing need be changed."""


class Watch(Protocol):
    """Is told when something comes, so that somebody notices when nothing does. Times are the clock's seconds."""

    def heard(self, now: float, *, tokens: bool) -> None:
        """A message came."""

    def listening(self, now: float) -> None:
        """It was passed on; the next one is awaited."""


class HeldBack:
    """What a runner has said before its first token, which is told once that has come. It is bounded."""

    def __init__(self, runner_id: str) -> None:
        self.messages: list[bytes] = []
        self._runner_id = runner_id
        self._size = 0

    def add(self, message: bytes) -> None:
        """Holds one more back. Raises EngineError where it is too much."""
        self._size += len(message) + _MESSAGE_BYTES
        if self._size > _HELD_MAX_BYTES:
            raise EngineError(f"the runner {self._runner_id} says too much before its first token")
        self.messages.append(message)


async def relay(
    messages: AsyncIterable[bytes],
    write: Write,
    delivered: Delivered,
    attempt: Attempt,
    *,
    runner_id: str,
    timer: StreamTimer,
    clock: Callable[[], float],
    watch: Watch,
) -> None:
    """Passes an attempt's messages on until Finished has been.

    Raises UnavailableError where the stream ends without, or is none, EngineError where it leaves something out,
    contradicts what was delivered, or doesn't begin; and what `messages` and `write` raise.
    """
    held = HeldBack(runner_id)
    resumes, begun = delivered.started, False
    async for raw in messages:
        try:
            message = _parse(raw)
        except DecodeError as error:
            raise UnavailableError(f"the runner {runner_id} sent what is no message of a generation") from error
        event = message.event
        kind = event.WhichOneof("event")
        now = clock()
        if kind == "delta":
            watch.heard(now, tokens=True)
            delta = event.delta
            # Each look into a message costs a tenth of all that is done with it here, so nothing is looked up twice.
            told, token_ids = delta.index, delta.token_ids
            if token_ids:
                index = delivered.take(delta.choice, told, token_ids, now=now)
            else:
                more = bool(delta.reasoning) or delta.HasField("tool_call")
                index = delivered.take(delta.choice, told, token_ids, delta.text, more=more, now=now)
            if index is not None:
                if index != told:
                    delta.index = index
                    raw = message.SerializeToString()
                if not begun:
                    begun = True
                    await _begin(attempt, held, write)
                await write(raw)
                timer.token(now, len(token_ids) or 1)
            watch.listening(clock())
            continue
        watch.heard(now, tokens=False)
        if kind == "finished":
            changed = attempt.finished(message)
            if not begun:
                await _begin(attempt, held, write)
            await write(raw if changed is None else changed)
            delivered.started = delivered.finished = True
            return
        if kind == "started" or kind == "prompt_scored":
            if kind == "started":
                attempt.started(message)
            if begun and not resumes:
                await write(raw)
            elif not resumes:
                held.add(raw)
        elif held.messages:
            held.add(raw)
        else:
            await write(raw)
        watch.listening(clock())
    raise UnavailableError(f"the stream of the runner {runner_id} ended early, before the answer was complete")


async def _begin(attempt: Attempt, held: HeldBack, write: Write) -> None:
    """Tells who answers, or goes on with the answer, and what was held back until that was certain."""
    for told in (attempt.substituted(), attempt.taken_over()):
        if told is not None:
            await write(told)
    for earlier in held.messages:
        await write(earlier)
    held.messages.clear()
