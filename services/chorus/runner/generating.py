"""One generation between the engine and the wire: what it is counted as."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from chorus.core.errors import CancelledError, ChorusError
from chorus.core.generation import Event, Finished, Started, TokenDelta
from chorus.telemetry.logs import get_logger
from chorus.telemetry.metrics import GenerationMetrics, StreamTimer

_log = get_logger()


class Account:
    """Counts what one generation's events tell, and logs how it ended when its block is left."""

    def __init__(self, metrics: GenerationMetrics, clock: Callable[[], float]) -> None:
        """`clock` is monotonic, in seconds; the generation arrives now."""
        self._metrics = metrics
        self._clock = clock
        self._arrived = clock()
        self._timer: StreamTimer | None = None
        self._model = ""
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self.finished = False

    def note(self, event: Event) -> None:
        """An event is on its way."""
        if isinstance(event, TokenDelta):
            count = len(event.token_ids) or 1
            self.output_tokens += count
            if self._timer is not None:
                self._timer.token(self._clock(), count)
        elif isinstance(event, Started):
            self._timer = StreamTimer(self._metrics.model(event.artifact), self._arrived)
            self._model, self.prompt_tokens = event.artifact, event.prompt_tokens
            self.cached_tokens = event.cached_tokens
        elif isinstance(event, Finished):
            self.finished = True
            # An engine that learns only at the end how long the prompt was has told nothing before.
            self.prompt_tokens = self.prompt_tokens or event.usage.prompt_tokens

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the arrival to the first token; None where none came."""
        return self._timer.time_to_first_token if self._timer is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = reason_of(error, finished=self.finished)
        self._metrics.attempt(outcome)
        _log.info(
            "generation.ended",
            model=self._model,
            outcome=outcome or "OK",
            seconds=round(self._clock() - self._arrived, 6),
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
        )
        if self._timer is not None:
            self._timer.close(prompt_tokens=self.prompt_tokens)


def reason_of(error: BaseException | None, *, finished: bool) -> str:
    """The reason that a generation ended for; empty where it came to its end."""
    if isinstance(error, ChorusError):
        return error.reason
    if isinstance(error, Exception):
        return ChorusError.reason
    return "" if finished else CancelledError.reason  # its caller went away, unless it came to its end
