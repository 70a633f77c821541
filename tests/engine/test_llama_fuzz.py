"""Whatever is asked, the engine answers or refuses, and is idle afterwards; llama.cpp never aborts the process."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Awaitable

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from chorus.core.errors import ChorusError
from chorus.core.generation import (
    Conversation,
    DeliveredChoice,
    Dry,
    EmbeddingRequest,
    GenerationRequest,
    Message,
    MessageRole,
    Priority,
    Prompt,
    Sampling,
    StopConditions,
    TextPart,
    TextPrompt,
    TokenPrompt,
    Xtc,
)
from chorus.engine.llama import LlamaEngine
from chorus.testing.engine_subject import hear

pytestmark = pytest.mark.asyncio(loop_scope="session")

good_ids = st.integers(0, 49151)
ids = good_ids | st.sampled_from([-1, 0, 2, 49152, 2**31, 2**40])
numbers = st.sampled_from([0.0, 0.05, 0.5, 1.0, 1.3, 5.0, -1.0, 1e30, math.inf, math.nan])
good_texts = st.text(min_size=1, max_size=12) | st.sampled_from(["<|im_end|>", "\x00", "🙂" * 9])
texts = good_texts | st.sampled_from(["", "\ud800", "word " * 300])


def make_prompts(texts: st.SearchStrategy[str], ids: st.SearchStrategy[int]) -> st.SearchStrategy[Prompt]:
    parts = st.lists(st.builds(TextPart, texts), max_size=2).map(tuple)
    messages = st.builds(Message, st.sampled_from(MessageRole), parts)
    return (
        st.builds(TextPrompt, texts)
        | st.builds(TokenPrompt, st.lists(ids, min_size=1, max_size=20).map(tuple))
        | st.builds(Conversation, st.lists(messages, min_size=1, max_size=3).map(tuple))
    )


good_requests = st.builds(
    GenerationRequest,
    model=st.just(""),
    prompt=make_prompts(good_texts, good_ids),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 5),
        top_k=st.integers(0, 60) | st.just(10**9),
        top_p=st.floats(0.01, 1),
        min_p=st.floats(0, 1),
        typical_p=st.floats(0.01, 1),
        repetition_penalty=st.floats(0.01, 10),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        penalty_window=st.sampled_from([0, 1, 64, 2**32 - 1]),
        dry=st.none()
        | st.builds(
            Dry,
            multiplier=st.floats(0, 100),
            base=st.floats(1, 100),
            allowed_length=st.sampled_from([0, 2, 2**32 - 1]),
            window=st.sampled_from([None, 0, 3, 2**32 - 1]),
            sequence_breakers=st.lists(st.text(max_size=50), max_size=5).map(tuple),
        ),
        xtc=st.none() | st.builds(Xtc, st.floats(0, 1), st.floats(0, 0.6)),
        logit_bias=st.dictionaries(good_ids, st.floats(-100, 100), max_size=3),
        seed=st.none() | st.integers(0, 2**64 - 1),
    ),
    stop=st.builds(
        StopConditions,
        max_tokens=st.integers(0, 4),
        strings=st.lists(st.text(max_size=3), max_size=3).map(tuple),
        token_ids=st.lists(good_ids, max_size=2).map(tuple),
        ignore_eos=st.booleans(),
    ),
    choice_count=st.just(3),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    resume=st.lists(
        st.builds(DeliveredChoice, st.integers(0, 2), st.lists(good_ids, max_size=4).map(tuple)),
        max_size=2,
        unique_by=lambda delivered: delivered.choice,
    ).map(tuple),
    priority=st.sampled_from(Priority),
)
wild_requests = st.builds(
    GenerationRequest,
    model=st.just(""),
    prompt=make_prompts(texts, ids),
    sampling=st.builds(Sampling)
    | st.builds(Sampling, temperature=numbers, top_p=numbers, min_p=numbers, top_k=st.integers(-1, 9))
    | st.builds(Sampling, dry=st.builds(Dry, numbers, numbers, st.integers(-1, 2), st.sampled_from([None, -1])))
    | st.builds(Sampling, xtc=st.builds(Xtc, numbers, numbers))
    | st.builds(Sampling, typical_p=numbers, repetition_penalty=numbers, presence_penalty=numbers)
    | st.builds(Sampling, logit_bias=st.dictionaries(ids, numbers, max_size=2), seed=st.sampled_from([-1, 2**64])),
    stop=st.builds(StopConditions, max_tokens=st.integers(-1, 3)),
    choice_count=st.sampled_from([1, 0, 2, 129]),
    logprobs=st.none() | st.integers(-1, 21),
    prompt_logprobs=st.none() | st.sampled_from([-1, 1, 21]),
    resume=st.lists(st.builds(DeliveredChoice, st.integers(-1, 2), st.lists(ids, max_size=3).map(tuple)), max_size=1)
    .map(tuple),
)  # fmt: skip


async def outcome(call: Awaitable[object]) -> str:
    """`answered`, or the reason of the refusal. Any other error is one that no caller may see."""
    try:
        await call
    except ChorusError as error:
        return error.reason
    return "answered"


@given(good_requests)
@settings(max_examples=30, deadline=None)
async def test_any_valid_request_is_answered(llama: LlamaEngine, request_: GenerationRequest) -> None:
    await hear(llama, request_)
    (load,) = llama.load_report()
    assert (load.slots_used, load.queued, load.kv_used_tokens) == (0, 0, 0)


@given(wild_requests)
@settings(max_examples=60, deadline=None)
async def test_any_other_request_is_answered_or_refused(llama: LlamaEngine, request_: GenerationRequest) -> None:
    reason = await outcome(hear(llama, request_))
    event(reason)
    assert reason in {"answered", "INVALID_REQUEST", "PROMPT_TOO_LONG", "UNSUPPORTED_FEATURE"}
    (load,) = llama.load_report()
    assert (load.slots_used, load.queued, load.kv_used_tokens) == (0, 0, 0)


inputs = st.lists(texts | st.lists(ids, max_size=8).map(tuple), max_size=2).map(tuple)


@given(inputs, st.sampled_from([None, "end", "start", "middle"]))
@settings(max_examples=12, deadline=None)
async def test_any_text_is_embedded_or_refused(
    llama: LlamaEngine, inputs: tuple[str | tuple[int, ...], ...], truncate: str | None
) -> None:
    reason = await outcome(llama.embed(EmbeddingRequest("", inputs, truncate=truncate)))
    assert reason in {"answered", "INVALID_REQUEST", "PROMPT_TOO_LONG"}


@given(texts | st.text(max_size=300), st.booleans(), st.booleans(), st.lists(ids, max_size=10))
@settings(max_examples=60, deadline=None)
async def test_any_text_is_tokenized_or_refused(
    llama: LlamaEngine, text: str, add: bool, parse: bool, token_ids: list[int]
) -> None:
    for call in (
        llama.tokenize("", text, add_special=add, parse_special=parse),
        llama.detokenize("", token_ids, show_special=parse),
    ):
        assert await outcome(call) in {"answered", "INVALID_REQUEST"}


_BATCHES = """
import random, sys
from pathlib import Path
from chorus.core.errors import EngineError
from chorus.engine.llama.binding import Model
from chorus.engine.llama.context import Context, ContextParams

