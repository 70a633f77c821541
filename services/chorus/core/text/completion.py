"""One choice's answer as it grows token by token: its text, and whether and why it has ended."""

from __future__ import annotations

import codecs
from collections.abc import Container

from chorus.core.generation import FinishReason
from chorus.core.text.stops import StopMatcher, StopStrings

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Completion:
    """Turns tokens into text and decides when to stop. Everything in it follows from the tokens accepted so far.

    So a resumed stream replays the delivered tokens through a new Completion and goes on with the same half character,
    the same withheld stop string and the same count. A token that ends the choice releases, with itself, whatever
    text was still withheld; the end-of-text token itself has none.
    """

    __slots__ = ("_decoder", "_end_tokens", "_ignore_eos", "_stop_tokens", "_stops", "count", "limit", "limit_reason",
                 "reason")  # fmt: skip

    def __init__(
        self,
        *,
        limit: int,
        limit_reason: FinishReason,
        stops: StopStrings,
        stop_tokens: Container[int] = (),
        end_tokens: Container[int] = (),
        ignore_eos: bool = False,
    ) -> None:
        """`limit` tokens end the choice for `limit_reason`; `end_tokens` are the model's own ends of text."""
        self.count = 0
        self.limit = limit
        self.limit_reason = limit_reason
        self.reason: FinishReason | None = limit_reason if limit <= 0 else None
        self._decoder = _new_decoder("replace")
        self._stops = StopMatcher(stops)
        self._stop_tokens = stop_tokens
        self._end_tokens = end_tokens
        self._ignore_eos = ignore_eos

    @property
    def stop_string(self) -> str:
        """The stop string that ended it, or an empty one."""
        return self._stops.matched or ""

    def accept(self, token_id: int, piece: bytes) -> str:
        """Takes the next token and its bytes; returns the text that is certain now, and sets `reason` if it ended."""
        self.count += 1
        if token_id in self._end_tokens and not self._ignore_eos:
            self.reason = FinishReason.END
            return self._rest()
        if token_id in self._stop_tokens:
            self.reason = FinishReason.STOP
            return self._rest()
        text = self._stops.feed(self._decoder.decode(piece))
        if self._stops.matched is not None:
            self.reason = FinishReason.STOP
            return text
        if self.count >= self.limit:
            self.reason = self.limit_reason
            return text + self._rest()
        return text

    def _rest(self) -> str:
        """What was withheld: a half character becomes U+FFFD, the beginning of a stop string is text after all."""
        text = self._stops.feed(self._decoder.decode(b"", final=True))
        if self._stops.matched is None:
            return text + self._stops.flush()
        self.reason = FinishReason.STOP
        return text
