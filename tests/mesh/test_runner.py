"""A runner over mutual TLS with the fake engine: what it answers, and what becomes of those who go away."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from chorus.api.inference.v1 import embedding_pb2, generation_pb2
from chorus.api.runner.v1 import resources_pb2
from chorus.api.runner.v1 import runner_pb2 as pb
from chorus.core.errors import (
    ChorusError,
    ConfigError,
    DeadlineExceededError,
    DrainingError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PermissionDeniedError,
    UnknownModelError,
)
from chorus.core.fleet.records import ModelState
from chorus.core.identity import Role
from chorus.runner.service import RunnerService
from chorus.telemetry.context import REQUEST_ID_KEY
from chorus.telemetry.logs import configure_logging
from chorus.testing.engine_fake import FakeEngine, FakeModel, fake_artifact
from chorus.testing.pace import ManualPace
from chorus.wire.errors import from_rpc_error
from tests.mesh.local_mesh import LocalMesh

LONG_S = 20.0
MODEL = fake_artifact().name


def ask(prompt: str = "echo:hello", model: str = "", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(spec=generation_pb2.GenerationSpec(model=model, prompt=prompt), **fields)


async def refusal(call: Any) -> ChorusError:
    """The error with which a call, unary or streaming, ends."""
    answer = read_all(call) if hasattr(call, "__aiter__") else call
    with pytest.raises(grpc.RpcError) as caught:
        await answer
    return from_rpc_error(caught.value)


async def read_all(call: Any) -> list[Any]:
    return [message async for message in call]


def used(engine: FakeEngine) -> int:
    return sum(load.slots_used for load in engine.load_report())


async def test_it_generates_and_says_who_did(local_mesh: LocalMesh) -> None:
    runner = await local_mesh.runner()
    stub = await local_mesh.runner_stub(runner)
    call = stub.Generate(ask("echo:hello", attempt=3), metadata=((REQUEST_ID_KEY, "my-request"),))
    events = [response.event for response in await read_all(call)]
    started = next(event.started for event in events if event.HasField("started"))
    assert (started.request_id, started.node_id, started.runner_id) == ("my-request", "test-node", "r1")
    assert (started.attempt, started.incarnation) == (3, runner.presence.incarnation)
    assert "".join(event.delta.text for event in events) == "hello"
    assert events[-1].HasField("finished")


async def test_every_other_question_is_answered(local_mesh: LocalMesh) -> None:
    stub = await local_mesh.runner_stub(await local_mesh.runner())
    spec = embedding_pb2.EmbeddingSpec(inputs=[embedding_pb2.EmbeddingInput(text="one")])
    embedded = (await stub.Embed(pb.EmbedRequest(spec=spec))).result
    assert (len(embedded.embeddings), embedded.runner_id, embedded.node_id) == (1, "r1", "test-node")
    tokens = await stub.Tokenize(pb.TokenizeRequest(text="ab"))
    text = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert text.text == "ab"
    count = await stub.CountTokens(pb.CountTokensRequest(spec=ask("echo:hello").spec))
    assert count.count.token_count > 0
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.artifact.name, model.state) == (MODEL, resources_pb2.MODEL_STATE_LOADED)
    node = await stub.GetNode(pb.GetNodeRequest())
    assert node.node.node_id == node.runner.node_id == "test-node"
    assert (node.runner.runner_id, node.runner.server_name) == ("r1", "r1.runner.test.chorus.local")
    assert node.runner.engines[0].name == "fake"


async def test_the_engines_refusals_reach_the_caller(local_mesh: LocalMesh) -> None:
    engine = FakeEngine(slots=1, max_queue=0, pace=ManualPace())
    stub = await local_mesh.runner_stub(await local_mesh.runner(engine=engine))
    assert isinstance(await refusal(stub.Generate(ask(model="nothing"))), UnknownModelError)
    assert isinstance(await refusal(stub.Generate(pb.GenerateRequest())), InvalidRequestError)
    assert isinstance(await refusal(stub.Tokenize(pb.TokenizeRequest(model="nothing"))), UnknownModelError)
    engine.fail_next()
    assert isinstance(await refusal(stub.Generate(ask())), EngineError)
    running = aiter(stub.Generate(ask()))
    await anext(running)
    assert isinstance(await refusal(stub.Generate(ask())), OverloadedError)


async def test_a_caller_that_cancels_frees_its_slot(local_mesh: LocalMesh) -> None:
    pace = ManualPace()
    engine, idle = FakeEngine(pace=pace), asyncio.Event()
    runner = await local_mesh.runner(engine=engine)
    stub = await local_mesh.runner_stub(runner)
    call = stub.Generate(ask("say much"))
    messages = aiter(call)
    pace.release(3)
    while not (await anext(messages)).event.HasField("delta"):
        pass
    await pace.waiting(1)
    assert (used(engine), runner._work.count) == (1, 1)
    watch_idle(runner, idle)
    call.cancel()
    await idle.wait()
    assert used(engine) == 0


def watch_idle(runner: RunnerService, idle: asyncio.Event) -> None:
    """Sets `idle` once the runner works on nothing any more."""

    async def wait() -> None:
        await runner._work._idle.wait()
        idle.set()

    idle.task = asyncio.ensure_future(wait())  # type: ignore[attr-defined]  # kept, or it might be collected


async def test_a_connection_that_breaks_frees_the_slot(local_mesh: LocalMesh) -> None:
    pace = ManualPace()
    engine, idle = FakeEngine(pace=pace), asyncio.Event()
    runner = await local_mesh.runner(engine=engine)
    channel = await local_mesh.channel(runner.address, Role.RUNNER, "r1", Role.ADMIN, "kim")
    call = channel.unary_stream(
        "/chorus.api.runner.v1.ModelRunner/Generate",
        pb.GenerateRequest.SerializeToString,
        pb.GenerateResponse.FromString,
    )(ask("say much"))
    await anext(aiter(call))
    await pace.waiting(1)
    watch_idle(runner, idle)
    await channel.close()
    await idle.wait()
    assert used(engine) == 0


async def test_a_deadline_ends_the_stream_and_frees_the_slot(local_mesh: LocalMesh) -> None:
    engine, idle = FakeEngine(pace=ManualPace()), asyncio.Event()
    runner = await local_mesh.runner(engine=engine)
    stub = await local_mesh.runner_stub(runner)
    error = await refusal(stub.Generate(ask("say much"), timeout=0.3))
    assert isinstance(error, DeadlineExceededError)
    watch_idle(runner, idle)
    await idle.wait()
    assert used(engine) == 0


async def test_generations_are_measured(local_mesh: LocalMesh) -> None:
    metrics = CollectorRegistry()
    engine = FakeEngine()
    stub = await local_mesh.runner_stub(await local_mesh.runner(engine=engine, service={"metrics": metrics}))
    *_, last = await read_all(stub.Generate(ask("echo:hello")))
    engine.fail_next(before=2)
    await refusal(stub.Generate(ask("echo:hello")))

    def value(name: str, **labels: str) -> float | None:
        return metrics.get_sample_value(f"chorus_generation_{name}", labels)

    assert value("time_to_first_token_seconds_count", model=MODEL) == 2.0
    assert value("output_tokens_total", model=MODEL) == last.event.finished.usage.completion_token_count + 2
    assert value("attempts_total", outcome="OK") == 1.0
    assert value("attempts_total", outcome="ENGINE_FAILED") == 1.0


async def test_the_end_of_a_generation_is_logged_with_its_request_and_without_its_texts(
    local_mesh: LocalMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    stub = await local_mesh.runner_stub(await local_mesh.runner(engine=engine))
    with configure_logging(service="test", format="json"):
        metadata = ((REQUEST_ID_KEY, "my-request"),)
        answer = await read_all(stub.Generate(ask("echo:confidential"), metadata=metadata))
        engine.fail_next(before=0)
        await refusal(stub.Generate(ask("echo:confidential"), metadata=metadata))
    said = capsys.readouterr().err
    lines = [line for line in map(json.loads, said.splitlines()) if line["event"] == "generation.ended"]
    assert [(line["request_id"], line["outcome"]) for line in lines] == [
        ("my-request", "OK"),
        ("my-request", "ENGINE_FAILED"),
    ]
    assert lines[0]["output_tokens"] == answer[-1].event.finished.usage.completion_token_count
    assert "confidential" not in said


async def test_loading_tells_its_progress_and_ends_with_the_status(local_mesh: LocalMesh) -> None:
    engine = FakeEngine([FakeModel(loaded=False)], load_delay_s=0.01)
    stub = await local_mesh.runner_stub(await local_mesh.runner(engine=engine), Role.ADMIN, "kim")
    *progress, last = await read_all(stub.LoadModel(pb.LoadModelRequest(model=MODEL, context_length=512)))
    assert progress
    done = [message.progress.done for message in progress]
    assert done == sorted(done)
    assert (last.loaded.state, last.loaded.context_length) == (resources_pb2.MODEL_STATE_LOADED, 512)
    unloaded = await stub.UnloadModel(pb.UnloadModelRequest(model=MODEL))
    assert unloaded.model.state == resources_pb2.MODEL_STATE_AVAILABLE


async def test_a_load_that_fails_says_why(local_mesh: LocalMesh) -> None:
    engine = FakeEngine([FakeModel(loaded=False, load_error=EngineError("out of luck"))])
    stub = await local_mesh.runner_stub(await local_mesh.runner(engine=engine), Role.ADMIN, "kim")
    error = await refusal(stub.LoadModel(pb.LoadModelRequest(model=MODEL)))
    assert (error.reason, error.message) == ("ENGINE_FAILED", "out of luck")
    assert isinstance(await refusal(stub.LoadModel(pb.LoadModelRequest(model="nothing"))), UnknownModelError)


async def test_the_owner_may_forbid_loading(local_mesh: LocalMesh) -> None:
    stub = await local_mesh.runner_stub(await local_mesh.runner(allow_load=False), Role.ADMIN, "kim")
    for call in (
        stub.LoadModel(pb.LoadModelRequest(model=MODEL)),
        stub.UnloadModel(pb.UnloadModelRequest(model=MODEL)),
    ):
        assert isinstance(await refusal(call), PermissionDeniedError)


async def test_it_is_healthy_once_its_models_are_loaded_or_have_failed(local_mesh: LocalMesh) -> None:
    broken = fake_artifact("broken.gguf", family="broken")
    engine = FakeEngine(
        [FakeModel(loaded=False), FakeModel(broken, loaded=False, load_error=EngineError("broken"))], load_delay_s=0.05
    )
    runner = await local_mesh.runner(engine=engine, models=("broken", "fake-1b", "unheard-of"))
    channel = await local_mesh.channel(runner.address, Role.RUNNER, "r1", Role.CLIENT, "cli")
    states = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
    assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
    assert {model.artifact.name: model.state for model in engine.models()} == {
        MODEL: ModelState.LOADED,
        "broken.gguf": ModelState.FAILED,
    }


async def test_a_draining_runner_finishes_what_it_has_and_takes_nothing_new(local_mesh: LocalMesh) -> None:
    pace = ManualPace()
    runner = await local_mesh.runner(engine=FakeEngine(pace=pace))
    stub = await local_mesh.runner_stub(runner)
    running = aiter(stub.Generate(ask("echo:hello")))
    await anext(running)
    stopping = asyncio.ensure_future(runner.stop(LONG_S))
    await pace.waiting(1)
    assert isinstance(await refusal(stub.Generate(ask())), DrainingError)
    assert isinstance(await refusal(stub.Tokenize(pb.TokenizeRequest(text="a"))), DrainingError)
    node = await stub.GetNode(pb.GetNodeRequest())
    assert node.state == resources_pb2.RUNNER_STATE_DRAINING
    pace.release_all()
    rest = [response.event async for response in running]
    assert rest[-1].HasField("finished")
    await stopping


async def test_what_outlasts_the_grace_ends_as_unavailable(local_mesh: LocalMesh) -> None:
    pace = ManualPace()
    runner = await local_mesh.runner(engine=FakeEngine(pace=pace))
    stub = await local_mesh.runner_stub(runner)
    call = stub.Generate(ask("say much"))
    ending = asyncio.ensure_future(refusal(call))
    await pace.waiting(1)
    await runner.stop(0.05)
    assert isinstance(await ending, DrainingError)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_runner_that_listens_everywhere_must_say_where_it_is_dialled(local_mesh: LocalMesh) -> None:
    with pytest.raises(ConfigError, match=r"runner\.advertise"):
        await local_mesh.runner(listen="0.0.0.0:0")
    runner = await local_mesh.runner(name="r2", listen="0.0.0.0:0", advertise="127.0.0.1:7299")
    assert runner.presence.runner().address == "127.0.0.1:7299"
