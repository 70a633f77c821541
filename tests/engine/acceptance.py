"""What the acceptance tests of the llama.cpp engine share: counting at the batch, and comparing two answers.

The tests ask through the engine's interface alone; what they know of its inside is `Context`, where the batches pass.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from chorus.core.errors import EngineError
from chorus.core.generation import (
    Conversation,
    GenerationRequest,
    PromptScored,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource
from chorus.engine.llama.context import Context
from chorus.testing.engine_subject import GREEDY, Heard, hear

# Under this (natural logarithm) numerics, which differ with the batch, may decide between the two likeliest tokens.
NEARLY_EQUAL = 0.2


def ask(
    prompt: str | Sequence[int] | Conversation, tokens: int, sampling: Sampling = GREEDY, **changes: object
) -> GenerationRequest:
    """A request for exactly so many tokens."""
    if isinstance(prompt, str):
        prompt = TextPrompt(prompt)
    request = GenerationRequest(
        "",
        prompt if isinstance(prompt, TextPrompt | Conversation) else TokenPrompt(tuple(prompt)),
        sampling=sampling,
        stop=StopConditions(max_tokens=tokens, ignore_eos=True),
    )
    return replace(request, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def serving(*sources: ModelSource, **settings: Any) -> AsyncIterator[LlamaEngine]:
    """An engine with the first of these models loaded. One thread decodes, and nothing is guessed ahead or sized by
    measured time, unless the settings say so: what a test counts must not depend on the machine.
    """
    engine = LlamaEngine(sources, LlamaSettings(**{"threads": 1, "gap_s": 1000.0, "speculation": False, **settings}))
    await engine.start()
    try:
        await engine.load(sources[0].artifact.name)
        yield engine
    finally:
        await engine.stop()


@dataclass(frozen=True)
class Batch:
    """One call of decode: each sequence's positions in it, in order."""

    positions: dict[int, list[int]]

    @property
    def count(self) -> int:
        return sum(map(len, self.positions.values()))


@dataclass
class Batches:
    """Every batch given to decode while watched. Past `limit` tokens batches fail, so that a test that fails ends.

    `made_one` is called for each in the engine's own thread, before it is decoded.
    """

    limit: int = 1 << 40
    made_one: Callable[[], None] = lambda: None
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
        batches.made_one()
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


def assert_close(
    expected: Sequence[TokenLogprob],
    found: Sequence[TokenLogprob],
    *,
    greedy: bool = True,
    nearly: float = NEARLY_EQUAL,
) -> int | None:
    """Raises `AssertionError` unless two answers are equal up to where numerics decided; returns that place.

    At it the model was asked the same and said nearly the same: greedy answers part only between two tokens that were
    nearly as likely in one of the two; drawn ones, where a draw fell next to the border of two tokens. In both the
    distributions agree. `nearly` is how far apart log-probabilities may be.
    """
    place = first_difference([s.token_id for s in expected], [s.token_id for s in found])
    for a, b in zip(expected[:place], found[:place], strict=False):
        assert abs(a.logprob - b.logprob) < 2 * nearly * max(1.0, abs(a.logprob)), f"{a} became {b}"
    if place is None:
        return None
    if greedy:
        closest = min(gap(expected[place]), gap(found[place]))
        assert closest < nearly, f"at {place}: {expected[place]} became {found[place]}"
    before = {other.token_id: other.logprob for other in expected[place].alternatives}
    after = {other.token_id: other.logprob for other in found[place].alternatives}
    apart = [abs(before[other] - after[other]) for other in before.keys() & after.keys()]
    assert apart, f"at {place}: {expected[place]} became {found[place]}"
    assert sum(apart) / len(apart) < nearly, f"at {place}: {expected[place]} became {found[place]}"
    return place


async def assert_computed_rightly(
    engine: LlamaEngine, request: GenerationRequest, heard: Heard, choice: int = 0
) -> None:
    """Raises `AssertionError` unless each token is as likely as it is when prompt and answer are read anew, alone.

    That holds over a whole answer, also behind a token where numerics decided. The request has a token prompt and asks
    for log-probabilities with alternatives; nothing else may run meanwhile.
    """
    assert isinstance(request.prompt, TokenPrompt)
    prompt, sampling = request.prompt.token_ids, request.sampling
    said = [scored for delta in heard.deltas if delta.choice == choice for scored in delta.logprobs]
    await engine.forget_cache()
    answer = [scored.token_id for scored in said]
    reading = await hear(engine, ask([*prompt, *answer], 0, prompt_logprobs=0))
    (anew,) = (event.tokens for event in reading.events if isinstance(event, PromptScored))
    apart = [
        abs(a.logprob - b.logprob) / max(1.0, abs(b.logprob)) for a, b in zip(said, anew[len(prompt) :], strict=True)
    ]
    assert max(apart) < 2 * NEARLY_EQUAL, f"{apart}"
    assert sum(apart) / len(apart) < NEARLY_EQUAL / 2, f"{apart}"
    if sampling.temperature == 0.0 and not sampling.penalizes and not sampling.logit_bias:
        assert all(scored.alternatives[0].logprob - scored.logprob < NEARLY_EQUAL for scored in said)
