"""A model's owner has it unloaded: who is served to the end, who is refused, and what comes after."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from chorus.core.errors import DrainingError, EngineError
from chorus.core.fleet.records import ModelState
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    EmbeddingRequest,
    GenerationRequest,
    StopConditions,
    TextPrompt,
)
from chorus.engine.llama import LlamaEngine, binding
from chorus.engine.llama.constraint import FormCompiler
from chorus.engine.llama.context import Context
from chorus.engine.llama.reading import TextReader
from chorus.engine.llama.settings import Tuned
from chorus.engine.llama.survival import Survival
from chorus.testing.engine_subject import hear
from tests.engine.conftest import SETTINGS, smollm2

LONG_S = 10.0


def ask(tokens: int = 4, **changes: Any) -> GenerationRequest:
    request = GenerationRequest(
        "", TextPrompt("Once upon a time"), stop=StopConditions(max_tokens=tokens, ignore_eos=True)
    )
    return replace(request, **changes)


def ask_for_letters(text: str = "Once upon a time") -> GenerationRequest:
    form = Constraint(ConstraintKind.REGEX, "[a-z ]*")
    return ask(prompt=TextPrompt(text), constraint=form, stop=StopConditions(max_tokens=4))


class HeldUp:
    """A call that tells when it has begun, and goes on once `go` is set."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.begun = asyncio.Event()
        self.go = threading.Event()
        loop, call = asyncio.get_running_loop(), getattr(owner, name)

        def held_up(*arguments: Any, **named: Any) -> Any:
            loop.call_soon_threadsafe(self.begun.set)
            assert self.go.wait(LONG_S)
            return call(*arguments, **named)

        patch.setattr(owner, name, held_up)


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[LlamaEngine]:
    engine = LlamaEngine([smollm2()], replace(SETTINGS, **changes))
    await engine.start()
    try:
        async with asyncio.timeout(LONG_S):
            await engine.load("")
            yield engine
    finally:
        await engine.stop()


def state(engine: LlamaEngine) -> ModelState:
    return engine.models()[0].state


async def test_a_request_that_is_being_prepared_is_served_before_the_model_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was let in before, but had not reached the owner thread, and was refused after all."""
    async with running() as engine:
        compiling = HeldUp(monkeypatch, FormCompiler, "matchers")
        answer = asyncio.create_task(hear(engine, ask_for_letters()))
        await compiling.begun.wait()
        unloading = asyncio.create_task(engine.unload("", wait=True))
        await asyncio.sleep(0)  # it has begun
        with pytest.raises(DrainingError):
            await hear(engine, ask())
        compiling.go.set()
        assert (await answer).finished
        assert (await unloading).state is ModelState.AVAILABLE


async def test_texts_that_are_being_read_are_embedded_before_the_model_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as engine:
        reading = HeldUp(monkeypatch, TextReader, "texts")
        vectors = asyncio.create_task(engine.embed(EmbeddingRequest("", ("hello",))))
        await reading.begun.wait()
        unloading = asyncio.create_task(engine.unload("", wait=True))
        await asyncio.sleep(0)  # it has begun
        reading.go.set()
        assert len((await vectors)[1]) == 1
        assert (await unloading).state is ModelState.AVAILABLE


async def test_what_was_prepared_for_one_load_is_not_used_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had been measured for a larger context, and its adapter had been freed."""
    async with running() as engine:
        compiling = HeldUp(monkeypatch, FormCompiler, "matchers")
        answer = asyncio.create_task(hear(engine, ask_for_letters("word " * 100)))
        await compiling.begun.wait()
        await engine.unload("")
        await engine.load("", context_length=16)
        compiling.go.set()
        with pytest.raises(DrainingError):
            await answer
        assert (await hear(engine, ask())).finished


