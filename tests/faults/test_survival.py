"""What the supervisor survives: a process that stands still, one that aborts, an engine that hangs inside llama.cpp.

There is one runner, so its streams wait until it is back, and go on there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chorus.client import AttemptChanged, MeshClient
from chorus.core.errors import ChorusError, EngineError, UnavailableError
from chorus.core.generation import Event, Finished, GenerationRequest, StopConditions, TextPrompt, TokenDelta
from chorus.core.identity import Role
from chorus.local.certificates import CLIENT_NAME
from chorus.local.connect import client_config
from chorus.testing.engine_faulty import ABORT, DIE, FAULT_FILE_ENV, HANG
from chorus.transport import open_channel
from chorus.transport.process import EXIT_BROKEN, load_identity
from tests.faults.up_process import DEADLINE_S, UpProcess, chorus

_LONG_TOKENS = 200
_LONG = GenerationRequest(
    model="", prompt=TextPrompt("go on"), stop=StopConditions(max_tokens=_LONG_TOKENS, ignore_eos=True)
)
_SHORT = GenerationRequest(model="", prompt=TextPrompt("go on"), stop=StopConditions(max_tokens=2, ignore_eos=True))
_PATIENT = {"CHORUS_COORDINATOR__RESUME_WAIT_S": "60"}  # a process may take long to start on a busy machine
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def answer(client: MeshClient, request: GenerationRequest) -> list[Event]:
    async with asyncio.timeout(DEADLINE_S), client.generate(request) as generation:
        return [event async for event in generation]


@asynccontextmanager
async def speaking(client: MeshClient) -> AsyncIterator[AsyncIterator[Event]]:
    """A stream that has said something already."""
    async with asyncio.timeout(DEADLINE_S), client.generate(_LONG) as generation:
        async for event in generation:
            if isinstance(event, TokenDelta):
                break
        yield aiter(generation)


async def goes_on(events: AsyncIterator[Event]) -> AttemptChanged:
    """Reads the rest of a stream that `speaking` began: whole, after one break, of which it returns what was told."""
    said, changes, last = [0], [], None
    async for event in events:
        if isinstance(event, TokenDelta):
            said += [event.index] * len(event.token_ids)
        elif isinstance(event, AttemptChanged):
            changes.append(event)
        last = event
    assert said == list(range(_LONG_TOKENS))
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == _LONG_TOKENS
    (change,) = changes
    return change


async def serves_again(up: UpProcess, client: MeshClient, name: str) -> None:
    """The process is back and its model answers, as soon as the coordinator knows."""
    await asyncio.to_thread(up.wait_for, "serving", name=name)
    await answers_at_last(client)


async def answers_at_last(client: MeshClient) -> None:
    """Asks again at all news of the directory until there is an answer."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(ChorusError):
                events = await answer(client, _SHORT)
                assert isinstance(events[-1], Finished)
                return
            await watch_once(client)


async def watch_once(client: MeshClient) -> None:
    """Waits for the next news of the directory."""
    first = True
    async for _ in client.watch_nodes():
        if not first:
            return
        first = False


# --- without a model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    with UpProcess(tmp_path_factory.mktemp("mesh"), "--runners", "1", "--silent-after", "3", **_PATIENT) as up:
        yield up.wait_ready()


async def test_a_process_that_stands_still_is_killed_and_started_again(mesh: UpProcess) -> None:
    async with mesh.client() as client:
        async with speaking(client) as events:
            ref = mesh.process_of("runner-1").process
            assert ref is not None
            os.kill(ref.pid, signal.SIGSTOP)
            ending = asyncio.create_task(goes_on(events))
            silent = await asyncio.to_thread(mesh.wait_for, "silent", name="runner-1")
            assert (silent["pid"], silent["silent_s"] >= 3.0) == (ref.pid, True)
            ended = await asyncio.to_thread(mesh.wait_for, "ended", name="runner-1")
            assert (ended["decision"], ended["failures"]) == ("start_again", 1)
            assert "answered nothing for" in ended["how"]
            assert (await ending).reason == UnavailableError.reason
        await serves_again(mesh, client, "runner-1")
    shown = json.loads(chorus("status", "--dir", str(mesh.home.root), "--json").stdout)
    process = next(process for process in shown["local"]["processes"] if process["name"] == "runner-1")
    assert (process["phase"], process["starts"]) == ("healthy", 2)
    assert "answered nothing for" in process["last_end"]
    assert "answered nothing for" in chorus("status", "--dir", str(mesh.home.root)).stdout