rng = random.Random(7)
model = Model(Path(sys.argv[1]))
context = Context(model, ContextParams(64, 32, 32, 3, 4, 1, 1))
done = 0
for _ in range(200):
    count = rng.choice([0, 1, 1, 2, 3, 5, 32, 33, -1])
    for place in range(32):
        slot = rng.choice([0, 0, 1, 2, 2, 2, 3, -1] if rng.random() < 0.05 else [0, 1, 2])
        last = context.last_position(slot) if 0 <= slot < 3 else 0
        context.sequence_ids[place] = slot
        context.positions[place] = rng.choice([last + 1, last + 1, last + 2, 0, 70]) + rng.choice([0, 0, place])
        context.token_ids[place] = rng.choice([5, 49151] if rng.random() < 0.98 else [49152, -1])
        context.wants_output[place] = rng.random() < 0.2
    try:
        done += context.decode(count) == 0
        rows = int(context.wants_output[:count].sum())
        context.logits(rows) if rows else None
        context.copy(rng.randrange(-1, 4), rng.randrange(-1, 4), rng.randrange(20))
    except EngineError:
        pass
    if rng.random() < 0.2:
        context.remove(rng.randrange(3))
context.close()
for call in (lambda: context.decode(1), lambda: context.remove(0), lambda: context.logits(1)):
    try:
        call()
    except EngineError:
        done += 1
model.close()
model.close()
print("survived", done)
"""


async def test_no_batch_aborts_the_process() -> None:
    from tests.engine.conftest import smollm2_path

    result = subprocess.run(  # noqa: ASYNC221 - nothing else runs meanwhile
        [sys.executable, "-c", _BATCHES, str(smollm2_path())], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    survived = int(result.stdout.split()[-1])
    assert survived > 15, "the batches must not all be refused"