async def test_reading_texts_for_a_model_that_goes_meanwhile_is_told_as_draining(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was told as a failure of the engine, which counts against the runner."""
    async with running() as engine:
        reading = HeldUp(monkeypatch, TextReader, "texts")
        vectors = asyncio.create_task(engine.embed(EmbeddingRequest("", ("hello",))))
        await reading.begun.wait()
        await engine.unload("")
        reading.go.set()
        with pytest.raises(DrainingError):
            await vectors


async def test_an_unload_that_is_given_up_does_not_open_the_door_of_another() -> None:
    async with running() as engine:
        stream = engine.generate(ask(200))
        await anext(stream)
        first, second = (asyncio.create_task(engine.unload("", wait=True)) for _ in range(2))
        await asyncio.sleep(0)  # both have begun
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(DrainingError):
            await hear(engine, ask())
        await stream.aclose()
        assert (await second).state is ModelState.AVAILABLE
        assert (await hear(engine, ask())).finished


async def test_who_waits_to_unload_is_done_once_somebody_did_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """He waited on for those who used what had been loaded since."""
    async with running() as engine:
        compiling = HeldUp(monkeypatch, FormCompiler, "matchers")
        held = asyncio.create_task(hear(engine, ask_for_letters()))
        await compiling.begun.wait()
        patient = asyncio.create_task(engine.unload("", wait=True))
        await asyncio.sleep(0)  # it has begun
        await engine.unload("")
        await patient
        assert state(engine) is ModelState.AVAILABLE
        compiling.go.set()
        with pytest.raises(DrainingError):
            await held


async def test_a_model_that_dies_while_it_waits_to_be_unloaded_stays_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as engine:
        stream = engine.generate(ask(200))
        await anext(stream)
        unloading = asyncio.create_task(engine.unload("", wait=True))
        await asyncio.sleep(0)  # it has begun
        monkeypatch.setattr(Context, "decode", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            async for _ in stream:
                pass
        assert (await unloading).state is ModelState.AVAILABLE, "else it would be loaded again"


async def test_a_model_that_was_offered_anew_is_not_revived_beside_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that had died was loaded out of sight, and the other one taken to be in memory."""
    revived = asyncio.Event()
    revive = Survival._revive

    async def noted(*arguments: Any) -> None:
        await revive(*arguments)
        revived.set()

    monkeypatch.setattr(Survival, "_revive", noted)
    async with running() as engine:
        with monkeypatch.context() as patched:
            patched.setattr(Context, "decode", lambda *_: 1 / 0)
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await hear(engine, ask())
        await engine.offer([replace(smollm2(), tuned=Tuned(batch_tokens=64))])
        await revived.wait()
        assert (await hear(engine, ask())).finished


async def test_weights_are_freed_before_more_are_loaded_though_an_unload_was_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread that had died was forgotten with whoever waited for its end."""
    async with running() as engine:
        freed: list[bool] = []
        open_, freeing = binding.Model.__init__, HeldUp(monkeypatch, binding.Model, "close")

        def opened(*arguments: Any, **named: Any) -> None:
            freed.append(freeing.go.is_set())
            open_(*arguments, **named)

        monkeypatch.setattr(binding.Model, "__init__", opened)
        with monkeypatch.context() as patched:
            patched.setattr(Context, "decode", lambda *_: 1 / 0)
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await hear(engine, ask())
        await freeing.begun.wait()
        unloading = asyncio.create_task(engine.unload(""))
        await asyncio.sleep(0)  # it waits for the thread
        unloading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unloading
        loading = asyncio.create_task(engine.load(""))
        await until(lambda: state(engine) is ModelState.LOADING, engine)
        await asyncio.get_running_loop().run_in_executor(engine._loader, lambda: None)  # what was asked before is done
        freeing.go.set()
        await loading
        assert freed == [True]


async def until(is_so: Callable[[], bool], engine: LlamaEngine) -> None:
    changed = asyncio.Event()
    engine.on_change(changed.set)
    while not is_so():
        await changed.wait()
        changed.clear()


async def test_a_context_that_was_chosen_goes_with_the_load() -> None:
    """What is placed by is what the next load will have, for who chooses none."""
    async with running() as engine:
        usual = engine.models()[0].context_length
        await engine.unload("", wait=True)
        await engine.load("", context_length=64)
        assert engine.models()[0].context_length == 64
        await engine.unload("", wait=True)
        assert engine.models()[0].context_length == usual
