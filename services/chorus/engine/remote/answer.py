"""One answer as a server streams it: the events it becomes, and the proof that it is whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

from chorus.core.errors import UnavailableError
from chorus.core.fleet.records import ModelStatus
from chorus.core.generation import (
    ChoiceOutcome,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Started,
    Timings,
    TokenDelta,
    ToolCall,
    Usage,
)
from chorus.core.text.stops import StopMatcher, StopStrings
from chorus.engine.remote.dialect import Piece, Spent

_NOTHING = Piece()
# After the end of an answer most servers tell what it used; some neither do that nor close the connection.
_USAGE_S = 1.0


class Answer:
    """One choice. A server's tokens have no ids here, so an index counts deltas.

    `match_stops`: stop strings were not told to the server. `echo`: what the server may repeat before it goes on. All
    times are seconds of one monotonic clock.
    """

    def __init__(
        self,
        status: ModelStatus,
        request: GenerationRequest,
        seed: int,
        *,
        match_stops: bool,
        echo: str = "",
        arrived: float,
        admitted: float,
        load_s: float,
    ) -> None:
        """`arrived`, and `admitted` to a slot after `load_s` of loading."""
        self._status = status
        self._request = request
        self._seed = seed
        self._arrived = arrived
        self._admitted = admitted
        self._load_s = load_s
        self._stops = StopMatcher(StopStrings(request.stop.strings if match_stops else ()))
        self._echo = echo
        self._repeated = ""
        self._delivered = sum(choice.tokens for choice in request.resume)
        self._left = request.tokens_left
        self._index = self._delivered
        self._started = False
        self._first_at: float | None = None
        self._whole_at = math.inf
        self._reason: FinishReason | None = None
        self._stop_string = ""
        self._spent = Spent()
        self.ended = False
        """Whether nothing more need be read."""
        if self._left == 0 and self._delivered:
            self._reason, self.ended = FinishReason.LENGTH, True

    def take(self, piece: Piece, now: float) -> Iterator[Event]:
        """The events of the next piece."""
        if piece == _NOTHING:
            return
        if piece.spent is not None:
            self._spent = piece.spent.after(self._spent)
        yield from self._start()
        if not self.is_whole:
            yield from self._tell(piece, now)
        self.ended = self.ended or piece.last

    def _tell(self, piece: Piece, now: float) -> Iterator[Event]:
        """The events of a piece that is part of the answer."""
        if piece.finish is not None:
            self._whole_at = now
        if self._left == 0:  # no server can do that: it was asked for one token
            self._reason = FinishReason.LENGTH if piece.finish is not None else None
            return
        if piece.reasoning:
            yield self._delta(now, reasoning=piece.reasoning)
        text = self._stops.feed(self._new(piece.text, last=piece.finish is not None))
        if piece.finish is not None:
            text += self._stops.flush()
            self._reason, self._stop_string = piece.finish, piece.stop_string
        if text:
            yield self._delta(now, text=text)
        for call in piece.tool_calls:
            yield self._delta(now, tool_call=call)
        if self._stops.matched is not None:
            self._reason, self._stop_string = FinishReason.STOP, self._stops.matched
            self.ended = True

    @property
    def is_whole(self) -> bool:
        """Whether the server has said why it ended; what it says after that is what the answer used."""
        return self._reason is not None

    def patience_s(self, now: float, token_timeout_s: float) -> float | None:
        """How long to wait for the next line; None where nothing of the answer has come yet."""
        if self.is_whole:
            return max(0.0, self._whole_at + _USAGE_S - now)
        # Servers hold the call of a tool back until they have all of it.
        return None if self._first_at is None or self._request.tools else token_timeout_s

    def finish(self, now: float) -> Iterator[Event]:
        """The end. Raises `UnavailableError` where the server never said that the answer is whole."""
        if self._reason is None:
            raise UnavailableError(
                f"the stream of {self._status.artifact.name} on {self._status.engine} ended early, "
                "before the answer was complete"
            )
        yield from self._start()
        spent, limit = self._spent, self._left
        pieces = self._index - self._delivered
        count = 0 if limit == 0 else spent.completion_tokens or pieces
        reason = self._reason
        # A piece may be several tokens: where the server doesn't count, it may have reached the limit.
        counted = bool(spent.completion_tokens) or not pieces
        if reason is FinishReason.LENGTH and (limit is None or (counted and count < limit)):
            reason = FinishReason.CONTEXT_FULL
        first_at = now if self._first_at is None else self._first_at
        decode_s = spent.decode_s or min(now, self._whole_at) - first_at
        yield Finished(
            choices=(ChoiceOutcome(0, reason, self._delivered + count, self._stop_string),),
            usage=Usage(spent.prompt_tokens or 0, spent.cached_tokens, self._delivered + count),
            timings=Timings(
                queue_s=max(0.0, self._admitted - self._arrived - self._load_s),
                load_s=self._load_s + spent.load_s,
                prefill_s=spent.prefill_s,
                time_to_first_token_s=first_at - self._arrived,
                decode_s=decode_s,
                tokens_per_second=count / decode_s if decode_s > 0 and count > 1 else 0.0,
            ),
        )

    def _new(self, text: str, *, last: bool) -> str:
        """The part of the text that is no echo."""
        if not self._echo:
            return text
        text = self._repeated + text
        self._repeated = ""
        if text.startswith(self._echo):
            text, self._echo = text[len(self._echo) :], ""
        elif self._echo.startswith(text) and not last:
            self._repeated, text = text, ""
        else:
            self._echo = ""
        return text

    def _start(self) -> Iterator[Event]:
        if self._started:
            return
        self._started = True
        artifact = self._status.artifact
        yield Started(
            model=artifact.family,
            artifact=artifact.name,
            artifact_sha256=artifact.sha256,
            prompt_tokens=self._spent.prompt_tokens or 0,  # most servers count them at the end
            cached_tokens=self._spent.cached_tokens,
            seed=self._seed,
            context_length=self._status.context_length,
        )

    def _delta(
        self, now: float, text: str = "", *, reasoning: str = "", tool_call: ToolCall | None = None
    ) -> TokenDelta:
        if self._first_at is None:
            self._first_at = now
        index = self._index
        self._index += 1
        return TokenDelta(0, index, (), text, reasoning=reasoning, tool_call=tool_call)
