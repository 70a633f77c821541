"""Running streams keep moving while a long prompt is read; and where memory is short, everybody finishes in turn."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest

from chorus.core.generation import (
    Event,
    Finished,
    GenerationRequest,
    Priority,
    Sampling,
    Started,
    TokenDelta,
)
from chorus.engine.llama import LlamaEngine, ModelSource
from chorus.testing.engine_subject import Heard, check_order, hear
from tests.engine.acceptance import ask, assert_close, assert_computed_rightly, serving, watching

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG, STREAMS, CHUNK = 4000, 8, 256


async def test_eight_streams_move_at_every_step_while_4000_tokens_are_read(shallow: ModelSource) -> None:
    rng = random.Random(1)
    long = [rng.randrange(100, 49_000) for _ in range(LONG)]
    with watching() as batches:
        async with serving(
            shallow,
            slots=STREAMS + 1,
            context_length=LONG + 100,
            kv_tokens=LONG + 100 + STREAMS * 1000,
            batch_tokens=512,
            prefill_tokens=CHUNK,
        ) as engine:
            streams = [engine.generate(ask([10 + number], 900)) for number in range(STREAMS)]
            try:
                for stream in streams:
                    async for event in stream:
                        if isinstance(event, TokenDelta):
                            break
                readers = [asyncio.create_task(read_on(stream)) for stream in streams]
                first = len(batches.made)
                async with aclosing(engine.generate(ask(long, 3))) as events:
                    async for event in events:
                        if isinstance(event, TokenDelta):
                            break
                made = batches.made[first:]
                for reader in readers:
                    assert not reader.done(), "the streams must outlast the prompt, or nothing was shown"
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
            finally:
                for stream in streams:
                    await stream.aclose()
    (reading,) = {
        sequence for batch in made for sequence, positions in batch.positions.items() if LONG - 1 in positions
    }
    chunks = [batch.positions[reading] for batch in made if reading in batch.positions]
    while_read = [
        batch.positions for batch in made if reading in batch.positions and batch.positions[reading][0] < LONG
    ]
    assert [position for chunk in chunks for position in chunk][:LONG] == list(range(LONG)), "read in order, once"
    reached: dict[int, int] = {}
    for positions in while_read:
        moving = {sequence: places for sequence, places in positions.items() if sequence != reading}
        assert len(moving) == STREAMS, "a running stream was left out of a step"
        for sequence, places in moving.items():
            assert places == list(range(places[0], places[0] + len(places)))
            assert places[0] > reached.get(sequence, -1), "a stream did not move"
            reached[sequence] = places[0]
        assert len(positions[reading]) <= CHUNK
    # and the prompt moves as well: no crumbs
    assert len(while_read) <= LONG / 16


async def read_on(stream: object) -> None:
    async for _ in stream:  # type: ignore[attr-defined]
        pass


# --- too little memory for everybody --------------------------------------------------------------------------------


def mixed(count: int, seed: int) -> list[GenerationRequest]:
    """Requests of every priority, greedy and drawn, that need far more together than there is."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt = [rng.randrange(100, 49_000) for _ in range(rng.choice((3, 30, 60)))]
        sampling = (
            Sampling(temperature=0.0)
            if number % 2
            else Sampling(temperature=0.8, seed=rng.getrandbits(60), repetition_penalty=1.2, penalty_window=16)
        )
        priority = tuple(Priority)[number % 3]
        found.append(ask(prompt, rng.choice((20, 40, 70)), sampling, logprobs=20, priority=priority))
    return found


async def timeline(
    engine: LlamaEngine,
    number: int,
    request: GenerationRequest,
    said: list[tuple[int, type[Event]]],
    started: asyncio.Event | None = None,
) -> Heard:
    """Reads a stream whole; `said` gets who started and finished when, in the order of the events."""
    heard = Heard()
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            heard.events.append(event)
            if isinstance(event, Started | Finished):
                said.append((number, type(event)))
                if started is not None:
                    started.set()
    check_order(heard, request)
    return heard


