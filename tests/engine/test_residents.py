"""Several models in one engine, with real weights: who makes room, who waits, and what is given back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from chorus.core.errors import DrainingError, InvalidRequestError, ModelFileError, OutOfMemoryError
from chorus.core.fleet.records import ModelState
from chorus.core.generation import (
    Event,
    Finished,
    GenerationRequest,
    Phase,
    Progress,
    Queued,
    Sampling,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.core.residency.devices import HOST, Device, Machine
from chorus.engine.llama import LlamaEngine, LlamaSettings, ModelSource, ResidencySettings
from chorus.engine.llama.host import Host
from chorus.engine.llama.settings import Tuned
from chorus.engine.llama.sizing import wish_of
from chorus.models import inspect, shape_of
from chorus.testing.engine_subject import hear
from tests.engine.conftest import SETTINGS as SMALL
from tests.engine.conftest import smollm2, smollm2_path

pytestmark = pytest.mark.asyncio(loop_scope="session")
MIB = 1 << 20
# Answers are compared, so nothing that is computed in other batches the second time.
SETTINGS = replace(SMALL, prefix_cache=False, speculation=False)
MODEL_BYTES = wish_of(
    smollm2(shape=shape_of(inspect(smollm2_path()))), SETTINGS, SETTINGS.context_length
).footprint.total_bytes


def ask(model: str, tokens: int = 4) -> GenerationRequest:
    return GenerationRequest(
        model,
        TextPrompt("Once upon a time"),
        sampling=Sampling(temperature=0.0),
        stop=StopConditions(max_tokens=tokens, ignore_eos=True),
    )


@pytest.fixture
def copies(tmp_path: Path) -> Callable[[str], ModelSource]:
    """Models of one letter each that are all SmolLM2."""

    def copy(name: str) -> ModelSource:
        path = tmp_path / f"{name}.gguf"
        path.symlink_to(smollm2_path())
        source = smollm2(path, shape=shape_of(inspect(smollm2_path())))
        return replace(source, artifact=replace(source.artifact, family=name))

    return copy


class Loads:
    """Counts loads by model, and holds each up until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.begun = asyncio.Event()
        loop, load = asyncio.get_running_loop(), Host._open

        def counted(host: Host, *arguments: object) -> object:
            self.names.append(host.artifact.family)
            loop.call_soon_threadsafe(self.begun.set)
            self.go.wait()
            return load(host, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Host, "_open", counted)


@pytest_asyncio.fixture(loop_scope="session")
async def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


