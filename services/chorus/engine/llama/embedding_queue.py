"""What a model's owner thread has to do with texts to embed and pairs to score: it takes requests, and works a batch
at a time between two steps of generation."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from chorus.core.batching.texts import Piece, Text, TextLimits, TextQueue
from chorus.core.errors import ChorusError, EngineError, OverloadedError
from chorus.engine.llama.commands import Embed, Outbox, Vector, Withdraw
from chorus.engine.llama.context import FloatArray
from chorus.engine.llama.embedder import Embedder

_SMOOTHING = 0.1
_LEAST_TOKENS = 32  # of a batch beside streams, however slow it is
_SHORTEST_WAIT_S = 0.05
_LONGEST_WAIT_S = 60.0
_UNKNOWN_WAIT_S = 1.0


class EmbeddingQueue:
    """Belongs to one owner thread. The context is made for the first request, since most generators never embed."""

    def __init__(
        self,
        limits: TextLimits,
        make: Callable[[], Embedder],
        outbox: Outbox,
        *,
        most_waiting: int,
        most_beside_streams: int,
        gap_s: float,
        begins: Callable[[int, str], None] = lambda *_: None,
    ) -> None:
        """`make` makes the context for these limits; at most `most_waiting` requests wait that have not begun.

        While streams run, a batch has at most `most_beside_streams` tokens, and no more than take `gap_s` seconds.
        `begins` is told of whatever llama.cpp is about to do: the number of tokens, and what kind of work it is.
        """
        self._texts = TextQueue(limits)
        self._make = make
        self._outbox = outbox
        self._most_waiting = most_waiting
        self._most_beside_streams = most_beside_streams
        self._gap_s = gap_s
        self._begins = begins
        self._embedder: Embedder | None = None
        self._under_way: dict[Embed, _UnderWay] = {}
        self._tokens_per_second = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._under_way

    def __len__(self) -> int:
        """How many requests are not answered yet."""
        return len(self._under_way)

    def take(self, command: Embed | Withdraw) -> None:
        """Takes a request, or forgets one. One too many is answered with `OverloadedError`."""
        if isinstance(command, Withdraw):
            self._drop(command.request)
            return
        waiting = self._texts.waiting
        # whatever fits the next batch hardly waits
        if waiting and waiting >= self._most_waiting and self._texts.tokens >= self._texts.limits.batch_tokens:
            self._outbox.settle(command.result, self._refusal(waiting))
            return
        try:
            texts = self._texts.add(command, [len(ids) for ids in command.texts], command.priority)
        except ValueError as error:
            self._outbox.settle(command.result, EngineError(str(error)))
            return
        self._under_way[command] = _UnderWay(texts)

    def step(self, *, streams: bool) -> None:
        """Reads one batch; the requests that are complete are answered. It is a smaller one while `streams` run.

        Where llama.cpp fails, the requests that are in the batch fail, and no others.
        """
        pieces = self._texts.plan(self._beside_streams() if streams else None)
        if not pieces:
            return
        began = time.monotonic()
        try:
            if self._embedder is None:
                self._begins(1, "context")
                self._embedder = self._make()
            self._begins(sum(piece.count for piece in pieces), "texts")
            vectors = self._embedder.read(pieces, [self._tokens(piece) for piece in pieces])
        except ChorusError as error:
            for request in {self._request(piece.text) for piece in pieces}:
                self._fail(request, error)
            return
        self._measure(sum(piece.count for piece in pieces), time.monotonic() - began)
        for piece, vector in zip(pieces, vectors, strict=True):
            self._progress(piece, vector)

    def end(self, error: ChorusError) -> None:
        """Answers everybody with `error`, and takes nothing more."""
        for request in self._under_way:
            self._outbox.settle(request.result, error)
        self._under_way.clear()

    def close(self) -> None:
        """Frees the context, before the model is closed."""
        if self._embedder is not None:
            self._embedder.close()
            self._embedder = None

    def _progress(self, piece: Piece, vector: FloatArray | None) -> None:
        request = self._request(piece.text)
        under_way = self._under_way.get(request)
        if under_way is None:  # another text of its request failed just now
            return
        self._texts.computed(piece)
        if vector is None:  # there is more of the text
            return
        if not np.isfinite(vector).all():
            self._fail(request, EngineError("the model gave a vector that is not finite; its file may be damaged"))
            return
        under_way.vectors[piece.text] = _finished(vector, normalize=request.normalize)
        if len(under_way.vectors) == len(under_way.texts):
            del self._under_way[request]
            self._outbox.settle(request.result, [under_way.vectors[text] for text in under_way.texts])

    def _tokens(self, piece: Piece) -> list[int]:
        request = self._request(piece.text)
        ids = request.texts[self._under_way[request].places[piece.text]]
        return ids if piece.count == len(ids) else ids[piece.start : piece.start + piece.count]

    @staticmethod
    def _request(text: Text) -> Embed:
        assert isinstance(text.group, Embed)
        return text.group

    def _fail(self, request: Embed, error: ChorusError) -> None:
        if request in self._under_way:
            self._drop(request)
            self._outbox.settle(request.result, error)

    def _drop(self, request: Embed) -> None:
        self._under_way.pop(request, None)
        slots = self._texts.leave(request)
        if self._embedder is not None:
            self._embedder.forget(slots)

    def _beside_streams(self) -> int:
        """How many tokens may come between two steps of streams, so that these keep moving."""
        at_speed = int(self._tokens_per_second * self._gap_s)
        return min(self._most_beside_streams, max(at_speed, _LEAST_TOKENS)) if at_speed else _LEAST_TOKENS

    def _measure(self, tokens: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-6)
        self._tokens_per_second += (rate - self._tokens_per_second) * (_SMOOTHING if self._tokens_per_second else 1.0)

    def _refusal(self, waiting: int) -> OverloadedError:
        rate = self._tokens_per_second
        wait_s = self._texts.tokens / rate if rate else _UNKNOWN_WAIT_S
        return OverloadedError(
            f"{waiting} requests for vectors wait already, which is as many as this engine lets wait",
            metadata={"queued": str(waiting)},
            retry_after_s=min(max(wait_s, _SHORTEST_WAIT_S), _LONGEST_WAIT_S),
        )


class _UnderWay:
    """The texts of one request in its order, their places, and the vectors that there are."""

    __slots__ = ("places", "texts", "vectors")

    def __init__(self, texts: list[Text]) -> None:
        self.texts = texts
        self.places = {text: place for place, text in enumerate(texts)}
        self.vectors: dict[Text, Vector] = {}


def _finished(vector: FloatArray, *, normalize: bool) -> Vector:
    if normalize:
        length = float(np.sqrt((vector.astype(np.float64) ** 2).sum()))
        vector = (vector / length).astype(np.float32) if length > 0 else vector
    return tuple(vector.tolist())
