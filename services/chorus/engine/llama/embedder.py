"""Vectors of texts: a context of its own, used by the model's owner thread between two steps."""

from __future__ import annotations

import numpy as np

from chorus.core.errors import EngineError
from chorus.engine.llama.binding import Model
from chorus.engine.llama.codes import batch_failed
from chorus.engine.llama.context import (
    POOLING_CLS,
    POOLING_LAST,
    POOLING_MEAN,
    POOLING_NONE,
    Context,
    ContextParams,
    FloatArray,
)

_OUTPUT_BYTES = 64 * 1024 * 1024
_LONGEST_IN_ONE_PIECE = 8192


def longest_input(model: Model, context_length: int) -> int:
    """How many tokens one text may have. A model that reads both ways must read a text in one piece."""
    return context_length if model.causal else min(context_length, _LONGEST_IN_ONE_PIECE)


class Embedder:
    """Turns token ids into one vector each, pooled as the model wants (its mean where it does not say)."""

    def __init__(self, model: Model, *, longest: int, threads: int) -> None:
        """Raises `EngineError` where the context cannot be made."""
        self._model = model
        self._causal = model.causal
        declared = model.metadata(f"{model.architecture}.pooling_type")
        self._pooling = POOLING_MEAN
        if declared and declared.isdigit() and int(declared) in (POOLING_CLS, POOLING_LAST):
            self._pooling = int(declared)
        # llama.cpp keeps logits of every token beside its vector, so long texts go in pieces where that is possible
        rows = max(32, min(512, longest, _OUTPUT_BYTES // (4 * model.vocabulary_size)))
        piece = rows if self._causal else longest
        self._context = Context(
            model,
            ContextParams(
                cells=longest,
                batch_tokens=piece,
                micro_batch_tokens=piece,
                sequences=1,
                outputs=piece,
                threads=threads,
                threads_batch=threads,
                flash_attention=self._causal,
                embeddings=True,
                pooling=POOLING_NONE if self._causal else self._pooling,
            ),
        )
        self.longest = min(longest, self._context.cells) if self._causal else min(longest, self._context.batch_tokens)

    def close(self) -> None:
        """Frees the context."""
        self._context.close()

    def vector(self, token_ids: list[int], *, normalize: bool) -> FloatArray:
        """The vector of 1 to `longest` tokens, shape (size,). Raises `EngineError` where llama.cpp fails."""
        context = self._context
        if not 1 <= len(token_ids) <= self.longest:
            raise EngineError(f"a text of {len(token_ids)} tokens cannot be embedded")
        vectors: list[FloatArray] = []
        try:
            for start in range(0, len(token_ids), context.batch_tokens):
                part = token_ids[start : start + context.batch_tokens]
                count = len(part)
                context.token_ids[:count] = part
                context.positions[:count] = np.arange(start, start + count, dtype=np.int32)
                context.sequence_ids[:count] = 0
                context.wants_output[:count] = 1
                code = context.decode(count)
                if code:
                    raise batch_failed(code, count, what="the vector of a text, in a piece")
                vectors.append(context.embeddings(count).copy() if self._causal else context.pooled(0).copy())
        finally:
            context.remove(0)
        vector = self._pool(np.concatenate(vectors)) if self._causal else vectors[0]
        if not np.isfinite(vector).all():
            raise EngineError("the model gave a vector that is not finite; its file may be damaged")
        if normalize:
            length = float(np.sqrt((vector.astype(np.float64) ** 2).sum()))
            vector = (vector / length).astype(np.float32) if length > 0 else vector
        return vector

    def _pool(self, vectors: FloatArray) -> FloatArray:
        pooled: FloatArray
        if self._pooling == POOLING_CLS:
            pooled = vectors[0]
        elif self._pooling == POOLING_LAST:
            pooled = vectors[-1]
        else:
            pooled = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        return pooled
