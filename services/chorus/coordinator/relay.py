"""Passing a runner's stream on, byte for byte: the hot path of the mesh.

A runner's message and a coordinator's have the event in the same field, so a message is passed on as it came, with
whatever fields a newer runner put into it. It is parsed once, to see what kind of event it is and to count tokens.

What a runner says before its first token binds nobody: another runner may still take over. So Queued and Progress go
through at once (a caller should see that work goes on), while Started and PromptScored, which come once in a stream,
are held back until the first token of the same attempt follows.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2
from chorus.core.errors import UnavailableError
from chorus.telemetry.metrics import StreamTimer

Write = Callable[[bytes], Awaitable[None]]

_parse = runner_pb2.GenerateResponse.FromString


@dataclass(slots=True)
class Delivered:
    """What a caller has got of one generation, over all of its attempts."""

    started: bool = False  # part of the answer was sent: another runner may not begin anew
    finished: bool = False
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


async def relay(
    messages: AsyncIterable[bytes],
    write: Write,
    delivered: Delivered,
    *,
    runner_id: str,
    timer: StreamTimer,
    clock: Callable[[], float],
) -> None:
    """Passes an attempt's messages on until Finished has been.

    Raises UnavailableError where the stream ends without, or is none; and what `messages` and `write` raise.
    """
    held: list[bytes] = []
    async for raw in messages:
        try:
            event = _parse(raw).event
        except DecodeError as error:
            raise UnavailableError(f"the runner {runner_id} sent what is no message of a generation") from error
        kind = event.WhichOneof("event")
        if kind == "delta":
            delivered.started = True
            for earlier in held:
                await write(earlier)
            held.clear()
            await write(raw)
            # Deltas of engines that deal in text alone have no ids; each counts as one.
            count = len(event.delta.token_ids) or 1
            delivered.output_tokens += count
            timer.token(clock(), count)
        elif kind == "finished":
            delivered.started = True
            for earlier in held:
                await write(earlier)
            await write(raw)
            delivered.finished = True
            _note_usage(delivered, event.finished.usage)
            return
        elif kind == "started" or kind == "prompt_scored" or held:
            held.append(raw)
            if kind == "started":
                delivered.prompt_tokens = event.started.prompt_token_count
        else:
            await write(raw)
    raise UnavailableError(f"the stream of the runner {runner_id} ended early, before the answer was complete")


def _note_usage(delivered: Delivered, usage: generation_pb2.Usage) -> None:
    delivered.prompt_tokens = usage.prompt_token_count
    delivered.cached_tokens = usage.cached_token_count
