"""A second, small model that guesses what a large one will say next, for the large one to check all at once.

What is guessed is the small model's greedy continuation, for several streams in one batch, and a stream's guess ends
where the small model is not sure of itself. (Leviathan, Kalman, Matias, "Fast inference from transformers via
speculative decoding", arXiv 2211.17192.) How many tokens are worth guessing, and whether it pays, is decided elsewhere.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from chorus.core.batching.prefixes import common_prefix
from chorus.core.errors import ConfigError, EngineError
from chorus.engine.llama.binding import Model
from chorus.engine.llama.context import Context, ContextParams, FloatArray

# Vocabularies of one family differ by some unused entries at the end, and in how the first ones are written.
_SIZE_DIFFERENCE = 128
_FIRST_COMPARED = 5
_SMOOTHING = 0.1


def check_vocabularies(target: Model, draft: Model, *, target_name: str, draft_name: str) -> None:
    """Raises `ConfigError`, which says why, unless a token id means the same in both models."""

    def refuse(why: str) -> ConfigError:
        return ConfigError(
            f"{draft_name} cannot draft for {target_name}: {why}; under runner.draft_models, name a small model of the "
            "same family as the large one",
            metadata={"key": "runner.draft_models", "model": target_name, "draft": draft_name},
        )

    if not draft.generates:
        raise refuse("it does not generate text")
    if draft.keeps_state:
        raise refuse("it keeps a state that cannot take back a wrong guess")
    if target.vocabulary_type != draft.vocabulary_type:
        raise refuse("their vocabularies are of different types")
    if target.adds_bos != draft.adds_bos or (target.adds_bos and target.bos != draft.bos):
        raise refuse("their texts begin with different tokens")
    if target.eos != draft.eos:
        raise refuse("their texts end with different tokens")
    sizes = (target.vocabulary_size, draft.vocabulary_size)
    if abs(sizes[0] - sizes[1]) > _SIZE_DIFFERENCE:
        raise refuse(f"their vocabularies have {sizes[0]} and {sizes[1]} tokens")
    # the longer one has tokens at its end that the other lacks
    for token_id, (ours, theirs) in enumerate(zip(target.token_texts(), draft.token_texts(), strict=False)):
        if token_id >= _FIRST_COMPARED and ours != theirs:
            one, other = (text.decode("utf-8", "replace")[:40] for text in (ours, theirs))
            raise refuse(f"token {token_id} is {one!r} in one and {other!r} in the other")


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Guess at most `count` tokens after `tokens`, which is all that the stream in `slot` has so far."""

    slot: int
    tokens: Sequence[int]
    count: int


@dataclass(slots=True)
class _Stream:
    """What the draft model's memory holds of one stream."""

    sequence: int
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Guess:
    stream: _Stream
    todo: list[int]
    count: int
    found: list[int] = field(default_factory=list)


