"""The fake engine's own: exact tokens, paces, and failures where a test wants them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from chorus.core.errors import DrainingError, EngineError, ModelFileError, UnavailableError, UnsupportedFeatureError
from chorus.core.fleet.records import Feature, ModelState
from chorus.core.generation import (
    DeliveredChoice,
    FinishReason,
    GenerationRequest,
    Progress,
    Started,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.testing import fake_vocabulary as vocabulary
from chorus.testing.engine_fake import FAKE_FEATURES, FakeEngine, FakeModel
from chorus.testing.engine_subject import Heard, hear
from chorus.testing.pace import ManualPace


def ask(prompt: str = "hi", tokens: int = 5, **changes: object) -> GenerationRequest:
    request = GenerationRequest("", TextPrompt(prompt), stop=StopConditions(max_tokens=tokens))
    return replace(request, **changes)  # type: ignore[arg-type]


async def read_into(heard: Heard, engine: FakeEngine, request: GenerationRequest) -> None:
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            heard.events.append(event)


async def test_tokens_say_where_they_stand() -> None:
    engine = FakeEngine()
    await engine.start()
    heard = await hear(engine, ask(choice_count=2))
    for choice in (0, 1):
        tag = vocabulary.answer_tag(b"hi", choice)
        assert [vocabulary.position_of(token_id) for token_id in heard.ids(choice)] == [(tag, i) for i in range(5)]
        assert heard.text(choice) == "".join(vocabulary.position_text(tag, index) for index in range(5))
    long = await hear(engine, ask(tokens=999))
    assert (len(long.ids()), long.ids()[-1]) == (65, vocabulary.END)
    assert long.finished.choices[0].reason is FinishReason.END


async def test_an_echo_is_the_text_byte_by_byte() -> None:
    engine = FakeEngine()
    await engine.start()
    heard = await hear(engine, ask("ignored\necho:a🙂ส", 99))
    assert heard.text() == "a🙂ส"
    assert heard.ids() == [*"a🙂ส".encode(), vocabulary.END]
    assert [delta.text for delta in heard.deltas] == ["a", "", "", "", "🙂", "", "", "ส", ""]
    stopped = await hear(engine, ask("echo:one two three", stop=StopConditions(strings=("o t",))))
    assert stopped.text() == "one tw"


@pytest.mark.parametrize("before", [None, 0, 3])
async def test_it_fails_where_it_is_told(before: int | None) -> None:
    engine = FakeEngine()
    await engine.start()
    engine.fail_next(before=before, error=UnavailableError("gone"), times=2)
    for _ in range(2):
        heard = Heard()
        with pytest.raises(UnavailableError, match="gone"):
            await read_into(heard, engine, ask())
        assert len(heard.events) == (0 if before is None else 1 + before)
    engine.fail_next(before=before)
    with pytest.raises(EngineError):
        await hear(engine, ask())
    assert (await hear(engine, ask())).ids()
    assert engine.load_report()[0].slots_used == 0


@pytest.mark.parametrize("before", [None, 2])
async def test_it_hangs_until_it_is_cancelled(before: int | None) -> None:
    engine = FakeEngine(slots=1)
    await engine.start()
    engine.hang_next(before=before)
    heard = Heard()
    hanging = asyncio.create_task(read_into(heard, engine, ask()))
    other = asyncio.create_task(hear(engine, ask()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(heard.deltas) == (before or 0)
    assert not other.done()
    hanging.cancel()
    assert (await other).finished


async def test_tokens_come_when_the_test_releases_them() -> None:
    pace = ManualPace()
    engine = FakeEngine(pace=pace)
    await engine.start()
    one, two = Heard(), Heard()
    first = asyncio.create_task(read_into(one, engine, ask()))
    await pace.waiting(1)
    second = asyncio.create_task(read_into(two, engine, ask()))
    await pace.waiting(2)
    pace.release(1)
    await pace.waiting(2)
    assert (len(one.deltas), len(two.deltas)) == (1, 0)
    pace.release(2)
    await pace.waiting(2)
    assert (len(one.deltas), len(two.deltas)) == (2, 1)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    pace.release_all()
    await first
    assert len(one.deltas) == 5


async def test_a_rate_makes_each_token_wait_for_its_time() -> None:
    engine = FakeEngine(tokens_per_second=0.001)
    await engine.start()
    stream = engine.generate(ask())
    assert isinstance(await anext(stream), Started)
    waiting = asyncio.create_task(anext(stream))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert engine.load_report()[0].slots_used == 0
    engine = FakeEngine(tokens_per_second=1e6)
    await engine.start()
    assert (await hear(engine, ask())).ids()


async def test_loading_takes_its_time_and_may_fail() -> None:
    broken = FakeModel(load_error=ModelFileError("no GGUF"), loaded=False)
    engine = FakeEngine([broken], load_delay_s=0.004)
    await engine.start()
    told: list[Progress] = []
    with pytest.raises(ModelFileError):
        await engine.load("", told.append)
    assert [progress.done * 4 // progress.total for progress in told] == [1, 2, 3, 4]
    assert (engine.models()[0].state, engine.models()[0].error) == (ModelState.FAILED, "no GGUF")
    with pytest.raises(ModelFileError):
        await hear(engine, ask())


async def test_without_token_ids_it_resumes_from_text_if_that_is_allowed() -> None:
    model = FakeModel(features=FAKE_FEATURES - {Feature.TOKEN_IDS, Feature.RESUME})
    engine = FakeEngine([model])
    await engine.start()
    whole = Heard()
    await read_into(whole, engine, ask())
    assert not whole.ids()
    text = "".join(delta.text for delta in whole.deltas[:2])
    delivered = (DeliveredChoice(0, (), text),)
    rest = Heard()
    await read_into(rest, engine, ask(resume=delivered, allow_text_resume=True))
    assert rest.deltas == whole.deltas[2:]
    with pytest.raises(UnsupportedFeatureError):
        await hear(engine, ask(resume=delivered))


async def test_stopping_ends_what_runs_and_refuses_what_comes() -> None:
    engine = FakeEngine(pace=ManualPace())
    await engine.start()
    stream = engine.generate(ask())
    reading = asyncio.create_task(anext(stream))
    await reading
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(DrainingError):
        await waiting
    with pytest.raises(DrainingError):
        await hear(engine, ask())
    await stream.aclose()
    assert isinstance(reading.result(), object)
    assert not isinstance(reading.result(), TokenDelta)
