"""What becomes of a model whose thread hangs or dies, and what a batch that llama.cpp refuses costs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from chorus.core.batching.scheduler import Scheduler
from chorus.core.errors import ChorusError, DrainingError, EngineError, ModelFileError
from chorus.core.fleet.records import ModelState
from chorus.core.generation import (
    Event,
    Finished,
    GenerationRequest,
    Priority,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.core.resilience.restarts import RestartPolicy
from chorus.core.resilience.stuck import Patience
from chorus.engine.llama import LlamaEngine, binding
from chorus.engine.llama.codes import batch_failed
from chorus.engine.llama.commands import Cancel, Embed, ForgetCache, Submit
from chorus.engine.llama.context import Context
from chorus.engine.llama.job import Job
from chorus.engine.llama.pulse import Pulse
from chorus.engine.llama.survival import RELOADS, Survival
from tests.engine.conftest import SETTINGS, smollm2, smollm2_path

LONG_S = 120.0
AT_ONCE = RestartPolicy(first_backoff_s=0.0, failures_allowed=RELOADS + 1)


class Patient:
    """A model as it is watched, with a thread that does what the test says."""

    def __init__(self, name: str, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.name = name
        self.pulse: Pulse | None = Pulse(clock)
        self.is_failed = False
        self.abandoned: ChorusError | None = None
        self.revivals = 0
        self.trouble: ChorusError | None = None
        self.revived = asyncio.Event()

    def abandon(self, error: ChorusError) -> None:
        self.pulse, self.abandoned = None, error

    def die(self, survival: Survival, lived_s: float = 0.0) -> None:
        self.pulse, self.is_failed = None, True
        survival.died(self, lived_s)

    async def revive(self) -> None:
        self.revivals += 1
        self.revived.set()
        if self.trouble is not None:
            raise self.trouble
        self.pulse, self.is_failed = Pulse(), False


# --- a thread that hangs ----------------------------------------------------------------------------------------------


async def test_a_step_without_an_end_gives_its_model_up_and_breaks_the_engine() -> None:
    now = 0.0
    hung, sound = Patient("hung", lambda: now), Patient("sound", lambda: now)
    survival = Survival(lambda: [hung, sound], Patience(floor_s=10, factor=2))
    assert hung.pulse is not None
    hung.pulse.begin(1)
    now = 0.5
    hung.pulse.begin(1)  # the step before has shown what one takes
    for _ in range(11):
        survival.look(now)
        assert hung.abandoned is None
        now += 1.0
    survival.look(now)
    assert isinstance(hung.abandoned, EngineError)
    assert "hung hangs" in hung.abandoned.message
    assert await survival.broken is hung.abandoned
    assert sound.abandoned is None


async def test_steps_that_end_are_never_held_to_hang() -> None:
    now = 0.0
    busy = Patient("busy", lambda: now)
    survival = Survival(lambda: [busy], Patience(floor_s=3, factor=1))
    for _ in range(100):
        assert busy.pulse is not None
        busy.pulse.begin(4)
        survival.look(now)
        now += 2.0
        survival.look(now)
        busy.pulse.end()
    assert busy.abandoned is None


# --- a thread that dies -----------------------------------------------------------------------------------------------


async def test_a_model_whose_thread_died_is_loaded_again_until_it_is_given_up() -> None:
    patient = Patient("frail")
    survival = Survival(lambda: [patient], Patience(), policy=AT_ONCE)
    for revivals in range(1, RELOADS + 1):
        patient.revived.clear()
        patient.die(survival)
        await patient.revived.wait()
        assert (patient.revivals, survival.broken.done()) == (revivals, False)
        await asyncio.sleep(0)
    patient.die(survival)
    assert "died 4 times" in (await survival.broken).message
    assert patient.revivals == RELOADS


async def test_one_that_lived_long_has_all_its_tries_again() -> None:
    patient = Patient("tough")
    survival = Survival(lambda: [patient], Patience(), policy=AT_ONCE)
    for _ in range(10):
        patient.revived.clear()
        patient.die(survival, lived_s=3600.0)
        await patient.revived.wait()
        await asyncio.sleep(0)
    assert not survival.broken.done()


async def test_a_load_that_fails_is_a_try_too() -> None:
    patient = Patient("gone")
    patient.trouble = ModelFileError("the file is gone")
    survival = Survival(lambda: [patient], Patience(), policy=AT_ONCE)
    patient.die(survival)
    await survival.broken
    assert patient.revivals == RELOADS


async def test_while_others_are_served_their_process_stays() -> None:
    patient, other = Patient("frail"), Patient("other")
    patient.trouble = ModelFileError("the file is gone")
    survival = Survival(lambda: [patient, other], Patience(), policy=AT_ONCE)
    patient.die(survival)
    while patient.revivals < RELOADS:
        patient.revived.clear()
        await patient.revived.wait()
    await asyncio.sleep(0)
    assert not survival.broken.done()


async def test_stopping_revives_nobody() -> None:
    patient = Patient("frail")
    survival = Survival(
        lambda: [patient], Patience(), policy=RestartPolicy(first_backoff_s=3600, longest_backoff_s=3600)
    )
    survival.start()
    patient.die(survival)
    await survival.stop()
    assert patient.revivals == 0


# --- with llama.cpp ---------------------------------------------------------------------------------------------------


def ask(tokens: int = 8) -> GenerationRequest:
    return GenerationRequest(
        model="", prompt=TextPrompt("Once upon a time"), stop=StopConditions(max_tokens=tokens, ignore_eos=True)
    )


async def hear(engine: LlamaEngine, request: GenerationRequest) -> list[Event]:
    async with asyncio.timeout(LONG_S):
        return [event async for event in engine.generate(request)]


def last_positions(engine: LlamaEngine) -> list[int]:
    """What llama.cpp has of each sequence id: -1 for nothing. The engine must be idle."""
    (host,) = engine._hosts.values()
    context = host.loaded.worker._context
    assert context is not None
    return [context.last_position(slot) for slot in range(SETTINGS.slots + SETTINGS.kept_sequences)]


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("code", [1, 2, -1, -2, -3])
async def test_whatever_llama_cpp_answers_costs_the_sequences_of_that_batch_alone(
    llama: LlamaEngine, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    decode = Context.decode
    answers = iter([0, 0, code])
    with monkeypatch.context() as patched:
        patched.setattr(Context, "decode", lambda self, count: next(answers, 0) or decode(self, count))
        with pytest.raises(EngineError) as caught:
            await hear(llama, ask())
    assert caught.value.reason == "ENGINE_FAILED"
    assert caught.value.metadata["llama_code"] == str(code)
    assert caught.value.message == batch_failed(code, 1).message
    assert isinstance((await hear(llama, ask()))[-1], Finished)
    await llama.forget_cache()
    assert set(last_positions(llama)) == {-1}
    (load,) = llama.load_report()
    assert (load.slots_used, load.kv_used_tokens) == (0, 0)


@pytest.mark.parametrize("code", [1, 2, -1, -2, -3, -99])
def test_every_code_is_explained(code: int) -> None:
    error = batch_failed(code, 7)
    assert f"(code {code})" in error.message
    assert "7 tokens" in error.message


async def test_an_owner_thread_that_dies_is_replaced_without_anybody_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LlamaEngine([smollm2()], SETTINGS)
    await engine.start()
    loaded = asyncio.Event()
    engine.on_change(lambda: loaded.set() if engine.models()[0].state is ModelState.LOADED else loaded.clear())
    await engine.load("")
    with monkeypatch.context() as patched:
        patched.setattr(Context, "decode", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await hear(engine, ask())
        assert engine.models()[0].state is ModelState.FAILED
    await loaded.wait()
    assert any(isinstance(event, TokenDelta) for event in await hear(engine, ask()))
    await engine.stop()


class Endings:
    """Holds each owner thread up where it has told everybody, and is about to free the weights, until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = asyncio.Event()
        self.go = threading.Event()
        loop, close = asyncio.get_running_loop(), binding.Model.close

        def held_up(model: binding.Model) -> None:
            loop.call_soon_threadsafe(self.reached.set)
            assert self.go.wait(LONG_S)
            close(model)

        monkeypatch.setattr(binding.Model, "close", held_up)


