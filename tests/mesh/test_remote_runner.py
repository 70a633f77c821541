"""A runner whose engine is a server behind HTTP: in the mesh, private prompts, and the process without llama.cpp."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chorus.cli.status import _rows
from chorus.client import AttemptChanged, MeshClient
from chorus.config import RunnerSettings
from chorus.config.remote import RemoteKind, RemoteServer
from chorus.core.errors import ChorusError, ConfigError, UnavailableError
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.events import DeltaEvent
from chorus.core.fleet.records import EngineKind, ModelState, Runner, RunnerState
from chorus.core.generation import (
    Finished,
    FinishReason,
    GenerationRequest,
    Requirements,
    StopConditions,
    TextPrompt,
    TokenDelta,
)
from chorus.core.identity import Role
from chorus.engine.remote import RemoteEngine, RemoteSettings
from chorus.registry.service import RegistryService
from chorus.runner.engines import configured_engine
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from tests.engine.upstream import Upstream, UpstreamModel
from tests.mesh.child import child, configured
from tests.mesh.conftest import TRUST_DOMAIN
from tests.mesh.local_mesh import LocalMesh

RUNNER_WITHOUT_LLAMA = """
import json, sys
sys.modules["llama_cpp"] = None
from chorus.telemetry.corelog import prepare_core
prepare_core()
from chorus.config import ChorusConfig
from chorus.runner.main import run
sys.exit(run(ChorusConfig.model_validate(json.loads(sys.argv[1]))))
"""


class Elsewhere(RemoteServer):
    """A server on loopback that counts as one on another machine of the household."""

    @property
    def is_loopback(self) -> bool:
        return False


class Outside(Elsewhere):
    """One that counts as a paid API."""

    @property
    def is_household(self) -> bool:
        return False


def engine_at(upstream: Upstream, server: type[RemoteServer] = RemoteServer) -> RemoteEngine:
    kind = RemoteKind.OLLAMA if upstream.make == "ollama" else RemoteKind.OPENAI
    return RemoteEngine(RemoteSettings(server(kind, upstream.url), slots=2, max_queue=2, poll_s=0.05))


def ask(**requirements: Any) -> GenerationRequest:
    return GenerationRequest("", TextPrompt("Once upon a time"), requirements=Requirements(**requirements))


def models_of(directory: Directory) -> tuple[ModelState, ...]:
    entry = directory.get("runner-1")
    return () if entry is None else tuple(status.state for status in entry.record.runner.models)


async def die_in_the_middle(client: MeshClient, upstream: Upstream) -> None:
    async with client.generate(ask()) as events:
        async for event in events:
            if isinstance(event, TokenDelta):
                await upstream.die()


@pytest.mark.parametrize("make", ["ollama", "vllm"])
async def test_it_answers_leaves_the_directory_and_comes_back(certificates: MeshCertificates, make: str) -> None:
    async with Upstream(make) as upstream:
        engine = engine_at(upstream)
        async with InProcessMesh(runners=[engine], certificates=certificates) as mesh:
            client = mesh.client()
            answer = await client.complete(ask())
            assert len(answer.text.split()) == 64
            assert answer.usage.completion_tokens == 64
            assert answer.usage.prompt_tokens == 5
            upstream.pause_after = 2
            with pytest.raises(UnavailableError):
                await die_in_the_middle(client, upstream)
            await mesh.until(lambda directory: not models_of(directory))
            with pytest.raises(ChorusError):
                await client.complete(ask())
            upstream.pause_after = None
            await upstream.live()
            await mesh.until(lambda directory: models_of(directory) == (ModelState.LOADED,))
            assert (await client.complete(ask())).text


async def test_a_caller_who_goes_hangs_up_at_the_server(certificates: MeshCertificates) -> None:
    async with Upstream("ollama") as upstream:
        upstream.pause_after = 2
        async with InProcessMesh(runners=[engine_at(upstream)], certificates=certificates) as mesh:
            async with mesh.client().generate(ask()) as events:
                async for event in events:
                    if isinstance(event, TokenDelta):
                        break
            await upstream.hung_up.wait()


@pytest.mark.parametrize("make", ["ollama", "vllm"])
@pytest.mark.parametrize("before", [4, 10])
async def test_an_answer_that_goes_on_from_text_is_as_long_as_asked_for(
    certificates: MeshCertificates, make: str, before: int
) -> None:
    async with Upstream(make) as upstream:
        upstream.cut_after = before
        async with InProcessMesh(runners=[engine_at(upstream)], certificates=certificates) as mesh:
            request = replace(ask(), allow_text_resume=True, stop=StopConditions(max_tokens=10))
            events = [event async for event in mesh.client().generate(request)]
    deltas = [event for event in events if isinstance(event, TokenDelta)]
    assert [delta.index for delta in deltas] == list(range(10))
    assert len("".join(delta.text for delta in deltas).split()) == 10
    assert [event.from_text for event in events if isinstance(event, AttemptChanged)] == [True]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert [(outcome.reason, outcome.token_count) for outcome in finished.choices] == [(FinishReason.LENGTH, 10)]
    assert finished.usage.completion_tokens == 10


async def test_a_client_tells_the_next_coordinator_how_many_tokens_it_has(certificates: MeshCertificates) -> None:
    async with Upstream("vllm") as upstream:
        upstream.pause_after = 3
        mesh = InProcessMesh(runners=[engine_at(upstream)], certificates=certificates, coordinators=2)
        request = replace(ask(), allow_text_resume=True, stop=StopConditions(max_tokens=10))
        async with mesh, mesh.client().generate(request) as generation:
            events = []
            async for event in generation:
                events.append(event)
                if sum(isinstance(event, TokenDelta) for event in events) == 3 and upstream.pause_after:
                    upstream.pause_after = None
                    (lost,) = (n for n, service in enumerate(mesh.coordinators) if service._admission.running)
                    await mesh.kill_coordinator(lost)
        assert upstream.asked("/v1/completions")[-1]["max_tokens"] == 7
    deltas = [event for event in events if isinstance(event, TokenDelta)]
    assert [delta.index for delta in deltas] == list(range(10))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.choices[0].token_count, finished.usage.completion_tokens) == (10, 10)


@pytest.mark.parametrize(("server", "kind"), [(Elsewhere, EngineKind.REMOTE), (Outside, EngineKind.EXTERNAL)])
async def test_private_prompts_stay_at_home(
    certificates: MeshCertificates, server: type[RemoteServer], kind: EngineKind
) -> None:
    async with Upstream("vllm") as upstream:
        engine = engine_at(upstream, server)
        async with InProcessMesh(runners=[engine], certificates=certificates) as mesh:
            assert (engine.info.kind, engine.info.plaintext) == (kind, True)
            with pytest.raises(ChorusError) as caught:
                await mesh.client().complete(ask(private=True))
            assert "which the request does not allow" in caught.value.message
            assert not upstream.asked("/v1/completions")
            (entry,) = (await mesh.client().list_nodes()).nodes
            (row,) = _rows(entry.runners[0])
            where = "" if kind is EngineKind.REMOTE else " outside"
            assert str(row[3]) == f"tiny:latest by vllm{where} unencrypted"
            if kind is EngineKind.REMOTE:
                assert (await mesh.client().complete(ask())).text
                assert len(upstream.asked("/v1/completions")) == 1


async def first_ready(local_mesh: LocalMesh, registry: RegistryService) -> Runner:
    async for event in local_mesh.watch(registry):
        if isinstance(event, DeltaEvent):
            for leased in event.upserts:
                if leased.record.state is RunnerState.READY:
                    return leased.record.runner
    raise AssertionError("the watch ended")


async def test_the_process_needs_no_llama_cpp(
    local_mesh: LocalMesh, certificates: MeshCertificates, tmp_path: Path
) -> None:
    certificates.leaf(Role.RUNNER, "r1").write(tmp_path)
    registry = await local_mesh.registry()
    async with Upstream("ollama", UpstreamModel(loaded=False)) as upstream:
        settings = {
            "name": "r1",
            "listen": "127.0.0.1:0",
            "registries": [f"registry@{registry.address}"],
            "remote": upstream.setting,
            "models": ["tiny"],
        }
        ready = asyncio.ensure_future(first_ready(local_mesh, registry))
        async with child(RUNNER_WITHOUT_LLAMA, configured(tmp_path, TRUST_DOMAIN, runner=settings)) as process:
            await process.event("service.ready")
            runner = await ready
            assert [(status.artifact.name, status.state) for status in runner.models] == [
                ("tiny:latest", ModelState.LOADED)
            ]
            assert runner.engines[0].version == "0.12.6"


def test_a_missing_key_file_is_said_at_once(tmp_path: Path) -> None:
    settings = RunnerSettings.model_validate({"remote": "ollama", "remote_api_key_file": tmp_path / "key"})
    with pytest.raises(ConfigError, match="key"):
        configured_engine(settings)
