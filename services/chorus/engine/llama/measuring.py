"""How fast a model runs in one way or another, what it takes, and how well it predicts a text.

The text is "The Adventure of the Noble Bachelor" by Arthur Conan Doyle (1892), which is in the public domain, with each
paragraph on a line: `data/prose.txt`, 44 kB, about eleven thousand tokens.

Speeds are measured over real steps of llama.cpp, with the text's own tokens in place of sampled ones: sampling is the
same in every variant. Perplexity is that of windows of 512 tokens which don't overlap, without the first 16 of each,
for which no model has anything to go by.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from chorus.core.errors import EngineError
from chorus.core.tuning.figures import Quality
from chorus.core.tuning.variant import Sample, Variant
from chorus.engine.llama import log
from chorus.engine.llama.binding import Model
from chorus.engine.llama.context import Context, ContextParams

_WINDOW_TOKENS = 512
_UNSCORED_TOKENS = 16
_BLOCK_TOKENS = 31  # divides what is scored of a window, 496
_ROWS = 64  # of logits at a time: 512 of a vocabulary of 262,144 would take half a gigabyte
_OWN_TOKENS = 16  # of each stream before it decodes together with others
_LEAST_STEPS = 4
_MOST_STEPS = 256


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured: prompts of `prompt_tokens`, and `streams` that decode together, in KV memory of `cells` tokens.

    Each of the three speeds is measured for about `seconds`.
    """

    cells: int
    streams: int
    prompt_tokens: int = 512
    seconds: float = 1.0


def prose(model: Model) -> list[int]:
    """The tokens of the text, without special ones."""
    text = resources.files("chorus.engine.llama").joinpath("data", "prose.txt").read_text(encoding="utf-8")
    return model.tokenize(text, add_special=False, parse_special=False)