def request_of(model: binding.Model) -> Job:
    return Job(
        ask(), model=model, artifact=smollm2().artifact, prompt=[1, 2, 3], seed=1, context_length=64,
        end_tokens=frozenset(), arrived=0.0, load_s=0.0,
    )  # fmt: skip


async def test_whatever_is_sent_to_a_thread_that_ends_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came once the thread had emptied its queue was never read, and its sender waited for ever."""
    engine = LlamaEngine([smollm2()], SETTINGS)
    await engine.start()
    await engine.load("")
    (host,) = engine._hosts.values()
    worker, model = host.loaded.worker, host.loaded.model
    endings = Endings(monkeypatch)
    unloading = asyncio.create_task(engine.unload(""))
    await endings.reached.wait()
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(LONG_S):
            for ended in (False, True):
                if ended:
                    endings.go.set()
                    await unloading
                job = request_of(model)
                vectors: asyncio.Future[list[tuple[float, ...]]] = loop.create_future()
                forgotten: asyncio.Future[None] = loop.create_future()
                worker.send(Submit(job))
                worker.send(Cancel(job))
                worker.send(Embed([[1, 2]], False, Priority.INTERACTIVE, vectors))
                worker.send(ForgetCache(forgotten))
                endings.go.set()
                with pytest.raises(DrainingError):
                    await job.stream.next()
                with pytest.raises(DrainingError):
                    await vectors
                await forgotten
    finally:
        endings.go.set()
        await engine.stop()


async def test_a_thread_that_dies_of_its_scheduler_answers_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """To answer a request it asked the scheduler to let go of it, which may be what has failed."""
    engine = LlamaEngine([smollm2()], SETTINGS)
    await engine.start()
    await engine.load("")
    with monkeypatch.context() as patched:
        patched.setattr(Scheduler, "plan", lambda *_: 1 / 0)
        patched.setattr(Scheduler, "leave", lambda *_, **__: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await hear(engine, ask())
    await engine.stop()


@pytest.mark.parametrize("what", ["submit", "forget_cache"])
async def test_the_command_that_a_thread_dies_of_is_answered(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in no queue any more, and among no requests yet."""
    engine = LlamaEngine([smollm2()], SETTINGS)
    await engine.start()
    await engine.load("")
    with monkeypatch.context() as patched:
        patched.setattr(Scheduler, what, lambda *_: 1 / 0)
        async with asyncio.timeout(10.0):
            if what == "submit":
                with pytest.raises(EngineError, match="ZeroDivisionError"):
                    await hear(engine, ask())
            else:
                await engine.forget_cache()
    await engine.stop()


