"""One generation between the engine and the wire: measured, and closed the moment its caller goes away."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable

from chorus.core.errors import CancelledError, ChorusError
from chorus.core.generation import Event, Finished, Started, TokenDelta
from chorus.telemetry.metrics import GenerationMetrics, StreamTimer


async def measured(
    events: AsyncIterator[Event], metrics: GenerationMetrics, clock: Callable[[], float]
) -> AsyncGenerator[Event, None]:
    """Passes an engine's events on and counts what they tell. Closing this closes the engine's iterator too, at once.

    `clock` is monotonic, in seconds.
    """
    arrived = clock()
    timer: StreamTimer | None = None
    prompt_tokens = 0
    outcome = CancelledError.reason  # unless it turns out otherwise
    try:
        async for event in events:
            if isinstance(event, TokenDelta):
                if timer is not None:
                    timer.token(clock(), len(event.token_ids) or 1)
            elif isinstance(event, Started):
                timer = StreamTimer(metrics.model(event.artifact), arrived)
                prompt_tokens = event.prompt_tokens
            elif isinstance(event, Finished):
                outcome = ""
            yield event
    except ChorusError as error:
        outcome = error.reason
        raise
    except Exception:
        outcome = ChorusError.reason
        raise
    finally:
        metrics.attempt(outcome)
        if timer is not None:
            timer.close(prompt_tokens=prompt_tokens)
        # The interface promises an iterator; one that is a generator holds its slot until it is closed.
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