class Drafter:
    """The draft model of one target, in the target's owner thread.

    It follows as many streams as its context has sequences, known by their slots; where there are more, or memory is
    full, it forgets the one that was asked about longest ago, and reads it anew when it is asked about again.
    """

    def __init__(
        self, target: Model, model: Model, params: ContextParams, *, catch_up_tokens: int = 256, sure: float = 0.5
    ) -> None:
        """Takes `model` over, and closes it at the end, or at once where there can be no context.

        The vocabularies must have passed `check_vocabularies`. A call of `propose` reads at most `catch_up_tokens`
        tokens that the draft model has not seen, so that streams keep moving. A token of which it is less `sure`
        (0 to 1) is not guessed. Raises `EngineError` where its context does not fit.
        """
        self.step_s = 0.0  # what guessing one token for everybody took lately; 0 until it is known
        self._model = model
        self._ids = min(target.vocabulary_size, model.vocabulary_size)
        self._ends = model.end_tokens()
        self._catch_up_tokens = catch_up_tokens
        self._sure = sure
        try:
            self._context = Context(model, params)
        except BaseException:
            model.close()
            raise
        self._longest = min(self._context.cells, model.trained_context or self._context.cells)
        self._streams: OrderedDict[int, _Stream] = OrderedDict()  # by slot, the one asked about longest ago first
        self._free = list(range(self._context.sequences - 1, -1, -1))

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """The guesses, in the order of the requests; none where the model is not sure, or has not caught up yet.

        The slots must differ. A batch that fails costs guesses alone: what it was about is forgotten.
        """
        asked = {request.slot for request in requests}
        guesses: list[_Guess | None] = []
        promised = 0  # cells that those before need in this call
        for request in requests:
            guess = self._begin(request, asked, promised)
            promised += 0 if guess is None else len(guess.todo) + guess.count
            guesses.append(guess)
        reading = [guess for guess in guesses if guess is not None]
        left = self._catch_up_tokens
        while reading:
            batch, left = self._share(reading, left)
            if not batch:
                break
            began = time.perf_counter()
            rows = self._compute(batch)
            if rows is None:
                break
            if len(batch) == sum(count for _, count in batch):  # nothing but guessing
                step_s = time.perf_counter() - began
                self.step_s += (step_s - self.step_s) * (_SMOOTHING if self.step_s else 1.0)
            reading = [guess for guess in reading if guess.todo or self._goes_on(guess, next(rows))]
        return [[] if guess is None else guess.found for guess in guesses]

    def forget(self, slot: int) -> None:
        """The stream in that slot is over, or another one."""
        stream = self._streams.pop(slot, None)
        if stream is not None:
            self._context.remove(stream.sequence)
            self._free.append(stream.sequence)

    def held(self, slot: int) -> int:
        """How many tokens of the stream in that slot are in the draft model's memory."""
        stream = self._streams.get(slot)
        return 0 if stream is None else len(stream.tokens)

    def close(self) -> None:
        """Frees context and model. May be called twice."""
        self._context.close()
        self._model.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _begin(self, request: DraftRequest, asked: Set[int], promised: int) -> _Guess | None:
        """Brings what is in memory of a stream in step with it; None where nothing can be guessed."""
        tokens = request.tokens
        count = min(request.count, self._longest - len(tokens))
        if count < 1 or not tokens:
            return None
        stream = self._stream(request.slot, asked)
        if stream is None:
            return None
        # the last token is computed even where it is known, for what follows it
        kept = min(common_prefix(stream.tokens, tokens), len(tokens) - 1)
        if kept < len(stream.tokens):
            self._trim(stream, kept)
        kept = len(stream.tokens)
        todo = list(tokens[kept:])
        if max(todo) >= self._ids or min(todo) < 0:
            return None
        while self._held_tokens() + promised + len(todo) + count > self._context.cells:
            if not self._forget_another(asked):
                return None
        return _Guess(stream, todo, count)

    def _stream(self, slot: int, asked: Set[int]) -> _Stream | None:
        stream = self._streams.get(slot)
        if stream is None:
            if not self._free and not self._forget_another(asked):
                return None
            stream = self._streams[slot] = _Stream(self._free.pop())
        self._streams.move_to_end(slot)
        return stream

    def _held_tokens(self) -> int:
        return sum(len(stream.tokens) for stream in self._streams.values())

    def _forget_another(self, asked: Set[int]) -> bool:
        """Forgets the stream that was asked about longest ago, if there is one that nobody asks about now."""
        for slot in self._streams:
            if slot not in asked:
                self.forget(slot)
                return True
        return False

    def _trim(self, stream: _Stream, length: int) -> None:
        try:
            self._context.trim(stream.sequence, length)
        except EngineError:
            self._context.remove(stream.sequence)
            length = 0
        del stream.tokens[length:]

    def _share(self, reading: Sequence[_Guess], left: int) -> tuple[list[tuple[_Guess, int]], int]:
        """Who gets how many tokens of the next batch: a guess's next token always, what is to be caught up by order.

        Returns it with what is left to catch up in this call.
        """
        room = self._context.batch_tokens - len(reading)
        batch = []
        for guess in reading:
            more = min(len(guess.todo) - 1, room, left)
            if guess.found or more == len(guess.todo) - 1:
                count = len(guess.todo)
            elif more <= 0:
                continue
            else:
                count = more
            room -= count - 1
            left -= count - (count == len(guess.todo))
            batch.append((guess, count))
        return batch, left

    def _compute(self, batch: Sequence[tuple[_Guess, int]]) -> Iterator[FloatArray] | None:
        """Decodes; returns the logits of those that have caught up, in order, or None where it failed."""
        context = self._context
        place = outputs = 0
        for guess, count in batch:
            end = place + count
            start = len(guess.stream.tokens)
            context.token_ids[place:end] = guess.todo[:count]
            context.positions[place:end] = range(start, start + count)
            context.sequence_ids[place:end] = guess.stream.sequence
            context.wants_output[place:end] = 0
            if count == len(guess.todo):
                context.wants_output[end - 1] = 1
                outputs += 1
            place = end
        if context.decode(place):
            failed = {guess.stream.sequence for guess, _ in batch}
            for slot in [slot for slot, stream in self._streams.items() if stream.sequence in failed]:
                self.forget(slot)
            return None
        for guess, count in batch:
            guess.stream.tokens += guess.todo[:count]
            del guess.todo[:count]
        return iter(context.logits(outputs)) if outputs else iter(())

    def _goes_on(self, guess: _Guess, row: FloatArray) -> bool:
        """Takes the likeliest next token if the model is sure of it; returns whether to guess one more after it."""
        token_id = int(row.argmax())
        likelihood = 1.0 / float(np.exp(row - row[token_id]).sum())
        if not likelihood >= self._sure or token_id >= self._ids:
            return False
        guess.found.append(token_id)
        if len(guess.found) >= guess.count or token_id in self._ends:
            return False
        guess.todo.append(token_id)
        return True
