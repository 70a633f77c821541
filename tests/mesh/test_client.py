"""The Python client: which coordinator it asks, what its errors say, and its half without an event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chorus.client import MeshClient, StartedAt, SyncMeshClient, chat_request
from chorus.config import ChorusConfig, Endpoint
from chorus.core.errors import (
    CertificateError,
    ConfigError,
    DeadlineExceededError,
    UnavailableError,
    UnknownModelError,
)
from chorus.core.generation import (
    Conversation,
    EmbeddingRequest,
    Finished,
    GenerationRequest,
    Message,
    MessageRole,
    Requirements,
    TextPart,
    TextPrompt,
    TokenDelta,
)
from chorus.core.identity import Role
from chorus.telemetry.context import bound, new_context
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace


@pytest.fixture
def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def raw(text: str = "echo:hello") -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(text))


# --- which coordinator ----------------------------------------------------------------------------------------------


async def test_a_coordinator_that_is_down_is_passed_over(certificates: MeshCertificates, closed_port: int) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        endpoints = [f"coordinator-9@127.0.0.1:{closed_port}", *mesh.coordinator_endpoints()]
        client = MeshClient(
            [Endpoint.parse(text) for text in endpoints], identity=certificates.identity(Role.CLIENT, "client-1")
        )
        async with client:
            assert (await client.complete(raw())).text == "hello"
            assert (await client.list_models()).default_model == "fake-1b"


async def test_the_next_coordinator_takes_over_when_one_stops(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, coordinators=2, certificates=certificates) as mesh:
        client = mesh.client()
        assert (await client.complete(raw())).text == "hello"
        await mesh.coordinators[0].stop(0.0)
        assert (await client.complete(raw())).text == "hello"
        assert (await client.embed("text")).runner_id == "runner-1"


async def test_an_answer_of_the_mesh_is_not_asked_for_twice(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=[FakeEngine()], coordinators=2, certificates=certificates) as mesh:
        engine = mesh.runners[0]._engine
        assert isinstance(engine, FakeEngine)
        engine.fail_next(error=UnavailableError("the runner's word"), times=5)
        with pytest.raises(UnavailableError, match="the runner's word"):
            await mesh.client().complete(raw())
        assert len(engine.faults) == 4


async def test_nobody_there_says_what_to_do(certificates: MeshCertificates, closed_port: int) -> None:
    endpoint = Endpoint.parse(f"127.0.0.1:{closed_port}")
    async with MeshClient([endpoint], identity=certificates.identity(Role.CLIENT, "client-1")) as client:
        with pytest.raises(UnavailableError, match="chorus up") as caught:
            await client.complete("hi")
        assert f"coordinator@127.0.0.1:{closed_port}" in caught.value.message
        with pytest.raises(UnavailableError, match="nothing listens there"):
            await client.list_models()


async def test_another_meshs_coordinator_is_not_believed(certificates: MeshCertificates) -> None:
    stranger = MeshCertificates("other.chorus.local").identity(Role.CLIENT, "client-1")
    async with InProcessMesh(runners=0, certificates=certificates) as mesh:
        (endpoint,) = mesh.coordinator_endpoints()
        async with MeshClient([Endpoint.parse(endpoint)], identity=stranger) as client:
            with pytest.raises(UnavailableError, match="signed by another authority"):
                await client.complete("hi")


async def test_a_client_needs_somebody_to_ask_and_a_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client\.coordinators"):
        MeshClient([], identity=None)
    config = ChorusConfig.model_validate({"mesh": {"certs_dir": tmp_path}})
    with pytest.raises(CertificateError, match="chorus certs"):
        MeshClient.from_config(config)
    with pytest.raises(CertificateError):
        SyncMeshClient(config)


async def test_a_closed_client_says_so(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=0, certificates=certificates) as mesh:
        client = mesh.client()
        await client.aclose()
        with pytest.raises(UnavailableError, match="closed"):
            await client.list_models()


async def test_closing_a_client_ends_what_goes_on_as_an_error(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[FakeEngine(pace=pace)], certificates=certificates) as mesh:
        client = mesh.client()
        streaming = asyncio.create_task(client.complete(raw()))
        await pace.waiting(1)
        await client.aclose()
        with pytest.raises(UnavailableError, match="closed"):
            await streaming


# --- answers --------------------------------------------------------------------------------------------------------


async def test_a_late_answer_names_the_setting(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=[FakeEngine(pace=ManualPace())], certificates=certificates) as mesh:
        with pytest.raises(DeadlineExceededError, match=r"0\.2 s"):
            await mesh.client().complete(raw(), timeout_s=0.2)


async def test_every_request_has_an_id_and_may_share_one(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        client = mesh.client()
        one, other = await client.complete(raw()), await client.complete(raw())
        assert one.request_id != other.request_id
        with bound(new_context("my-request")):
            assert (await client.complete(raw())).request_id == "my-request"
            with pytest.raises(UnknownModelError) as caught:
                await client.complete("hi", model="nothing")
        assert caught.value.metadata["request_id"] == "my-request"


async def test_a_generation_that_was_read_has_no_completion(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        generation = mesh.client().generate(raw())
        assert isinstance([event async for event in generation][-1], Finished)
        with pytest.raises(UnavailableError, match="was read before"):
            await generation.completion()
        await generation.aclose()


async def test_all_choices_come_whole(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        answer = await mesh.client().complete(
            GenerationRequest("", TextPrompt("echo:both"), choice_count=3), max_tokens=2, seed=5
        )
        assert [choice.text for choice in answer.choices] == ["bo"] * 3
        assert {choice.reason for choice in answer.choices} == {"length"}


# --- requests -------------------------------------------------------------------------------------------------------


def test_a_question_becomes_a_conversation() -> None:
    request = chat_request("why?", model="m", instructions="be brief", max_tokens=5, temperature=0.0, seed=7)
    assert request.prompt == Conversation(
        (
            Message(MessageRole.SYSTEM, (TextPart("be brief"),)),
            Message(MessageRole.USER, (TextPart("why?"),)),
        )
    )
    assert (request.model, request.stop.max_tokens, request.sampling.temperature, request.sampling.seed) == (
        "m",
        5,
        0.0,
        7,
    )


def test_a_whole_request_keeps_what_is_not_replaced() -> None:
    whole = GenerationRequest("m", TextPrompt("x"), requirements=Requirements(private=True))
    assert chat_request(whole) == whole
    assert chat_request(whole, model="other").model == "other"
    assert chat_request(whole, requirements=Requirements()).requirements == Requirements()
    with pytest.raises(TypeError):
        chat_request(whole, instructions="be brief")


# --- without an event loop ------------------------------------------------------------------------------------------


def _use_without_a_loop(config: ChorusConfig) -> list[str]:
    with SyncMeshClient(config) as client:
        told = [client.complete(raw()).text, client.list_models().default_model]
        told.append("".join(map(_text_of, client.generate(raw("echo:bit by bit")))))
        with client.generate(raw("no end")) as generation:
            told.append(type(next(generation)).__name__)
        told.append(client.embed(EmbeddingRequest("", ("text",))).runner_id)
        told.append(str(client.count_tokens(raw("four")).token_count))
        told.append(client.list_nodes().nodes[0].node.node_id)
        told.append(client.explain_placement(raw()).chosen_runner_id)
        with pytest.raises(UnknownModelError):
            client.complete("hi", model="nothing")
    client.close()
    return told


def _text_of(event: object) -> str:
    return event.text if isinstance(event, TokenDelta) else ""


async def test_the_same_without_an_event_loop(certificates: MeshCertificates, tmp_path: Path) -> None:
    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        told = await asyncio.to_thread(_use_without_a_loop, mesh.client_config(tmp_path))
    node, runner = "node-of-runner-1", "runner-1"
    assert told == ["hello", "fake-1b", "bit by bit", StartedAt.__name__, runner, "5", node, runner]


@pytest.mark.parametrize("call", [lambda client: client.complete("tell me"), lambda client: client.count_tokens("hi")])
async def test_a_moment_without_any_coordinator_is_survived(
    certificates: MeshCertificates, call: Callable[[MeshClient], Awaitable[object]]
) -> None:
    """As when they are restarted one after the other, the last before the connection to the first is back."""
    async with InProcessMesh(runners=[FakeEngine()], coordinators=2, certificates=certificates) as mesh:
        client = mesh.client()
        await call(client)
        await mesh.kill_coordinator(0)
        await mesh.kill_coordinator(1)
        asking = asyncio.ensure_future(call(client))
        await mesh.restart_coordinator(0)
        await mesh.until(lambda directory: bool(directory.entries))
        assert await asking


async def test_a_client_that_never_had_an_answer_does_not_wait_for_one(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=[FakeEngine()], coordinators=2, certificates=certificates) as mesh:
        client, known = mesh.client(), mesh.client()
        await known.count_tokens("hi")
        await mesh.kill_coordinator(0)
        await mesh.kill_coordinator(1)
        waiting = asyncio.ensure_future(known.count_tokens("hi"))
        with pytest.raises(UnavailableError, match="no coordinator answers"):
            await client.count_tokens("hi")
        assert not waiting.done()
        with pytest.raises(UnavailableError, match="no coordinator answers"):
            await waiting
