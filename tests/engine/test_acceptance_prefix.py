"""What was computed once is not computed again, counted at the batch; and the answers are the same."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from chorus.core.generation import (
    Conversation,
    Message,
    MessageRole,
    Priority,
    PromptScored,
    Sampling,
    TextPart,
    TokenDelta,
)
from chorus.engine.llama import ModelSource
from chorus.testing.engine_subject import GREEDY, Heard, hear
from chorus.testing.shallow_model import cut_layers
from tests.engine.acceptance import NEARLY_EQUAL, ask, assert_close, assert_computed_rightly, serving, watching
from tests.engine.conftest import gemma, smollm2

pytestmark = pytest.mark.asyncio(loop_scope="session")

PREFIX = 1000
SUFFIX = 6
REQUESTS = 64


def tokens_of(count: int, seed: int, vocabulary: int = 49_000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, vocabulary) for _ in range(count)]


@pytest.mark.parametrize("slots", [16, 64])
async def test_64_requests_that_arrive_together_read_their_common_prefix_once(slots: int, shallow: ModelSource) -> None:
    prefix = tokens_of(PREFIX, seed=1)
    suffixes = [tokens_of(SUFFIX, seed=2 + number) for number in range(REQUESTS)]
    bound = PREFIX + sum(map(len, suffixes))
    with watching(bound) as batches:
        async with serving(
            shallow, slots=slots, context_length=1100, kv_tokens=2200, max_queue=REQUESTS, batch_tokens=512
        ) as engine:
            heard = await asyncio.gather(*(hear(engine, ask([*prefix, *suffix], 1)) for suffix in suffixes))
    assert batches.tokens <= bound
    assert [one.finished.usage.prompt_tokens for one in heard] == [PREFIX + SUFFIX] * REQUESTS
    cached = sorted(one.started.cached_tokens for one in heard)
    assert cached == sorted(one.finished.usage.cached_tokens for one in heard)
    assert cached[0] == 0
    assert cached[1] >= PREFIX - 1
    assert batches.tokens == sum(PREFIX + SUFFIX - count for count in cached)


async def test_what_decodes_beside_a_shared_prefix_costs_its_own_tokens_alone(shallow: ModelSource) -> None:
    prefix = tokens_of(200, seed=3)
    requests = [ask([*prefix, *tokens_of(3, seed=number)], 4, logprobs=2) for number in range(12)]
    async with serving(shallow, slots=4, context_length=256, kv_tokens=512, max_queue=12) as engine:
        with watching() as batches:
            together = await asyncio.gather(*(hear(engine, request) for request in requests))
        assert batches.tokens <= 200 + sum(3 + 4 - 1 for _ in requests)
        for request, heard in zip(requests[::4], together[::4], strict=True):
            await engine.forget_cache()
            alone = await hear(engine, request)
            assert alone.started.cached_tokens == 0
            assert_close(alone.logprobs(), heard.logprobs())


async def test_samples_of_one_prompt_read_it_once(shallow: ModelSource) -> None:
    prompt = tokens_of(150, seed=4)
    drawn = ask(prompt, 5, Sampling(temperature=1.0, seed=8), choice_count=8)
    async with serving(shallow, slots=8, context_length=256, kv_tokens=512) as engine:
        with watching() as batches:
            heard = await hear(engine, drawn)
        # the first's logits serve the first draw of all, or each reads the prompt's last token for itself
        assert batches.tokens <= 150 + 8 * 5
        assert heard.finished.usage.prompt_tokens == 150
        assert len({tuple(heard.ids(choice)) for choice in range(8)}) > 1


async def test_a_request_that_comes_again_is_nearly_free(shallow: ModelSource) -> None:
    request = ask("The history of the world begins with " + "a word, " * 20, 12, logprobs=2)
    long = ask(tokens_of(300, seed=5), 6, logprobs=2)
    async with serving(shallow, slots=4, context_length=512, kv_tokens=1024) as engine:
        for one in (request, long):
            first = await hear(engine, one)
            with watching() as batches:
                again = await hear(engine, one)
            size, answer = first.started.prompt_tokens, len(first.ids())
            assert again.started.cached_tokens == again.finished.usage.cached_tokens == size - 1
            assert batches.tokens == 1 + answer - 1
            assert_close(first.logprobs(), again.logprobs())
        await engine.forget_cache()
        assert (await hear(engine, long)).started.cached_tokens == 0


async def test_the_next_turn_of_a_conversation_reads_what_is_new_alone(shallow: ModelSource) -> None:
    async with serving(shallow, slots=4, context_length=512, kv_tokens=1024) as engine:
        prompt, more = tokens_of(120, seed=6), tokens_of(20, seed=7)
        answer = (await hear(engine, ask(prompt, 16))).ids()
        turn = ask([*prompt, *answer, *more], 8, logprobs=2)
        with watching() as batches:
            next_turn = await hear(engine, turn)
        # the answer's last token was drawn and never computed
        assert next_turn.started.cached_tokens == 120 + 16 - 1
        assert batches.tokens == 1 + 20 + 8 - 1
        await engine.forget_cache()
        assert_close((await hear(engine, turn)).logprobs(), next_turn.logprobs())

        await engine.forget_cache()
        said = [Message(MessageRole.USER, (TextPart("Name three colours, please, in one line."),))]
        first = await hear(engine, ask(Conversation(tuple(said)), 24))
        said += [
            Message(MessageRole.ASSISTANT, (TextPart(first.text()),)),
            Message(MessageRole.USER, (TextPart("Now three animals."),)),
        ]
        second = await hear(engine, ask(Conversation(tuple(said)), 4))
        assert second.started.cached_tokens >= first.started.prompt_tokens - 1


async def test_a_running_stream_lends_its_prefix(shallow: ModelSource) -> None:
    prefix = tokens_of(180, seed=8)
    async with serving(shallow, slots=3, context_length=400, kv_tokens=1200) as engine:
        async with aclosing(engine.generate(ask([*prefix, 5], 200))) as running:
            async for event in running:
                if isinstance(event, TokenDelta) and event.index == 2:
                    break
            other = ask([*prefix, 6, 7], 6, logprobs=2)
            heard = await hear(engine, other)
            assert heard.started.cached_tokens >= 180 - 1
        await engine.forget_cache()
        assert_close((await hear(engine, other)).logprobs(), heard.logprobs())


async def test_shared_prefixes_give_the_same_answers_however_they_overlap(shallow: ModelSource) -> None:
    """Requests that end, begin and branch inside of each other's tokens, cancelled ones among them."""
    rng = random.Random(9)
    trunk = tokens_of(160, seed=10)
    requests = []
    for number in range(24):
        prompt = trunk[: rng.choice((1, 20, 64, 65, 130, 160))] + tokens_of(rng.choice((0, 1, 15)), seed=number % 5)
        sampling = GREEDY if number % 3 else Sampling(temperature=0.7, seed=number)
        priority = Priority.BACKGROUND if number % 4 == 0 else Priority.INTERACTIVE
        requests.append(ask(prompt, 8, sampling, logprobs=20, priority=priority))
    async with serving(shallow, slots=4, context_length=256, kv_tokens=512, max_queue=32, prefill_tokens=48) as engine:

        async def maybe_leave(number: int) -> Heard | None:
            if number % 5 != 4:
                return await hear(engine, requests[number])
            async with aclosing(engine.generate(requests[number])) as events:
                async for _ in events:
                    break
            return None

        for _ in range(2):  # the second time from what the first left
            heard = await asyncio.gather(*map(maybe_leave, range(len(requests))))
        for request, one in zip(requests, heard, strict=True):
            if one is not None:
                await assert_computed_rightly(engine, request, one)


