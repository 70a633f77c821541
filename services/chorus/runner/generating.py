"""One generation between the engine and the wire: measured, and closed the moment its caller goes away."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from chorus.core.errors import CancelledError, ChorusError
from chorus.core.generation import Event, Finished, Started, TokenDelta
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import GenerationMetrics, StreamTimer

_log = get_logger()


async def measured(
    events: AsyncGenerator[Event, None], metrics: GenerationMetrics, clock: Callable[[], float]
) -> AsyncGenerator[Event, None]:
    """Passes an engine's events on, counts what they tell, and logs how it ended.

    Closing this closes the engine's generator too, at once.
    `clock` is monotonic, in seconds.
    """
    arrived = clock()
    timer: StreamTimer | None = None
    model, prompt_tokens, output_tokens = "", 0, 0
    outcome = CancelledError.reason  # unless it turns out otherwise
    try:
        async for event in events:
            if isinstance(event, TokenDelta):
                output_tokens += len(event.token_ids) or 1
                if timer is not None:
                    timer.token(clock(), len(event.token_ids) or 1)
            elif isinstance(event, Started):
                timer = StreamTimer(metrics.model(event.artifact), arrived)
                model, prompt_tokens = event.artifact, event.prompt_tokens
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
        _log.info(
            "generation.ended",
            model=model,
            outcome=outcome or "OK",
            seconds=round(clock() - arrived, 6),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )
        if timer is not None:
            timer.close(prompt_tokens=prompt_tokens)
        await events.aclose()  # frees the slot
