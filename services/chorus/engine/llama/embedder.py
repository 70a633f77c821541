"""Vectors of texts, and scores of pairs: a context of its own, used by the model's owner thread between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chorus.core.batching.texts import Piece, TextLimits
from chorus.core.errors import EngineError
from chorus.engine.llama.binding import Model, supports_gpu_offload
from chorus.engine.llama.codes import batch_failed
from chorus.engine.llama.context import (
    POOLING_CLS,
    POOLING_LAST,
    POOLING_MEAN,
    POOLING_NONE,
    POOLING_RANK,
    Context,
    ContextParams,
    FloatArray,
)
from chorus.engine.llama.cores import FreeCores

_OUTPUT_BYTES = 64 * 1024 * 1024
_LONGEST_IN_ONE_PIECE = 8192
# Attention costs the square of a batch, so that on a processor more than enough to keep it busy is slower.
_BATCH_TOKENS, _GPU_BATCH_TOKENS = 128, 512
_MOST_TEXTS = 64  # in one batch
# Weights times tokens of a batch that takes one thread some 10 ms. llama.cpp's threads meet after each of some 200
# operations: where another process has a core, a short question waits for it 200 times, which costs more than a second
# thread could ever save. So it is computed by as many as have a core to themselves.
_SHORT = 1_000_000_000


def longest_input(model: Model, context_length: int) -> int:
    """How many tokens one text may have. A model that reads both ways must read a text in one piece."""
    return context_length if model.causal else min(context_length, _LONGEST_IN_ONE_PIECE)


def text_limits(model: Model, longest: int) -> TextLimits:
    """What the context of an `Embedder` takes, for texts of at most `longest` tokens."""
    # llama.cpp keeps room for logits of every token beside its vector, so a large vocabulary makes batches small
    best = _GPU_BATCH_TOKENS if supports_gpu_offload() or model.causal else _BATCH_TOKENS
    tokens = max(32, min(best, _OUTPUT_BYTES // (4 * model.vocabulary_size)))
    one_by_one = model.causal and not model.copies_prefixes  # each more sequence has a whole state in memory
    return TextLimits(
        slots=1 if one_by_one else min(_MOST_TEXTS, tokens),
        cells=max(longest, tokens),
        batch_tokens=tokens,
        longest=longest,
        whole=not model.causal,
    )


@dataclass(slots=True)
class _Sum:
    """What is known of a text whose tokens are pooled here: their sum, the first one's and the last one's vector."""

    total: npt.NDArray[np.float64]
    first: FloatArray
    last: FloatArray


class Embedder:
    """Reads many texts at once, and pools each as its model wants (the mean where it does not say).

    Vectors of models that read both ways are pooled by llama.cpp, and so are the scores of rerankers. Those of causal
    models are pooled here, since their long texts come in pieces.
    """

    def __init__(self, model: Model, *, longest: int, threads: int, flash_attention: bool) -> None:
        """Raises `EngineError` where the context cannot be made."""
        self.limits = text_limits(model, longest)
        self._pooling = model.pooling if model.pooling != POOLING_NONE else POOLING_MEAN
        self._pools_here = model.causal and self._pooling != POOLING_RANK
        self._threads = threads
        self._parameters = model.parameters
        self._sums: dict[int, _Sum] = {}  # by slot
        batch = self.limits.batch_tokens if model.causal else max(longest, self.limits.batch_tokens)
        self._context = Context(
            model,
            ContextParams(
                cells=self.limits.cells,
                batch_tokens=batch,
                micro_batch_tokens=batch,
                sequences=self.limits.slots,
                outputs=batch,
                threads=threads,
                threads_batch=threads,
                flash_attention=flash_attention,
                embeddings=True,
                pooling=POOLING_NONE if self._pools_here else self._pooling,
            ),
        )
        self._free_cores = FreeCores()  # after what may fail: it holds a file

    def close(self) -> None:
        """Frees the context."""
        self._context.close()
        self._free_cores.close()

    def forget(self, slots: Sequence[int]) -> None:
        """Clears what was read of texts that will not be read to their end."""
        for slot in slots:
            self._sums.pop(slot, None)
            self._context.remove(slot)

    def read(self, pieces: Sequence[Piece], token_ids: Sequence[Sequence[int]]) -> list[FloatArray | None]:
        """Reads one batch: for each piece its tokens. Returns the vectors of the texts that are complete, else None.

        Vectors have shape (size,), as the model gives them; a reranker's, shape (classes,). Raises `EngineError` where
        llama.cpp fails; what it has of these texts is to be forgotten then.
        """
        count = self._fill(pieces, token_ids)
        short = count * self._parameters <= _SHORT
        self._context.use_threads(self._free_cores.count(self._threads) if short else self._threads)
        code = self._context.decode(count)
        if code:
            raise batch_failed(code, count, what="a batch of texts,")
        if self._pools_here:
            self._add_up(pieces, self._context.embeddings(count))
        vectors: list[FloatArray | None] = []
        for piece in pieces:
            if not piece.is_last:
                vectors.append(None)
                continue
            slot = _slot(piece)
            vectors.append(self._pooled(piece) if self._pools_here else self._context.pooled(slot).copy())
            self._context.remove(slot)
        return vectors

    def _fill(self, pieces: Sequence[Piece], token_ids: Sequence[Sequence[int]]) -> int:
        context, count = self._context, 0
        if sum([piece.count for piece in pieces]) > context.batch_tokens:
            raise EngineError(f"texts of more than {context.batch_tokens} tokens in one batch")
        for piece, ids in zip(pieces, token_ids, strict=True):
            if len(ids) != piece.count:
                raise EngineError(f"{len(ids)} tokens for a piece of {piece.count}")
            end = count + piece.count
            context.token_ids[count:end] = ids
            context.positions[count:end] = np.arange(piece.start, piece.start + piece.count, dtype=np.int32)
            context.sequence_ids[count:end] = _slot(piece)
            count = end
        context.wants_output[:count] = 1
        return count

    def _add_up(self, pieces: Sequence[Piece], rows: FloatArray) -> None:
        begin = 0
        for piece in pieces:
            part = rows[begin : begin + piece.count]
            begin += piece.count
            total = part.sum(axis=0, dtype=np.float64)
            if piece.start:
                known = self._sums[_slot(piece)]
                known.total += total
                known.last = part[-1].copy()
            else:
                self._sums[_slot(piece)] = _Sum(total, part[0].copy(), part[-1].copy())

    def _pooled(self, piece: Piece) -> FloatArray:
        known = self._sums.pop(_slot(piece))
        if self._pooling == POOLING_CLS:
            return known.first
        if self._pooling == POOLING_LAST:
            return known.last
        mean: FloatArray = (known.total / piece.text.size).astype(np.float32)
        return mean


def _slot(piece: Piece) -> int:
    if piece.text.slot is None:
        raise EngineError("a text that has no slot cannot be read")
    return piece.text.slot