async def test_a_cached_prompt_is_scored_all_the_same(shallow: ModelSource) -> None:
    request = ask(tokens_of(90, seed=11), 3, prompt_logprobs=1, logprobs=2)

    def scores(heard: Heard) -> list[float]:
        (scored,) = (event for event in heard.events if isinstance(event, PromptScored))
        return [token.logprob for token in scored.tokens]

    async with serving(shallow, slots=2, context_length=256) as engine:
        first = await hear(engine, request)
        again = await hear(engine, request)
        assert len(scores(again)) == 90
        assert max(abs(a - b) for a, b in zip(scores(first), scores(again), strict=True)) < NEARLY_EQUAL
        assert_close(first.logprobs(), again.logprobs())
        plain = await hear(engine, replace(request, prompt_logprobs=None))
        assert_close(first.logprobs(), plain.logprobs())


async def test_nothing_is_shared_between_models(tmp_path: Path, shallow: ModelSource) -> None:
    other = tmp_path / "another.gguf"
    other.symlink_to(shallow.path)
    request = ask(tokens_of(60, seed=12), 4)
    async with serving(shallow, smollm2(other), slots=2, context_length=256) as engine:
        first = await hear(engine, replace(request, model=shallow.artifact.name))
        second = await hear(engine, replace(request, model=other.name))
        assert second.started.artifact == other.name
        assert (first.started.cached_tokens, second.started.cached_tokens) == (0, 0)
        assert second.ids() == first.ids()
        await engine.unload(other.name)
        reloaded = await hear(engine, replace(request, model=other.name))
        assert reloaded.started.cached_tokens == 0