async def test_where_memory_is_short_everybody_finishes_as_if_alone(shallow: ModelSource) -> None:
    """Less urgent requests come first and are put back by those who come later."""
    requests = sorted(mixed(18, seed=3), key=lambda request: tuple(Priority).index(request.priority), reverse=True)
    said: list[tuple[int, type[Event]]] = []
    async with serving(
        shallow, slots=6, context_length=192, kv_tokens=240, max_queue=32, batch_tokens=128, prefill_tokens=64
    ) as engine:
        tasks: list[asyncio.Task[Heard]] = []
        for number, request in enumerate(requests):
            started = asyncio.Event()
            tasks.append(asyncio.create_task(timeline(engine, number, request, said, started)))
            if number in (0, 6, 12):  # the first of its priority
                await started.wait()
        together = await asyncio.gather(*tasks)
        for request, heard in zip(requests, together, strict=True):
            assert heard.finished.usage.completion_tokens == request.stop.max_tokens
            await assert_computed_rightly(engine, request, heard)
        for request, heard in zip(requests[::4], together[::4], strict=True):
            await engine.forget_cache()
            alone = await hear(engine, request)
            assert_close(alone.logprobs(), heard.logprobs(), greedy=request.sampling.temperature == 0.0)
        (load,) = engine.load_report()
        assert (load.slots_used, load.queued) == (0, 0)


async def test_streams_that_outgrow_the_memory_take_turns(shallow: ModelSource) -> None:
    """More begin than can end together: none fails, and those put back go on where they were."""
    requests = [
        ask([60 + number] * 3, 540, Sampling(temperature=0.8 * (number % 2), seed=number), logprobs=1)
        for number in range(3)
    ]
    said: list[tuple[int, type[Event]]] = []
    async with serving(
        shallow, slots=3, context_length=1024, kv_tokens=1560, batch_tokens=128, speculation=True
    ) as engine:
        together = await asyncio.gather(
            *(timeline(engine, number, request, said) for number, request in enumerate(requests))
        )
        started = [number for number, kind in said[: said.index(next(s for s in said if s[1] is Finished))]]
        assert sum(len(heard.ids()) + 3 for heard in together) > 1560
        assert len(started) * 543 > 1560, "all that began had room to end: nothing was shown"
        for request, heard in zip(requests, together, strict=True):
            assert len(heard.ids()) == 540
            await assert_computed_rightly(engine, request, heard)


async def test_urgent_requests_do_not_wait_for_the_others_to_end(shallow: ModelSource) -> None:
    """Background streams hold all memory; whoever is in a hurry starts before the first of them ends."""
    background = [ask([50 + number], 110, priority=Priority.BACKGROUND, logprobs=20) for number in range(4)]
    urgent = [ask([90 + number] * 40, 30, logprobs=20) for number in range(2)]
    async with serving(
        shallow, slots=6, context_length=128, kv_tokens=240, max_queue=32, batch_tokens=128, prefill_tokens=64
    ) as engine:
        said: list[tuple[int, type[Event]]] = []
        one_started = asyncio.Event()
        slow = [
            asyncio.create_task(timeline(engine, number, request, said, one_started))
            for number, request in enumerate(background)
        ]
        await one_started.wait()
        quick = [
            asyncio.create_task(timeline(engine, 100 + number, request, said)) for number, request in enumerate(urgent)
        ]
        together = await asyncio.gather(*slow, *quick)
        for request, heard in zip([*background, *urgent], together, strict=True):
            assert len(heard.ids()) == request.stop.max_tokens
            await assert_computed_rightly(engine, request, heard)
        starts = [said.index((100 + number, Started)) for number in range(len(urgent))]
        ends = [place for place, (number, kind) in enumerate(said) if number < 100 and kind is Finished]
        assert max(starts) < min(ends), "an urgent request waited for a background one to end"
        kinds = [said.index((100 + number, Finished)) for number in range(len(urgent))]
        assert max(kinds) < max(ends)
