"""The remote engine against the real llama-server, built from the sources of the pinned llama-cpp-python."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import llama_server
from chorus.config.remote import RemoteServer
from chorus.core.errors import PromptTooLongError, UnavailableError, UnsupportedFeatureError
from chorus.core.fleet.records import EngineKind, Feature, ModelState
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Conversation,
    FinishReason,
    GenerationRequest,
    Message,
    MessageRole,
    Prompt,
    Queued,
    StopConditions,
    TextPart,
    TextPrompt,
    TokenDelta,
)
from chorus.engine.remote import RemoteEngine, RemoteSettings
from chorus.testing.engine_conformance import CHECKS, Check, a_model_is_loaded_once_and_unloads, needed_by
from chorus.testing.engine_subject import GREEDY, Subject, ask, assert_idle, expect, hear
from tests.engine.conftest import smollm2_path

SLOTS = 2
TEXT = TextPrompt("Once upon a time")
CHAT = Conversation((Message(MessageRole.USER, (TextPart("Tell me a story"),)),))
# What it must be able to do, at the least: a feature that is lost takes its checks along silently.
DECLARED = {Feature.CHAT, Feature.SEED, Feature.IGNORE_EOS, Feature.GRAMMAR, Feature.JSON_SCHEMA, Feature.PENALTIES}
NEVER = {Feature.TOKEN_IDS, Feature.RESUME, Feature.LOGPROBS, Feature.TOKENIZE, Feature.CONTEXT_SHIFT, Feature.TOOLS}


@dataclass
class RealServer:
    """A llama-server that runs."""

    process: subprocess.Popen[bytes]
    port: int
    model: str

    def props(self) -> dict[str, object]:
        """What it says of itself."""
        return httpx.get(f"http://127.0.0.1:{self.port}/props", timeout=10).json()

    def busy_slots(self) -> int:
        """How many of its slots have something to do."""
        slots = httpx.get(f"http://127.0.0.1:{self.port}/slots", timeout=10).json()
        return sum(bool(slot["is_processing"]) for slot in slots)


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[RealServer]:
    """llama-server with SmolLM2, two slots of 256 tokens. It is built by tools/llama_server.py, as `make test` does."""
    program = llama_server.kept(llama_server.place_of()[0])
    assert program is not None, "there is no llama-server; .venv/bin/python tools/llama_server.py builds it"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = folder / "llama-server.log"
    argv = [program, "--model", smollm2_path(), "--host", "127.0.0.1", "--port", str(port), "--parallel", str(SLOTS)]
    argv += ["--ctx-size", str(SLOTS * 256), "--no-kv-unified", "--threads", "1", "--flash-attn", "on", "--no-ui"]
    argv += ["--cache-ram", "0", "--offline", "--slots"]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
        yield RealServer(process, port, smollm2_path().name)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with running_server(tmp_path_factory.mktemp("llama-server")) as running:
        yield running


@asynccontextmanager
async def engine_of(server: RealServer, **changes: object) -> AsyncIterator[RemoteEngine]:
    """An engine that was told of more slots than the server has."""
    address = RemoteServer.parse(f"openai=http://127.0.0.1:{server.port}")
    settings = {"slots": 8, "max_queue": 2, "answer_s": 10.0, **changes}
    engine = RemoteEngine(RemoteSettings(address, **settings))  # type: ignore[arg-type]
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.mark.parametrize("prompt", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, prompt: Prompt, server: RealServer) -> None:
    async with engine_of(server) as engine:
        (status,) = engine.models()
        assert status.features >= DECLARED
        assert not NEVER & status.features
        if needed_by(check) <= status.features and check is not a_model_is_loaded_once_and_unloads:
            name = status.artifact.name
            await check(Subject(engine, name, prompt, slots=SLOTS, max_queue=2, exact=False))


async def test_what_it_is_and_has_is_learned(server: RealServer) -> None:
    async with engine_of(server) as engine:
        assert engine.info.name == "llama-server"
        assert engine.info.version == server.props()["build_info"] != ""
        assert engine.info.kind is EngineKind.REMOTE
        (status,) = engine.models()
        assert status.state is ModelState.LOADED
        assert status.context_length == 256
        assert status.artifact.context_length == 8192
        assert status.artifact.parameter_count == pytest.approx(134_515_008)
        assert status.artifact.quantization == "Q4_1"
        assert status.artifact.size_bytes > 50_000_000


@pytest.mark.parametrize(("configured", "used"), [(8, SLOTS), (1, 1)])
async def test_no_more_is_asked_at_once_than_it_has_slots_for(server: RealServer, configured: int, used: int) -> None:
    """It tells how many it has; who wants fewer of them used says so."""
    async with engine_of(server, slots=configured, max_queue=8) as engine:
        (status,) = engine.models()
        assert status.slot_count == used
        subject = Subject(engine, status.artifact.name, TEXT, slots=used, max_queue=8, exact=False)
        streams = [engine.generate(ask(subject, 100)) for _ in range(SLOTS + 2)]
        for stream in streams[:used]:
            async for event in stream:
                if isinstance(event, TokenDelta):
                    break
        for stream in streams[used:]:
            assert isinstance(await anext(stream), Queued)
        assert await asyncio.to_thread(server.busy_slots) == used
        (load,) = engine.load_report()
        assert (load.slots_used, load.slots_total, load.queued) == (used, used, SLOTS + 2 - used)
        for stream in reversed(streams):
            await stream.aclose()
        await assert_idle(subject)


async def test_a_cancelled_stream_frees_its_slot_there(server: RealServer) -> None:
    async with engine_of(server) as engine:
        (status,) = engine.models()
        subject = Subject(engine, status.artifact.name, TEXT, slots=SLOTS, max_queue=2, exact=False)
        stream = engine.generate(ask(subject, 200))
        async for event in stream:
            if isinstance(event, TokenDelta):
                break
        assert await asyncio.to_thread(server.busy_slots) == 1
        await stream.aclose()
        async with asyncio.timeout(30):
            while await asyncio.to_thread(server.busy_slots):
                pass


async def test_what_it_counts_is_told(server: RealServer) -> None:
    async with engine_of(server) as engine:
        (status,) = engine.models()
        subject = Subject(engine, status.artifact.name, CHAT, slots=SLOTS, max_queue=2, exact=False)
        finished = (await hear(engine, ask(subject, 24))).finished
        assert finished.usage.completion_tokens == 24
        assert finished.usage.prompt_tokens > 10
        assert finished.choices[0].reason is FinishReason.LENGTH
        assert finished.timings.tokens_per_second > 0
        again = (await hear(engine, ask(subject, 4))).finished
        assert again.usage.cached_tokens > 0


async def test_a_schema_is_kept_to(server: RealServer) -> None:
    schema = '{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'
    async with engine_of(server) as engine:
        (status,) = engine.models()
        for prompt in (TEXT, CHAT):
            request = GenerationRequest(
                status.artifact.name,
                prompt,
                sampling=GREEDY,
                stop=StopConditions(max_tokens=64),
                constraint=Constraint(ConstraintKind.JSON_SCHEMA, schema),
            )
            answer = json.loads((await hear(engine, request)).text())
            assert isinstance(answer["age"], int)


async def test_what_it_cannot_do_is_refused(server: RealServer) -> None:
    async with engine_of(server) as engine:
        (status,) = engine.models()
        await expect(UnsupportedFeatureError, engine.unload(status.artifact.name))
        await expect(UnsupportedFeatureError, engine.tokenize("", "a", add_special=False, parse_special=False))
        subject = Subject(engine, status.artifact.name, TEXT, slots=SLOTS, max_queue=2, exact=False)
        long = await expect(PromptTooLongError, hear(engine, ask(subject, prompt=TextPrompt("word " * 600))))
        assert isinstance(long, PromptTooLongError)
        assert long.context_length == 256 < long.prompt_tokens


async def test_its_death_is_seen(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        async with engine_of(server) as engine:
            (status,) = engine.models()
            subject = Subject(engine, status.artifact.name, TEXT, slots=SLOTS, max_queue=2, exact=False)
            gone = asyncio.Event()
            engine.on_change(gone.set)
            stream = engine.generate(ask(subject, 200))
            async for event in stream:
                if isinstance(event, TokenDelta):
                    break
            server.process.kill()

            async def rest() -> None:
                async for _ in stream:
                    pass

            await expect(UnavailableError, rest())
            async with asyncio.timeout(30):
                while engine.models():
                    gone.clear()
                    await gone.wait()
