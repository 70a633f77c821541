"""What the acceptance tests of the llama.cpp engine share: counting at the batch, and comparing two answers.

The tests ask through the engine's interface alone; what they know of its inside is `Context`, where the batches pass.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from chorus.core.errors import EngineError
from chorus.core.generation import GenerationRequest, Sampling, StopConditions, TextPrompt, TokenLogprob, TokenPrompt
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource
from chorus.engine.llama.context import Context
from chorus.testing.engine_subject import GREEDY, Heard, hear

# Under this (natural logarithm) numerics, which differ with the batch, may decide between the two likeliest tokens.
NEARLY_EQUAL = 0.2


def ask(prompt: str | Sequence[int], tokens: int, sampling: Sampling = GREEDY, **changes: object) -> GenerationRequest:
    """A request for exactly so many tokens."""
    request = GenerationRequest(
        "",
        TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(tuple(prompt)),
        sampling=sampling,
        stop=StopConditions(max_tokens=tokens, ignore_eos=True),
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def has_setting(name: str) -> bool:
    """Whether this engine has such a setting."""
    return name in {setting.name for setting in fields(LlamaSettings)}


@asynccontextmanager
async def serving(*sources: ModelSource, **settings: Any) -> AsyncIterator[LlamaEngine]:
    """An engine with the first of these models loaded; one thread decodes unless `threads` says otherwise."""
    engine = LlamaEngine(sources, LlamaSettings(**{"threads": 1, **settings}))
    await engine.start()
    try:
        await engine.load(sources[0].artifact.name)
        yield engine
    finally:
        await engine.stop()


async def forget_cache(engine: LlamaEngine) -> None:
    """Lets the engine drop what it keeps of finished sequences, where it keeps any."""
    forget = getattr(engine, "forget_cache", None)
    outcome = forget() if forget is not None else None
    if inspect.isawaitable(outcome):
        await outcome


@dataclass(frozen=True)
class Batch:
    """One call of decode: each sequence's positions in it, in order."""

    positions: dict[int, list[int]]

    @property
    def count(self) -> int:
        return sum(map(len, self.positions.values()))


@dataclass
class Batches:
    """Every batch given to decode while watched. Past `limit` tokens batches fail, so that a test that fails ends."""

    limit: int = 1 << 40
    made: list[Batch] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(batch.count for batch in self.made)

    def sequences_left(self) -> dict[int, int]:
        """The last position of every sequence that isn't empty. Only while no engine decodes."""
        return {
            sequence: last
            for context in self.contexts
            for sequence in range(context.sequences)
            if (last := context.last_position(sequence)) != -1
        }


@contextmanager
def watching(limit: int = 1 << 40) -> Iterator[Batches]:
    """Notes what every context of this process is given to decode."""
    batches = Batches(limit)
    decode = Context.decode

    def watched(context: Context, count: int) -> int:
        positions: dict[int, list[int]] = {}
        for sequence, position in zip(
            context.sequence_ids[:count].tolist(), context.positions[:count].tolist(), strict=True
        ):
            positions.setdefault(sequence, []).append(position)
        batches.made.append(Batch(positions))
        if context not in batches.contexts:
            batches.contexts.append(context)
        if batches.tokens > batches.limit:
            raise EngineError(f"more than the {batches.limit} tokens that this test allows were to be decoded")
        return decode(context, count)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Context, "decode", watched)
        yield batches


# --- two answers to one request -------------------------------------------------------------------------------------


def gap(scored: TokenLogprob) -> float:
    """How much likelier the likeliest token was than the next one (natural logarithm)."""
    return scored.alternatives[0].logprob - scored.alternatives[1].logprob


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two answers differ; None where one is the beginning of the other."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def assert_close(expected: Sequence[TokenLogprob], found: Sequence[TokenLogprob], *, greedy: bool = True) -> int | None:
    """Raises `AssertionError` unless two answers are equal up to where numerics decided; returns that place.

    At it the model was asked the same and said nearly the same: greedy answers part only between two tokens that were
    nearly as likely; drawn ones, where a draw fell next to the border of two tokens, and the distributions agree.
    """
    place = first_difference([s.token_id for s in expected], [s.token_id for s in found])
    for a, b in zip(expected[:place], found[:place], strict=False):
        assert abs(a.logprob - b.logprob) < NEARLY_EQUAL * max(1.0, abs(a.logprob)), f"{a} became {b}"
    if place is None:
        return None
    if greedy:
        assert gap(expected[place]) < NEARLY_EQUAL, f"at {place}: {expected[place]} became {found[place]}"
    before = {other.token_id: other.logprob for other in expected[place].alternatives}
    after = {other.token_id: other.logprob for other in found[place].alternatives}
    shared = before.keys() & after.keys()
    assert shared, f"at {place}: {expected[place]} became {found[place]}"
    assert max(abs(before[other] - after[other]) for other in shared) < NEARLY_EQUAL, (
        f"at {place}: {expected[place]} became {found[place]}"
    )
    return place


async def answers_alone(engine: LlamaEngine, requests: Sequence[GenerationRequest]) -> list[Heard]:
    """Each request's answer when nothing else runs, and nothing is remembered of the one before."""
    heard = []
    for request in requests:
        await forget_cache(engine)
        heard.append(await hear(engine, request))
    return heard
