"""KV memory and compute buffers of llama.cpp: filling a batch, decoding it, reading logits and vectors.

A context belongs to one thread. Everything that llama.cpp would abort on is checked before the call.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chorus.core.errors import EngineError
from chorus.core.fitting.memory import CacheType
from chorus.engine.llama import binding, log
from chorus.engine.llama.binding import Adapter, Model, library

FloatArray = npt.NDArray[np.float32]

POOLING_NONE, POOLING_MEAN, POOLING_CLS, POOLING_LAST, POOLING_RANK = 0, 1, 2, 3, 4
MAX_SEQUENCES = 256
_FEW = 4
_GGML_TYPES = {
    CacheType.F32: 0,
    CacheType.F16: 1,
    CacheType.Q4_0: 2,
    CacheType.Q4_1: 3,
    CacheType.Q5_0: 6,
    CacheType.Q5_1: 7,
    CacheType.Q8_0: 8,
    CacheType.BF16: 30,
}


@dataclass(frozen=True, slots=True)
class ContextParams:
    """What a context is made with. `outputs` is how many positions of one batch may have logits.

    `sequences` are decoded at a time, and `kept` more may stay in memory: each costs a row of logits, and a state or
    window of its own where memory is made of these.
    """

    cells: int
    batch_tokens: int
    micro_batch_tokens: int
    sequences: int
    outputs: int
    threads: int
    threads_batch: int
    flash_attention: bool = True
    embeddings: bool = False
    pooling: int = -1  # the model's own
    kept: int = 0
    cache_type: CacheType = CacheType.F16


class Context:
    """KV memory and compute buffers of one model, with the one batch that is filled again for every step.

    `fill` it, or fill `token_ids`, `positions`, `sequence_ids` and `wants_output` up to a count; then `decode(count)`.
    """

    def __init__(self, model: Model, params: ContextParams) -> None:
        """Raises `EngineError` with llama.cpp's own last words when it cannot allocate what is asked."""
        self._lib = library()
        self._model = model
        sequences = params.sequences + params.kept
        if not (1 <= params.sequences <= sequences <= MAX_SEQUENCES and params.batch_tokens >= 1 and params.cells >= 1):
            raise EngineError(f"no context has {sequences} sequences and {params.cells} cells")
        outputs = max(params.outputs, sequences)
        self._handle: int | None = self._create(model, params, outputs)
        if not self._handle:
            raise EngineError("llama.cpp cannot create a context: " + ("; ".join(self._errors) or "no reason given"))
        self.cells = int(self._lib.llama_n_ctx(self._handle))
        self.batch_tokens = int(self._lib.llama_n_batch(self._handle))
        self.sequences = sequences
        self.outputs = self.batch_tokens if params.embeddings else outputs
        self._adapter: Adapter | None = None
        self._plans_memory = True  # the next decode does, and reads the model's list of adapters
        self._memory: int | None = self._lib.llama_get_memory(self._handle)
        self._logits_address = binding.logits_address(waits=model.offloaded)
        self.pooling = int(self._lib.llama_pooling_type(self._handle))
        size = self.batch_tokens
        self.token_ids = np.zeros(size, dtype=np.int32)
        self.positions = np.zeros(size, dtype=np.int32)
        self.sequence_ids = np.zeros(size, dtype=np.int32)
        self.wants_output = np.zeros(size, dtype=np.int8)
        # numpy has its price for a handful of numbers, and this runs once a step
        self._few = (self.token_ids.data, self.positions.data, self.sequence_ids.data, self.wants_output.data)
        self._checked = 0
        self._rows_at: tuple[int, int] = (0, 0)
        self._rows_view: FloatArray = np.empty((0, 0), dtype=np.float32)
        self._counts = np.ones(size, dtype=np.int32)
        row = ctypes.POINTER(ctypes.c_int32)
        base = self.sequence_ids.ctypes.data
        self._rows = (row * size)(*(ctypes.cast(base + 4 * place, row) for place in range(size)))
        self._batch = self._lib.llama_batch(
            n_tokens=0,
            token=self.token_ids.ctypes.data_as(row),
            embd=None,
            pos=self.positions.ctypes.data_as(row),
            n_seq_id=self._counts.ctypes.data_as(row),
            seq_id=self._rows,
            logits=self.wants_output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def _create(self, model: Model, params: ContextParams, outputs: int) -> int | None:
        c = self._lib.llama_context_default_params()
        c.n_ctx = params.cells
        c.n_batch = params.batch_tokens
        c.n_ubatch = params.micro_batch_tokens
        c.n_seq_max = params.sequences + params.kept
        c.n_outputs_max = 0 if params.embeddings else outputs
        c.n_threads = params.threads
        c.n_threads_batch = params.threads_batch
        lib = self._lib
        c.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if params.flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        c.kv_unified = True
        c.type_k = c.type_v = _GGML_TYPES[params.cache_type]
        c.embeddings = params.embeddings
        c.pooling_type = params.pooling
        c.no_perf = True
        with model.adapters_lock, log.last_errors() as self._errors:
            handle: int | None = lib.llama_init_from_model(model.handle, c)
        return handle

    @property
    def handle(self) -> int:
        """The C pointer. Raises `EngineError` once closed."""
        if not self._handle:
            raise EngineError("the context has been closed")
        return self._handle

    def close(self) -> None:
        """Frees memory and buffers, before the model's. May be called twice."""
        if self._handle:
            self._lib.llama_free(self._handle)
            self._handle = None

    def fill(self, ids: list[int], positions: list[int], sequences: list[int], wanted: list[int]) -> int:
        """Fills the batch from its beginning; returns the count to decode. Raises `EngineError` as `decode` does."""
        count = len(ids)
        self._check(count, min(ids), max(ids), min(sequences), max(sequences), min(positions), sum(wanted))
        if count <= _FEW:
            for part, values in zip(self._few, (ids, positions, sequences, wanted), strict=True):
                for place, value in enumerate(values):
                    part[place] = value
        else:
            self.token_ids[:count] = ids
            self.positions[:count] = positions
            self.sequence_ids[:count] = sequences
            self.wants_output[:count] = wanted
        self._checked = count
        return count

    def decode(self, count: int) -> int:
        """Runs the first `count` entries of the batch; returns llama.cpp's code, 0 for success.

        Raises `EngineError`, without calling, for what llama.cpp would abort on.
        """
        if count != self._checked:
            if not 1 <= count <= self.batch_tokens:
                raise EngineError(f"a batch of {count} tokens, where 1 to {self.batch_tokens} are allowed")
            ids, sequences = self.token_ids[:count], self.sequence_ids[:count]
            least = int(self.positions[:count].min())
            outputs = int(np.count_nonzero(self.wants_output[:count]))
            self._check(
                count, int(ids.min()), int(ids.max()), int(sequences.min()), int(sequences.max()), least, outputs
            )
        self._checked = 0
        self._batch.n_tokens = count
        if self._plans_memory:
            self._plans_memory = False
            with self._model.adapters_lock:
                return int(self._lib.llama_decode(self.handle, self._batch))
        return int(self._lib.llama_decode(self.handle, self._batch))

    def use_threads(self, threads: int) -> None:
        """Computes with so many threads from the next batch on; cheap."""
        self._lib.llama_set_n_threads(self.handle, threads, threads)

    def use_adapter(self, adapter: Adapter | None) -> None:
        """From the next batch on, computes with a LoRA adapter, or without.

        What is in memory stays as the adapter of its time made it: sequences of different adapters share nothing.
        Raises `EngineError` for an adapter of another model, or one that was unloaded.
        """
        if adapter is self._adapter:
            return
        if adapter is not None and adapter.model is not self._model:
            raise EngineError("the adapter was loaded for another model")
        handles = (self._lib.llama_adapter_lora_p_ctypes * 1)()
        if adapter is not None:
            handles[0] = adapter.handle
        scales = (ctypes.c_float * 1)(1.0)
        code = self._lib.llama_set_adapters_lora(self.handle, handles, 0 if adapter is None else 1, scales)
        if code:
            raise EngineError(f"llama.cpp cannot use this adapter (code {code})")
        self._adapter = adapter
        self._plans_memory = True

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA adapter that batches are computed with now."""
        return self._adapter

    def _check(
        self,
        count: int,
        least_id: int,
        largest_id: int,
        least_sequence: int,
        largest_sequence: int,
        least_position: int,
        outputs: int,
    ) -> None:
        if not 1 <= count <= self.batch_tokens:
            raise EngineError(f"a batch of {count} tokens, where 1 to {self.batch_tokens} are allowed")
        if least_id < 0 or largest_id >= self._model.vocabulary_size:
            raise EngineError("a token id outside of the vocabulary")
        if least_sequence < 0 or largest_sequence >= self.sequences or least_position < 0:
            raise EngineError("a sequence id or position out of range")
        if outputs > self.outputs:
            raise EngineError(f"more than {self.outputs} outputs in one batch")

    def logits(self, rows: int) -> FloatArray:
        """The logits of the last batch's outputs, in batch order: shape (rows, vocabulary). A view of C's memory."""
        address = self._logits_address(self.handle) or 0
        if (address, rows) != self._rows_at:  # mostly it is the same memory as last time
            self._rows_view = self._view(address, rows, self._model.vocabulary_size)
            self._rows_at = (address, rows)
        return self._rows_view

    def embeddings(self, rows: int) -> FloatArray:
        """The vectors of the last batch's tokens, unpooled, in batch order: shape (rows, size). A view."""
        return self._view(_address(self._lib.llama_get_embeddings(self.handle)), rows, self._model.embedding_size)

    def pooled(self, sequence: int) -> FloatArray:
        """The pooled vector of one sequence of the last batch: shape (size,), or (classes,) of a reranker. A view."""
        self._check_sequence(sequence)
        size = self._model.class_count if self.pooling == POOLING_RANK else self._model.embedding_size
        return self._view(_address(self._lib.llama_get_embeddings_seq(self.handle, sequence)), 1, size).reshape(-1)

    def remove(self, sequence: int) -> None:
        """Forgets a whole sequence."""
        self.trim(sequence, 0)

    def trim(self, sequence: int, length: int) -> None:
        """Lets a sequence keep its first `length` tokens alone.

        Raises `EngineError` where that is impossible: a state or a sliding window can only be forgotten as a whole.
        """
        self._check_sequence(sequence)
        if self._memory and not self._lib.llama_memory_seq_rm(self._memory, sequence, max(length, 0) or -1, -1):
            raise EngineError(f"sequence {sequence} cannot be cut to {length} tokens in this model's memory")

    def copy(self, source: int, target: int, count: int) -> None:
        """Lets `target`, which must be empty, share the first `count` tokens of `source`."""
        self._check_sequence(source)
        self._check_sequence(target)
        if source == target or self.last_position(target) >= 0 or count > self.last_position(source) + 1:
            raise EngineError(f"cannot copy {count} tokens of sequence {source} to {target}")
        self._lib.llama_memory_seq_cp(self._memory, source, target, 0, count)

    def last_position(self, sequence: int) -> int:
        """The last position of a sequence in memory, -1 if it is empty."""
        self._check_sequence(sequence)
        return int(self._lib.llama_memory_seq_pos_max(self._memory, sequence)) if self._memory else -1

    @property
    def has_memory(self) -> bool:
        """Whether tokens stay in memory from one batch to the next (not in encoders)."""
        return bool(self._memory)

    def _check_sequence(self, sequence: int) -> None:
        _ = self.handle
        if not 0 <= sequence < self.sequences:
            raise EngineError(f"no sequence {sequence} among {self.sequences}")

    @staticmethod
    def _view(address: int, rows: int, columns: int) -> FloatArray:
        if not address:
            raise EngineError("llama.cpp kept no output of the last batch")
        buffer = _float_buffer(rows * columns).from_address(address)
        return np.frombuffer(buffer, dtype=np.float32).reshape(rows, columns)


def _address(pointer: Any) -> int:
    return ctypes.addressof(pointer.contents) if pointer else 0


@functools.lru_cache(maxsize=512)
def _float_buffer(count: int) -> Any:
    return ctypes.c_float * count
