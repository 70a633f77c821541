"""A prompt is scored once and whole, whoever else reads it, and however often it is put back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from chorus.core.generation import DeliveredChoice, Priority, Progress, PromptScored, Sampling, TokenDelta
from chorus.engine.llama import ModelSource
from chorus.testing.engine_subject import Heard, check_order, hear
from tests.engine.acceptance import NEARLY_EQUAL, ask, serving, watching

pytestmark = pytest.mark.asyncio(loop_scope="session")


def scores(heard: Heard) -> list[float]:
    (scored,) = (event for event in heard.events if isinstance(event, PromptScored))
    return [token.logprob for token in scored.tokens]


def assert_same_scores(expected: Heard, found: Heard) -> None:
    assert len(scores(found)) == len(scores(expected))
    assert max(abs(a - b) for a, b in zip(scores(expected), scores(found), strict=True)) < 2 * NEARLY_EQUAL


@pytest.mark.parametrize("length", [2, 10, 40, 100, 150])
async def test_several_choices_get_all_scores(shallow: ModelSource, length: int) -> None:
    """Also where the one that scores has nothing else to do, or another was delivered already."""
    one = ask(range(300, 300 + length), 3, prompt_logprobs=0)
    several = replace(one, choice_count=3, sampling=Sampling(temperature=1.0, seed=4))
    whole, half = (5, 6, 7), (5,)
    async with serving(shallow, slots=4, context_length=256, kv_tokens=1024) as engine:
        expected = await hear(engine, one)
        assert len(scores(expected)) == length
        for resume in (
            (),
            (DeliveredChoice(0, whole),),
            (DeliveredChoice(0, half), DeliveredChoice(1, whole)),
            tuple(DeliveredChoice(choice, whole) for choice in range(3)),
        ):
            assert_same_scores(expected, await hear(engine, replace(several, resume=resume)))


async def test_a_prompt_that_is_put_back_is_scored_once(shallow: ModelSource) -> None:
    """Preempted while it is scored, and once more when it is decoding."""
    scored = ask(range(300, 500), 30, prompt_logprobs=0, priority=Priority.BACKGROUND)
    urgent = ask(range(600, 690), 20)
    loop, reached = asyncio.get_running_loop(), asyncio.Event()

    async def urgent_one() -> int:
        await reached.wait()
        return len((await hear(engine, urgent)).ids())

    with watching() as batches:
        async with serving(
            shallow, slots=2, context_length=256, kv_tokens=256, batch_tokens=64, prefill_tokens=64
        ) as engine:
            expected = await hear(engine, scored)
            await engine.forget_cache()
            seen = len(batches.made)

            def third_batch() -> None:
                if len(batches.made) == seen + 3:
                    loop.call_soon_threadsafe(reached.set)

            batches.made_one = third_batch
            urgents = [asyncio.create_task(urgent_one())]
            heard = Heard()
            async with aclosing(engine.generate(scored)) as events:
                async for event in events:
                    heard.events.append(event)
                    if isinstance(event, TokenDelta) and event.index == 3:
                        urgents.append(asyncio.create_task(urgent_one()))
            assert await asyncio.gather(*urgents) == [20, 20]
    check_order(heard, scored)
    assert_same_scores(expected, heard)
    assert len(heard.ids()) == 30


async def test_a_long_score_says_that_it_goes_on(shallow: ModelSource) -> None:
    """Scores take a step for every few tokens of a prompt; the contract wants no silence meanwhile."""
    async with serving(shallow, slots=2, context_length=512) as engine:
        heard = await hear(engine, ask(range(300, 700), 1, prompt_logprobs=0))
        done = [event.done for event in heard.events if isinstance(event, Progress)]
        assert len(done) > 3
        assert done == sorted(set(done))