# Loads with fewer megabytes of address space than the context needs, which is an allocation that fails for certain.
_SHORT_OF_MEMORY = """
import asyncio, logging, resource, sys
import structlog
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
from chorus.core.errors import OutOfMemoryError
from chorus.engine.llama import LlamaEngine, LlamaSettings
from tests.engine.conftest import smollm2
import psutil

async def main(kv_tokens, batch_tokens):
    settings = LlamaSettings(
        slots=1, context_length=512, threads=1, kv_tokens=kv_tokens, batch_tokens=batch_tokens,
        micro_batch_tokens=batch_tokens,
    )
    engine = LlamaEngine([smollm2()], settings)
    await engine.start()
    limit = psutil.Process().memory_info().vms + (700 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        await engine.load("")
    except OutOfMemoryError as error:
        print(error.message)
        print(sorted(error.metadata))
        return 0
    finally:
        await engine.stop()
    return 1

sys.exit(asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space can be limited on Linux alone")
@pytest.mark.parametrize(("kv_tokens", "batch_tokens"), [(200_000, 64), (16_384, 8192)], ids=["kv", "compute"])
def test_memory_that_llama_cpp_cannot_have_is_told_in_numbers(kv_tokens: int, batch_tokens: int) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _SHORT_OF_MEMORY, str(kv_tokens), str(batch_tokens)],
        cwd=root,
        env={"PYTHONPATH": f"{root / 'services'}:{root}", "PATH": "/usr/bin:/bin", "HOME": str(root)},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    message, metadata = done.stdout.splitlines()
    assert smollm2_path().name in message
    assert message.count("MiB") >= 1
    assert metadata == "['available_bytes', 'required_bytes']"
