"""A generation as its caller reads it: an iterator of events that is closed cleanly, however reading ends."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import TracebackType
from typing import Generic, Self, TypeVar

from chorus.client.answers import Completion, CompletionChoice
from chorus.core.cache.report import CacheReport
from chorus.core.errors import UnavailableError
from chorus.core.generation import Finished, Substitution, TokenDelta, ToolCall
from chorus.wire.events import AttemptChanged, ClientEvent, StartedAt

E = TypeVar("E")


class EventStream(Generic[E]):
    """Events as they come. Leaving its `async with` block, or `aclose()`, ends what they are of, wherever it stands."""

    def __init__(self, events: AsyncGenerator[E]) -> None:
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends it. May be called again."""
        await self._events.aclose()


class Generation(EventStream[ClientEvent]):
    """Events, in the order of GenerationEvent's contract: always `Finished` at the end, or an error instead.

    The runner's slot is free within a decode step after the end. An iteration that is broken off without `async with`
    or `aclose()` is ended when the object is collected.
    """

    async def completion(self) -> Completion:
        """Reads to the end and returns the whole; the iterator must not have been read before."""
        began = time.monotonic()
        first_s: float | None = None
        started: StartedAt | None = None
        changed: AttemptChanged | None = None
        substitution: Substitution | None = None
        cache: CacheReport | None = None
        parts: dict[int, _Parts] = {}
        async with self:
            async for event in self:
                if isinstance(event, TokenDelta):
                    if first_s is None:
                        first_s = time.monotonic() - began
                    parts.setdefault(event.choice, _Parts()).add(event)
                elif isinstance(event, StartedAt):
                    started = event
                elif isinstance(event, AttemptChanged):
                    changed = event
                elif isinstance(event, Substitution):
                    substitution = event
                elif isinstance(event, CacheReport):
                    cache = event
                elif isinstance(event, Finished):
                    whole = _completion(event, started, changed, parts, first_s, time.monotonic() - began)
                    return replace(whole, substitution=substitution, cache=cache)
        raise UnavailableError("the generation was read before; its completion is lost")


class _Parts:
    """What has come of one choice."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: list[ToolCall] = []
        self.token_ids: list[int] = []

    def add(self, delta: TokenDelta) -> None:
        self.text.append(delta.text)
        self.reasoning.append(delta.reasoning)
        self.token_ids.extend(delta.token_ids)
        if delta.tool_call is not None:
            self.tool_calls.append(delta.tool_call)


def _completion(
    finished: Finished,
    started: StartedAt | None,
    changed: AttemptChanged | None,
    parts: dict[int, _Parts],
    first_s: float | None,
    elapsed_s: float,
) -> Completion:
    choices = []
    for outcome in sorted(finished.choices, key=lambda outcome: outcome.choice):
        part = parts.get(outcome.choice) or _Parts()
        choices.append(
            CompletionChoice(
                text="".join(part.text),
                reasoning="".join(part.reasoning),
                tool_calls=tuple(part.tool_calls),
                token_ids=tuple(part.token_ids),
                reason=outcome.reason,
            )
        )
    about = started.started if started is not None else None
    origin = started.origin if started is not None else None
    where = changed or origin  # who took over last, else who began
    return Completion(
        choices=tuple(choices),
        model=about.model if about is not None else "",
        artifact=about.artifact if about is not None else "",
        artifact_sha256=about.artifact_sha256 if about is not None else "",
        node_id=where.node_id if where is not None else "",
        runner_id=where.runner_id if where is not None else "",
        request_id=origin.request_id if origin is not None else "",
        attempts=where.attempt if where is not None else 1,
        usage=finished.usage,
        timings=finished.timings,
        time_to_first_token_s=first_s,
        elapsed_s=elapsed_s,
    )