def measure_speed(model: Model, variant: Variant, work: Workload, *, weights_bytes: int = 0) -> Sample:
    """Measures each of a sample's figures once. `weights_bytes` is what the model itself takes.

    Raises `EngineError` where the variant cannot be run.
    """
    tokens = prose(model)
    with log.buffers() as buffers:
        context = _context(model, variant, cells=work.cells, sequences=work.streams, outputs=work.streams)
    try:
        bench = _Bench(context, tokens)
        prompt = max(1, min(work.prompt_tokens, context.cells - _LEAST_STEPS - 1, len(tokens)))
        bench.read(0, min(prompt, 32))  # the first step of a context allocates, and is not like those after it
        prefill = bench.prefill(prompt, work.seconds)
        alone = bench.decode((0,), work.seconds)
        context.remove(0)
        own = max(1, min(_OWN_TOKENS, context.cells // (2 * work.streams)))
        for sequence in range(work.streams):
            bench.read(sequence, own)
        together = bench.decode(tuple(range(work.streams)), work.seconds)
    finally:
        context.close()
    return Sample(prefill, alone, together, weights_bytes + needed_bytes(buffers))


def measure_quality(model: Model, variant: Variant, token_count: int) -> Quality:
    """How well the first `token_count` tokens of the text, whole windows of them, are predicted.

    Raises `EngineError` where the variant cannot be run, or the model reads so little that no window fits.
    """
    size = min(_WINDOW_TOKENS, token_count, model.trained_context or _WINDOW_TOKENS)
    tokens = prose(model)
    count = max(1, min(token_count, len(tokens)) // size)
    if size <= _UNSCORED_TOKENS + _BLOCK_TOKENS or len(tokens) < size:
        raise EngineError(f"a context of {size} tokens is too short to measure a perplexity")
    variant = Variant(variant.threads, _ROWS, _ROWS, variant.cache_type)
    context = _context(model, variant, cells=size, sequences=1, outputs=_ROWS)
    try:
        blocks: list[float] = []
        for start in range(0, count * size, size):
            window = tokens[start : start + size]
            if model.adds_bos:
                window[0] = model.bos
            context.remove(0)
            losses = np.concatenate(list(_losses(context, window)))[_UNSCORED_TOKENS - 1 :]
            usable = len(losses) // _BLOCK_TOKENS * _BLOCK_TOKENS
            blocks += losses[:usable].reshape(-1, _BLOCK_TOKENS).mean(axis=1).tolist()
    finally:
        context.close()
    if not np.isfinite(blocks).all():
        raise EngineError("the model computes nonsense this way: a likelihood is no number")
    return Quality(tuple(blocks))


def needed_bytes(buffers: Sequence[log.Buffer]) -> int:
    """What buffers take together. Of weights that are memory-mapped and then repacked, the repacked ones stay."""
    mapped = any(buffer.device.endswith("_Mapped") for buffer in buffers)
    return sum(buffer.size_bytes for buffer in buffers if not (mapped and buffer.device.endswith("_REPACK")))


def _context(model: Model, variant: Variant, *, cells: int, sequences: int, outputs: int) -> Context:
    params = ContextParams(
        cells=cells,
        batch_tokens=variant.batch_tokens,
        micro_batch_tokens=variant.micro_batch_tokens,
        sequences=sequences,
        outputs=outputs,
        threads=variant.threads,
        threads_batch=variant.threads,
        cache_type=variant.cache_type,
    )
    return Context(model, params)


def _losses(context: Context, window: Sequence[int]) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """The negative log-likelihood of each token of `window` but the first, in nats."""
    for start in range(0, len(window) - 1, context.batch_tokens):
        count = min(context.batch_tokens, len(window) - 1 - start)
        context.token_ids[:count] = window[start : start + count]
        context.positions[:count] = range(start, start + count)
        context.sequence_ids[:count] = 0
        context.wants_output[:count] = 1
        _decode(context, count)
        logits = context.logits(count)
        logits = logits - logits.max(axis=1, keepdims=True)
        targets = np.asarray(window[start + 1 : start + 1 + count])
        yield np.log(np.exp(logits).sum(axis=1, dtype=np.float64)) - logits[np.arange(count), targets]


def _decode(context: Context, count: int) -> None:
    code = context.decode(count)
    if code:
        raise EngineError(f"llama.cpp cannot decode this way (code {code})")


class _Bench:
    """A context whose sequences hold the beginning of the text, each as far as it has come."""

    def __init__(self, context: Context, tokens: Sequence[int]) -> None:
        self._context = context
        self._tokens = tokens

    def read(self, sequence: int, count: int) -> None:
        """Reads a prompt of `count` tokens into an empty sequence."""
        context = self._context
        context.remove(sequence)
        for start in range(0, count, context.batch_tokens):
            size = min(context.batch_tokens, count - start)
            context.token_ids[:size] = self._tokens[start : start + size]
            context.positions[:size] = range(start, start + size)
            context.sequence_ids[:size] = sequence
            context.wants_output[:size] = 0
            context.wants_output[size - 1] = 1
            _decode(context, size)
            context.logits(1)  # waits for a device that computes on its own

    def prefill(self, prompt_tokens: int, seconds: float) -> float:
        """Tokens per second of prompts that are read one after another."""
        began, read = time.perf_counter(), 0
        while True:
            self.read(0, prompt_tokens)
            read += prompt_tokens
            took = time.perf_counter() - began
            if took >= seconds:
                return read / took

    def decode(self, sequences: Sequence[int], seconds: float) -> float:
        """Tokens per second, of all together, of sequences that go on with one token a step."""
        context, count = self._context, len(sequences)
        positions = [context.last_position(sequence) + 1 for sequence in sequences]
        free = (context.cells - sum(positions)) // count
        context.sequence_ids[:count] = sequences
        context.wants_output[:count] = 1
        began, steps = time.perf_counter(), 0
        while True:
            places = [position + steps for position in positions]
            context.token_ids[:count] = [self._tokens[place % len(self._tokens)] for place in places]
            context.positions[:count] = places
            _decode(context, count)
            context.logits(count)
            steps += 1
            took = time.perf_counter() - began
            if steps >= min(free, _MOST_STEPS) or (took >= seconds and steps >= _LEAST_STEPS):
                return steps * count / took