async def test_a_runner_that_aborts_in_mid_stream_is_back_and_goes_on(mesh: UpProcess) -> None:
    async with mesh.client() as client:
        async with speaking(client) as events:
            ref = mesh.process_of("runner-1").process
            assert ref is not None
            os.kill(ref.pid, signal.SIGABRT)
            assert (await goes_on(events)).reason == UnavailableError.reason
        ended = await asyncio.to_thread(mesh.wait_for, "ended", name="runner-1")
        assert (ended["how"], ended["decision"]) == ("was killed by SIGABRT", "start_again")
        await serves_again(mesh, client, "runner-1")


# --- with llama.cpp ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "fault"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, fault: Path) -> Iterator[UpProcess]:
    """A mesh whose one runner has a real model, in a context that takes no time to make."""
    runner = {
        "ENGINE": "faulty",
        "MODELS_DIR": str(tmp_path_factory.mktemp("models")),
        "CONTEXT_LENGTH": "512",
        "SLOTS": "2",
        "THREADS": "1",
        "STEP_TIMEOUT_S": "2",
        "DRAIN_GRACE_S": "5",
    }
    env = {f"CHORUS_RUNNER__{key}": value for key, value in runner.items()} | {FAULT_FILE_ENV: str(fault)} | _PATIENT
    with UpProcess(tmp_path_factory.mktemp("mesh"), "--runners", "1", **env) as up:
        yield up.wait_ready()


def happen(fault: Path, what: str) -> None:
    """Lets it happen in place of the next batch."""
    written = fault.with_suffix(".new")
    written.write_text(what)
    written.replace(fault)


@asynccontextmanager
async def health_of(up: UpProcess, name: str) -> AsyncIterator[AsyncIterator[int]]:
    """What a process says of its health, now and at each change."""
    config = client_config(up.home)
    plan = up.process_of(name)
    identity = load_identity(config.mesh, Role.CLIENT, CLIENT_NAME)
    address = plan.address.rpartition("@")[2]
    server = f"{name}.{plan.role}.{config.mesh.trust_domain}"
    async with asyncio.timeout(DEADLINE_S), open_channel(address, identity=identity, server=server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        try:
            yield (response.status async for response in watch)
        finally:
            watch.cancel()


async def test_an_engine_that_hangs_says_so_and_is_started_again(llama: UpProcess, fault: Path) -> None:
    async with llama.client() as client, health_of(llama, "runner-1") as health:
        assert await anext(health) == SERVING
        async with speaking(client) as events:
            happen(fault, HANG)
            assert (await goes_on(events)).reason == EngineError.reason
        assert await anext(health) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await anext(health)
        assert gone.value.code() is grpc.StatusCode.UNAVAILABLE
        ended = await asyncio.to_thread(llama.wait_for, "ended", name="runner-1")
        assert (ended["how"], ended["decision"]) == (f"exited with code {EXIT_BROKEN}", "start_again")
        assert any("hangs" in line for line in ended["log_lines"])
        await serves_again(llama, client, "runner-1")


async def test_an_engine_that_aborts_takes_its_process_and_is_started_again(llama: UpProcess, fault: Path) -> None:
    async with llama.client() as client:
        async with speaking(client) as events:
            happen(fault, ABORT)
            assert (await goes_on(events)).reason == UnavailableError.reason
        ended = await asyncio.to_thread(llama.wait_for, "ended", name="runner-1")
        assert ended["how"] == "was killed by SIGABRT"
        await serves_again(llama, client, "runner-1")


async def test_an_engine_thread_that_dies_is_replaced_without_its_process(llama: UpProcess, fault: Path) -> None:
    starts = llama.process_of("runner-1").starts
    async with llama.client() as client:
        async with speaking(client) as events:
            happen(fault, DIE)
            assert (await goes_on(events)).reason == EngineError.reason
        await answers_at_last(client)
    assert llama.process_of("runner-1").starts == starts
