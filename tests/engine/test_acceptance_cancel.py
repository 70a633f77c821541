"""2,000 streams started and cancelled at random points leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass

import psutil
import pytest

from chorus.core.fleet.records import ModelLoad
from chorus.core.generation import (
    Event,
    FinishReason,
    GenerationRequest,
    Priority,
    Progress,
    Queued,
    Sampling,
    Started,
    StopConditions,
    TokenDelta,
)
from chorus.engine.llama import LlamaEngine, ModelSource
from chorus.testing.engine_subject import hear
from tests.engine.acceptance import ask, serving, watching

pytestmark = pytest.mark.asyncio(loop_scope="session")

STREAMS, WARM_UP, AT_A_TIME = 2000, 500, 16
CONTEXT = 96
GROWTH_BYTES = 24 * 2**20  # what allocators and caches of Python may still take after the warm-up


@dataclass(frozen=True)
class Life:
    """A request and where its reader leaves it: at the first event of a kind, after some tokens, or never."""

    request: GenerationRequest
    leaves_at: type[Event] | None
    after: int  # so many tokens
    turns: int | None  # of the event loop, after which the reading task is cancelled; None: it closes the stream


def lives(seed: int) -> list[Life]:
    """What 2,000 readers do. A few prompts begin alike, so that what is shared is cancelled, too."""
    rng = random.Random(seed)
    common = [rng.randrange(3, 49_000) for _ in range(24)]
    out = []
    for _ in range(STREAMS):
        long = rng.random() < 0.1
        prompt = common[: rng.choice((0, 0, 3, 24))] + [rng.randrange(3, 49_000) for _ in range(40 if long else 4)]
        leaves_at = rng.choice((None, None, Queued, Queued, Progress, Started, TokenDelta, TokenDelta, TokenDelta))
        request = ask(
            prompt[: CONTEXT - 20],
            rng.randrange(1, 3) if leaves_at is None else 18,
            Sampling(temperature=rng.choice((0.0, 0.9)), seed=rng.getrandbits(64)),
            choice_count=3 if rng.random() < 0.05 else 1,
            priority=rng.choice(tuple(Priority)),
            prompt_logprobs=0 if rng.random() < 0.03 else None,
        )
        turns = rng.choice((0, 1, 4, 20, 100, 400)) if rng.random() < 0.4 else None
        out.append(Life(request, leaves_at, rng.randrange(1, 4), turns))
    return out


async def live(engine: LlamaEngine, life: Life, left_at: Counter[str]) -> None:
    """Starts one stream and leaves it; counts the last event that its reader had."""
    last = "nothing"

    async def read() -> None:
        nonlocal last
        met = 0
        async with aclosing(engine.generate(life.request)) as events:
            if life.leaves_at is Started and life.after == 3:
                return  # closed unread
            async for event in events:
                last = type(event).__name__
                met += isinstance(event, life.leaves_at) if life.leaves_at else 0
                if met >= (life.after if life.leaves_at is TokenDelta else 1):
                    return

    reader = asyncio.create_task(read())
    if life.turns is not None:
        for _ in range(life.turns):
            await asyncio.sleep(0)
        reader.cancel()
    (outcome,) = await asyncio.gather(reader, return_exceptions=True)
    left_at[last] += 1
    if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome


async def until_idle(engine: LlamaEngine) -> ModelLoad:
    """Waits for the owner thread to have heard of every cancellation: a request of its own goes through after them."""
    await hear(engine, ask([5], 1))
    (load,) = engine.load_report()
    return load


async def test_2000_streams_cancelled_anywhere_leave_nothing(shallow: ModelSource) -> None:
    process = psutil.Process()
    threads_before = set(threading.enumerate())
    everybody = lives(seed=20_26)
    left_at: Counter[str] = Counter()
    with watching() as batches:
        async with serving(
            shallow, slots=6, context_length=CONTEXT, kv_tokens=3 * CONTEXT, max_queue=64, prefill_tokens=16
        ) as engine:
            full = ask([7] * (CONTEXT - 4), 99, stop=StopConditions(ignore_eos=True))
            mixed = iter(everybody)

            async def several(count: int) -> None:
                for _ in range(count):
                    await live(engine, next(mixed), left_at)

            await asyncio.gather(*(several(WARM_UP // AT_A_TIME) for _ in range(AT_A_TIME)))
            await until_idle(engine)
            gc.collect()
            resident, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()

            rest = STREAMS - WARM_UP // AT_A_TIME * AT_A_TIME
            counts = [rest // AT_A_TIME + (number < rest % AT_A_TIME) for number in range(AT_A_TIME)]
            await asyncio.gather(*map(several, counts))
            assert next(mixed, None) is None

            load = await until_idle(engine)
            assert (load.slots_used, load.queued) == (0, 0)
            heard = await hear(engine, full)  # needs as much as one request can: what is kept must make room
            assert heard.finished.choices[0].reason is FinishReason.CONTEXT_FULL
            assert heard.finished.usage.completion_tokens == 4
            await engine.forget_cache()
            load = await until_idle(engine)
            await engine.forget_cache()
            assert batches.sequences_left() == {}
            (load,) = engine.load_report()
            assert load.kv_used_tokens == 0
            gc.collect()
            assert process.memory_info().rss - resident < GROWTH_BYTES
            assert process.num_fds() == files
            assert process.num_threads() == threads
    assert not [thread for thread in set(threading.enumerate()) - threads_before if thread.name.startswith("llama")]
    assert left_at.total() == STREAMS
    kinds = ("nothing", "Queued", "Progress", "Started", "TokenDelta", "Finished")
    assert min(left_at[kind] for kind in kinds) >= 10, f"some points were hardly tried: {left_at}"