async def test_without_a_cache_nothing_is_kept(shallow: ModelSource) -> None:
    request = ask(tokens_of(60, seed=13), 4)
    with watching() as batches:
        async with serving(shallow, slots=2, context_length=256, prefix_cache=False) as engine:
            for _ in range(2):
                heard = await hear(engine, request)
                assert heard.started.cached_tokens == heard.finished.usage.cached_tokens == 0
                assert batches.sequences_left() == {}


async def test_a_cache_never_stands_in_the_way(shallow: ModelSource) -> None:
    """With all memory taken by what is kept, a request that needs all of it is served."""
    async with serving(shallow, slots=3, context_length=256, kv_tokens=256) as engine:
        for number in range(4):
            await hear(engine, ask(tokens_of(100, seed=20 + number), 4))
        heard = await hear(engine, ask(tokens_of(240, seed=30), 16))
        assert heard.finished.usage.completion_tokens == 16
        several = (hear(engine, ask(tokens_of(60, seed=40 + number), 20)) for number in range(3))
        assert [len(one.ids()) for one in await asyncio.gather(*several)] == [20] * 3


async def test_a_sliding_window_gives_the_same_answers_from_what_is_kept(gemma_path: Path, tmp_path: Path) -> None:
    """Whatever the engine shares of such a model, it shares rightly: past its window of 512 tokens, too."""
    path = tmp_path / "shallow-gemma.gguf"
    cut_layers(gemma_path, path, 6)  # the sixth is the first that sees everything
    # six layers of eighteen say what the pieces that a prompt is read in make of it: so much, whatever is kept
    close = partial(assert_close, nearly=2 * NEARLY_EQUAL)
    text = "The history of the railway begins with horses, wooden rails and short tracks from a mine to a river. " * 31
    async with serving(gemma(path), slots=3, context_length=800, kv_tokens=2400) as engine:
        _, prompt = await engine.tokenize("", text, add_special=True, parse_special=False)
        assert 600 < len(prompt) < 700
        first = await hear(engine, ask(prompt, 6, logprobs=20))
        again = await hear(engine, ask(prompt, 6, logprobs=20))
        close(first.logprobs(), again.logprobs())
        turn = ask([*prompt, *first.ids(), *prompt[40:52]], 6, logprobs=20)
        branch = ask([*prompt[:580], *prompt[30:40]], 6, logprobs=20)
        samples = ask(prompt, 4, Sampling(temperature=1.0, seed=3), choice_count=3, logprobs=20)
        remembered = await asyncio.gather(*(hear(engine, one) for one in (turn, branch)))
        drawn = await hear(engine, samples)
        for request, heard in zip((turn, branch), remembered, strict=True):
            await engine.forget_cache()
            close((await hear(engine, request)).logprobs(), heard.logprobs())
        await engine.forget_cache()
        single = await hear(engine, replace(samples, choice_count=1))
        close(single.logprobs(), of_choice(drawn, 0), greedy=False)


def of_choice(heard: Heard, choice: int) -> list:
    return [logprob for delta in heard.deltas if delta.choice == choice for logprob in delta.logprobs]
