"""Models that take turns at computing: what is a step to the watchdog and what is not, and a turn that never ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chorus.core.batching.speculation import Source, Speculation
from chorus.core.errors import EngineError
from chorus.core.fleet.records import ModelState
from chorus.core.generation import EmbeddingRequest, FinishReason, GenerationRequest, StopConditions, TextPrompt
from chorus.core.resilience.stuck import Step
from chorus.engine.llama import LlamaEngine, ModelSource, ResidencySettings
from chorus.engine.llama.context import Context
from chorus.engine.llama.turns import Turns
from chorus.testing.engine_subject import hear
from tests.engine.conftest import SETTINGS

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG_S = 60.0


def ask(model: str = "", tokens: int = 24) -> GenerationRequest:
    stop = StopConditions(max_tokens=tokens, ignore_eos=True)
    return GenerationRequest(model, TextPrompt("Once upon a time"), stop=stop)


def named(source: ModelSource, folder: Path, name: str) -> ModelSource:
    """The same file as a model of another name."""
    path = folder / f"{name}.gguf"
    path.symlink_to(source.path)
    return replace(source, path=path, artifact=replace(source.artifact, name=path.name, family=name))


@asynccontextmanager
async def one_at_a_time(*sources: ModelSource) -> AsyncIterator[LlamaEngine]:
    """An engine with these models in memory, one of which computes at a time."""
    engine = LlamaEngine(sources, replace(SETTINGS, residency=ResidencySettings(max_decoding=1)))
    await engine.start()
    try:
        for status in engine.models():
            await engine.load(status.artifact.family)
        yield engine
    finally:
        await engine.stop()


def own_step(engine: LlamaEngine) -> Step | None:
    """The step that the calling thread says it is in, as the watchdog would read it."""
    for host in engine._hosts.values():
        if host._loaded is not None and host._loaded.worker._thread is threading.current_thread():
            return host._loaded.worker.pulse.step
    raise AssertionError("no owner thread")


async def test_waiting_for_a_turn_is_no_step_and_all_that_is_computed_in_it_is(
    shallow: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a draft model and texts to embed, one step of the engine takes three turns."""
    waited: list[Step | None] = []
    computed: list[tuple[str, Step | None]] = []
    draft = named(shallow, tmp_path, "draft")
    async with one_at_a_time(replace(shallow, draft=draft)) as engine:
        take, decode, logits, create = Turns._take, Context.decode, Context.logits, Context._create

        def taken(turns: Turns, *arguments: Any) -> None:
            waited.append(own_step(engine))
            take(turns, *arguments)

        def decoded(context: Context, count: int) -> int:
            computed.append(("decode", own_step(engine)))
            return decode(context, count)

        def got(context: Context, rows: int) -> Any:
            computed.append(("logits" if engine._turns._inside else "logits after the turn", own_step(engine)))
            return logits(context, rows)

        def created(context: Context, *arguments: Any) -> Any:
            computed.append(("create", own_step(engine)))
            return create(context, *arguments)

        def count(_: Speculation, source: Source, **__: object) -> int:
            return 3 if source is Source.DRAFT_MODEL else 0

        monkeypatch.setattr(Turns, "_take", taken)
        monkeypatch.setattr(Context, "decode", decoded)
        monkeypatch.setattr(Context, "logits", got)
        monkeypatch.setattr(Context, "_create", created)
        monkeypatch.setattr(Speculation, "count", count)

        async def embed() -> None:
            for text in ("one", "two", "three"):
                await engine.embed(EmbeddingRequest("", (text,)))

        await asyncio.gather(hear(engine, ask()), embed())
    assert len(waited) > 20
    assert waited == [None] * len(waited)
    assert {what for what, _ in computed} == {"decode", "logits", "create"}
    assert [what for what, step in computed if step is None] == []


async def test_who_hangs_in_its_turn_is_found_and_nobody_waits_for_it_any_more(
    shallow: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    hangs, waits, end = asyncio.Event(), asyncio.Event(), threading.Event()
    async with one_at_a_time(named(shallow, tmp_path, "hung"), named(shallow, tmp_path, "sound")) as engine:
        take, decode = Turns._take, Context.decode
        hung, sound = (engine._hosts[f"{name}.gguf"] for name in ("hung", "sound"))
        hung_thread, sound_thread = hung.loaded.worker._thread, sound.loaded.worker._thread

        def taken(turns: Turns, *arguments: Any) -> None:
            if threading.current_thread() is sound_thread:
                loop.call_soon_threadsafe(waits.set)
            take(turns, *arguments)

        def decoded(context: Context, count: int) -> int:
            if threading.current_thread() is hung_thread:
                loop.call_soon_threadsafe(hangs.set)
                end.wait()
            return decode(context, count)

        with monkeypatch.context() as patched:
            patched.setattr(Turns, "_take", taken)
            patched.setattr(Context, "decode", decoded)
            async with asyncio.timeout(LONG_S):
                try:
                    lost = asyncio.create_task(hear(engine, ask("hung")))
                    await hangs.wait()
                    answer = asyncio.create_task(hear(engine, ask("sound")))
                    await waits.wait()
                    survival, began = engine._survival, time.monotonic()
                    assert survival is not None
                    for second in range(700):  # longer than any first step may take
                        survival.look(began + second)
                    with pytest.raises(EngineError, match=r"hung\.gguf hangs"):
                        await lost
                    assert "hung.gguf hangs" in (await engine.wait_broken()).message
                    assert (hung.state, sound.state) == (ModelState.FAILED, ModelState.LOADED)
                    assert (await answer).finished.choices[0].reason is FinishReason.LENGTH
                finally:
                    end.set()
            hung_thread.join(LONG_S)


async def test_who_dies_in_its_turn_gives_it_on(
    shallow: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one_at_a_time(named(shallow, tmp_path, "frail"), named(shallow, tmp_path, "sound")) as engine:
        decode = Context.decode
        thread = engine._hosts["frail.gguf"].loaded.worker._thread

        def decoded(context: Context, count: int) -> int:
            if threading.current_thread() is thread:
                raise MemoryError
            return decode(context, count)

        with monkeypatch.context() as patched:
            patched.setattr(Context, "decode", decoded)
            with pytest.raises(EngineError, match="MemoryError"):
                await hear(engine, ask("frail"))
            async with asyncio.timeout(LONG_S):
                assert (await hear(engine, ask("sound"))).finished.choices[0].reason is FinishReason.LENGTH