@asynccontextmanager
async def engine_of(
    sources: list[ModelSource],
    *,
    room: float = 1.5,
    clock: Callable[[], float] | None = None,
    settings: LlamaSettings = SETTINGS,
    **residency: object,
) -> AsyncIterator[LlamaEngine]:
    """An engine whose models may take `room` times what one of them takes."""
    limit = int(room * MODEL_BYTES)
    engine = LlamaEngine(
        sources,
        replace(settings, residency=ResidencySettings(**residency)),  # type: ignore[arg-type]
        machine=lambda: Machine(Device(HOST, free_bytes=1 << 40, limit_bytes=limit)),
        **({} if clock is None else {"clock": clock}),
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def state(engine: LlamaEngine, name: str) -> ModelState:
    return next(status.state for status in engine.models() if status.artifact.family == name)


async def read(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


async def until(stream: AsyncIterator[Event], kind: type[Event]) -> Event:
    async for event in stream:
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__} came")


async def test_a_request_evicts_what_nobody_uses(copies: Callable[[str], ModelSource]) -> None:
    async with engine_of([copies(name) for name in "abc"], room=2.5) as engine:
        await engine.load("a")
        await engine.load("b")
        await hear(engine, ask("a"))
        events = (await hear(engine, ask("c"))).events
        assert any(isinstance(event, Progress) and event.phase is Phase.LOADING for event in events)
        assert [state(engine, name) for name in "abc"] == [
            ModelState.LOADED,
            ModelState.AVAILABLE,
            ModelState.LOADED,
        ]


async def test_models_asked_for_in_turn_share_their_loads(copies: Callable[[str], ModelSource], loads: Loads) -> None:
    async with engine_of([copies(name) for name in "ab"]) as engine:
        loads.go.clear()
        answers = [asyncio.create_task(hear(engine, ask(name))) for name in "abababab"]
        await loads.begun.wait()
        loads.go.set()
        texts = {(await answer).text() for answer in answers}
        assert len(texts) == 1
        assert loads.names == ["a", "b"]


async def test_two_clients_that_alternate_cost_fewer_loads_than_answers(
    copies: Callable[[str], ModelSource], loads: Loads
) -> None:
    async with engine_of([copies(name) for name in "ab"]) as engine:

        async def client(name: str) -> None:
            for _ in range(12):
                await hear(engine, ask(name, 1))

        await asyncio.gather(client("a"), client("b"))
        assert len(loads.names) <= 12


async def test_who_waits_hears_so_and_a_stream_in_the_way_ends_in_peace(
    copies: Callable[[str], ModelSource], loads: Loads
) -> None:
    async with engine_of([copies(name) for name in "ab"]) as engine:
        alone = (await hear(engine, ask("a", 40))).ids()
        first, second = engine.generate(ask("a", 40)), engine.generate(ask("b"))
        head = await until(first, TokenDelta)
        assert isinstance(head, TokenDelta)
        assert await anext(second) == Queued(0)
        rest = await read(first)
        ids = [*head.token_ids, *(t for event in rest if isinstance(event, TokenDelta) for t in event.token_ids)]
        assert ids == alone
        events = await read(second)
        assert isinstance(events[-1], Finished)
        assert any(isinstance(event, Progress) and event.phase is Phase.LOADING for event in events)
        assert loads.names == ["a", "b"]


async def test_a_stream_goes_on_while_another_model_loads(copies: Callable[[str], ModelSource], loads: Loads) -> None:
    async with engine_of([copies(name) for name in "ab"], room=2.5) as engine:
        stream = engine.generate(ask("a", 60))
        await until(stream, TokenDelta)
        loads.go.clear()
        loads.begun.clear()
        loading = asyncio.create_task(engine.load("b"))
        await loads.begun.wait()
        for _ in range(20):
            await until(stream, TokenDelta)
        assert state(engine, "b") is ModelState.LOADING
        loads.go.set()
        assert (await loading).state is ModelState.LOADED
        assert isinstance((await read(stream))[-1], Finished)


async def test_a_pinned_model_stays_and_the_error_names_it(copies: Callable[[str], ModelSource]) -> None:
    async with engine_of([copies(name) for name in "ab"], pinned=frozenset({"a"})) as engine:
        await engine.load("a")
        with pytest.raises(OutOfMemoryError, match=r"a\.gguf \(\d+ MiB\).*unpin a model") as caught:
            await hear(engine, ask("b"))
        assert int(caught.value.metadata["required_bytes"]) == MODEL_BYTES
        assert (state(engine, "a"), state(engine, "b")) == (ModelState.LOADED, ModelState.FAILED)
        await engine.unload("a")
        assert (await hear(engine, ask("b"))).ids(), "its owner may unload a pinned one, and then there is room"


async def test_an_idle_model_is_unloaded_after_its_time(copies: Callable[[str], ModelSource]) -> None:
    now = [1000.0]
    gone = asyncio.Event()
    async with engine_of([copies("a")], clock=lambda: now[0], keep_alive_s=600.0) as engine:
        await hear(engine, ask("a"))
        now[0] += 599
        await hear(engine, ask("a"))
        now[0] += 599
        engine._residents.look()
        assert (await engine.load("a")).state is ModelState.LOADED, "it was used since"
        engine.on_change(lambda: gone.set() if state(engine, "a") is ModelState.AVAILABLE else None)
        now[0] += 600
        engine._residents.look()
        await gone.wait()


async def test_unloading_ends_the_wait_of_those_who_came_for_it(copies: Callable[[str], ModelSource]) -> None:
    async with engine_of([copies(name) for name in "ab"]) as engine:
        busy = engine.generate(ask("a", 200))
        await until(busy, TokenDelta)
        waiting = engine.generate(ask("b"))
        assert await anext(waiting) == Queued(0)
        await engine.unload("b")
        with pytest.raises(DrainingError):
            await anext(waiting)
        await until(busy, TokenDelta)
        await busy.aclose()
        assert (await hear(engine, ask("b"))).ids()


async def test_an_unload_whose_caller_goes_ends_without_him(copies: Callable[[str], ModelSource]) -> None:
    async with engine_of([copies("a"), copies("b")], room=9.0) as engine:
        await engine.load("a")
        unload = asyncio.create_task(engine.unload("a"))
        await asyncio.sleep(0)  # it has begun, and its owner thread hasn't ended
        unload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unload
        async with asyncio.timeout(30):
            await engine.load("b")  # nothing is loaded while something is on its way out
            await engine.load("a")
        assert state(engine, "a") is state(engine, "b") is ModelState.LOADED


async def test_who_stops_waiting_costs_nobody_a_load(copies: Callable[[str], ModelSource], loads: Loads) -> None:
    async with engine_of([copies(name) for name in "ab"]) as engine:
        busy = engine.generate(ask("a", 30))
        await until(busy, TokenDelta)
        waiting = engine.generate(ask("b"))
        assert await anext(waiting) == Queued(0)
        await waiting.aclose()
        await read(busy)
        assert (await hear(engine, ask("a"))).ids()
        assert loads.names == ["a"]


async def test_stopping_ends_the_wait_too(copies: Callable[[str], ModelSource]) -> None:
    async with engine_of([copies(name) for name in "ab"]) as engine:
        busy = engine.generate(ask("a", 200))
        await until(busy, TokenDelta)
        waiting = engine.generate(ask("b"))
        assert await anext(waiting) == Queued(0)
        await engine.stop()
        for stream in (waiting, busy):
            with pytest.raises(DrainingError):
                await read(stream)


async def test_a_file_that_cannot_be_loaded_makes_no_room(copies: Callable[[str], ModelSource], tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(smollm2_path().read_bytes()[: 40 * MIB])
    async with engine_of([copies("a"), smollm2(tmp_path / "cut.gguf")], room=2.5) as engine:
        await engine.load("a")
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            await engine.load("cut.gguf")
        assert (await hear(engine, ask("a"))).ids()


async def test_memory_is_given_back(copies: Callable[[str], ModelSource]) -> None:
    process = psutil.Process()
    large = replace(SETTINGS, context_length=2048)
    async with engine_of([copies(name) for name in "ab"], room=4, settings=large) as engine:
        before = process.memory_info().rss
        for name in "ab":
            await hear(engine, ask(name, 16))
        loaded = process.memory_info().rss
        assert loaded - before > 100 * MIB
        for name in "ab":
            await engine.unload(name)
        assert process.memory_info().rss - before < 64 * MIB


async def test_models_take_turns_where_only_one_may_compute(
    copies: Callable[[str], ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    from chorus.engine.llama.context import Context

    inside, most, decode = [0], [0], Context.decode

    def counted(context: Context, count: int) -> int:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            return decode(context, count)
        finally:
            inside[0] -= 1

    async with engine_of([copies(name) for name in "ab"], room=2.5, max_decoding=1) as engine:
        monkeypatch.setattr(Context, "decode", counted)
        both = await asyncio.gather(*(hear(engine, ask(name, 30)) for name in "ab"))
        assert both[0].ids() == both[1].ids()
        assert most == [1]


async def test_a_model_is_loaded_with_the_context_its_memory_was_planned_for(
    copies: Callable[[str], ModelSource],
) -> None:
    """It was planned for who came first, and loaded as another one who waited with him had asked."""
    async with engine_of([copies("a")]) as engine:
        answer = asyncio.create_task(hear(engine, ask("a")))
        too_much = asyncio.create_task(engine.load("a", context_length=8192))
        with pytest.raises(OutOfMemoryError, match=r"a\.gguf needs about"):
            await too_much
        assert (await answer).started.context_length == SETTINGS.context_length
        assert state(engine, "a") is ModelState.LOADED


async def test_a_context_that_does_not_fit_leaves_the_model_to_others(copies: Callable[[str], ModelSource]) -> None:
    async with engine_of([copies("a")]) as engine:
        with pytest.raises(OutOfMemoryError):
            await engine.load("a", context_length=8192)
        assert state(engine, "a") is ModelState.AVAILABLE, "nobody is placed on a model that has failed"


async def test_of_two_contexts_the_first_is_loaded_and_who_asked_for_the_other_is_told(
    copies: Callable[[str], ModelSource], loads: Loads
) -> None:
    async with engine_of([copies("a")]) as engine:
        loads.go.clear()
        first = asyncio.create_task(engine.load("a", context_length=64))
        other = asyncio.create_task(engine.load("a", context_length=128))
        anyhow = asyncio.create_task(hear(engine, ask("a")))
        with pytest.raises(InvalidRequestError, match="about to be loaded with 64"):
            await other
        await loads.begun.wait()
        with pytest.raises(InvalidRequestError, match="being loaded with 64"):
            await engine.load("a", context_length=128)
        same = asyncio.create_task(engine.load("a", context_length=64))
        loads.go.set()
        assert [(await load).context_length for load in (first, same)] == [64, 64]
        assert (await anyhow).started.context_length == 64
        assert loads.names == ["a"]


async def test_a_context_is_forgotten_with_who_asked_for_it(
    copies: Callable[[str], ModelSource],
) -> None:
    async with engine_of([copies(name) for name in "ab"]) as engine:
        busy = engine.generate(ask("a", 30))
        await until(busy, TokenDelta)
        waiting = asyncio.create_task(hear(engine, ask("b")))
        chosen = asyncio.create_task(engine.load("b", context_length=64))
        await asyncio.sleep(0)  # both have asked
        chosen.cancel()
        await read(busy)
        assert (await waiting).started.context_length == SETTINGS.context_length


async def test_what_was_tuned_since_counts_for_the_next_load(copies: Callable[[str], ModelSource]) -> None:
    """Memory was planned for what was tuned, and the model loaded as before."""
    source = copies("a")
    async with engine_of([source]) as engine:
        await engine.load("a")
        await engine.offer([replace(source, tuned=Tuned(batch_tokens=64))])
        assert engine._hosts["a.gguf"].loaded.worker._params.batch_tokens == SETTINGS.batch_tokens
        await engine.unload("a")
        await engine.load("a")
        assert engine._hosts["a.gguf"].loaded.worker._params.batch_tokens == 64
