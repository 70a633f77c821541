"""Passing a runner's stream on: byte for byte, held back only where another runner may still take over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.api.runner.v1 import runner_pb2
from chorus.coordinator.relay import relay
from chorus.core.errors import EngineError, RunnersUnavailableError, UnavailableError
from chorus.core.events import RequestRefused
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.core.identity import Role
from chorus.core.resilience.delivered import Delivered
from chorus.core.resilience.stream_silence import StreamPatience, StreamWatch
from chorus.telemetry.metrics import GenerationMetrics, StreamTimer
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from chorus.transport import open_channel
from chorus.wire.generation import encode_generation
from tests.mesh.scripted_runner import ScriptedRunner

# Field 900 of the event, field 901 of the message: what a runner of a later version might say.
_UNKNOWN_IN_EVENT = b"\xa2\x38\x05later"
_UNKNOWN_IN_MESSAGE = b"\xaa\x38\x03new"


def wire(event: pb.GenerationEvent, *, later: bool = False) -> bytes:
    """A runner's message, with fields that nobody knows where `later`."""
    if not later:
        return runner_pb2.GenerateResponse(event=event).SerializeToString()
    body = event.SerializeToString() + _UNKNOWN_IN_EVENT
    return b"\x0a" + bytes((len(body),)) + body + _UNKNOWN_IN_MESSAGE


QUEUED = pb.GenerationEvent(queued=pb.Queued(position=1))
PROGRESS = pb.GenerationEvent(progress=pb.Progress(phase=pb.PHASE_PREFILL, done=1, total=2))
STARTED = pb.GenerationEvent(started=pb.Started(runner_id="r", prompt_token_count=7))
SCORED = pb.GenerationEvent(prompt_scored=pb.PromptScored())
DELTA = pb.GenerationEvent(delta=pb.TokenDelta(token_ids=[1, 2], text="ab"))
MORE = pb.GenerationEvent(delta=pb.TokenDelta(index=2, token_ids=[3], text="c"))
BESIDE = pb.GenerationEvent(delta=pb.TokenDelta(index=2, text="no ids"))
FINISHED = pb.GenerationEvent(finished=pb.Finished(usage=pb.Usage(prompt_token_count=8, cached_token_count=3)))
NOTHING = pb.GenerationEvent()


class Attempt:
    """The first attempt, or one that goes on with another's answer."""

    def __init__(self, taken_over: bytes | None = None, finished: bytes | None = None) -> None:
        self.told = (taken_over, finished)

    def started(self, message: runner_pb2.GenerateResponse) -> None:
        assert message.event.HasField("started")

    def substituted(self) -> bytes | None:
        return None

    def taken_over(self) -> bytes | None:
        return self.told[0]

    def finished(self, message: runner_pb2.GenerateResponse) -> bytes | None:
        assert message.event.HasField("finished")
        return self.told[1]


async def run(
    messages: Sequence[bytes], delivered: Delivered | None = None, attempt: Attempt | None = None
) -> tuple[list[bytes], Delivered]:
    written: list[bytes] = []
    delivered = delivered if delivered is not None else Delivered()

    async def stream() -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    async def write(message: bytes) -> None:
        written.append(message)

    timer = StreamTimer(GenerationMetrics(CollectorRegistry()).model("m"), 0.0)
    try:
        await relay(
            stream(),
            write,
            delivered,
            attempt or Attempt(),
            runner_id="r",
            timer=timer,
            clock=lambda: 1.0,
            watch=StreamWatch(StreamPatience(), 0.0),
        )
    except UnavailableError:
        written.append(b"ended early")
    except EngineError:
        written.append(b"broke the contract")
    return written, delivered


async def test_a_whole_stream_passes_unchanged_and_is_counted() -> None:
    messages = [wire(event) for event in (QUEUED, PROGRESS, STARTED, SCORED, DELTA, BESIDE, MORE, FINISHED)]
    written, delivered = await run(messages)
    assert written == messages
    assert (delivered.started, delivered.finished, delivered.output_tokens) == (True, True, 4)
    (choice,) = delivered.choices()
    assert choice.token_ids == (1, 2, 3)


async def test_another_who_goes_on_is_announced_once_and_begins_nothing() -> None:
    _, delivered = await run([wire(STARTED), wire(DELTA)])
    messages = [wire(event) for event in (QUEUED, STARTED, SCORED, PROGRESS, MORE, FINISHED)]
    written, _ = await run(messages, delivered, Attempt(b"taken over", b"the whole"))
    assert written == [wire(QUEUED), wire(PROGRESS), b"taken over", wire(MORE), b"the whole"]
    assert delivered.finished


async def test_what_was_delivered_is_not_delivered_again() -> None:
    _, delivered = await run([wire(STARTED), wire(DELTA)])
    written, _ = await run([wire(event) for event in (STARTED, DELTA, MORE)], delivered, Attempt(b"taken over"))
    assert written == [b"taken over", wire(MORE), b"ended early"]
    written, _ = await run([wire(STARTED), wire(DELTA), wire(FINISHED)], delivered, Attempt(b"taken over"))
    assert written == [b"taken over", wire(FINISHED)]


@pytest.mark.parametrize(
    "delta",
    [
        pb.TokenDelta(index=3, token_ids=[4], text="a token is missing"),
        pb.TokenDelta(index=1, token_ids=[2, 3], text="half of it is old"),
        pb.TokenDelta(index=0, token_ids=[7], text="another than before"),
        pb.TokenDelta(choice=1, token_ids=[1], text="no such choice"),
    ],
)
async def test_a_runner_that_leaves_out_or_contradicts_has_failed(delta: pb.TokenDelta) -> None:
    written, delivered = await run([wire(DELTA), wire(pb.GenerationEvent(delta=delta))])
    assert written == [wire(DELTA), b"broke the contract"]
    assert delivered.output_tokens == 2


async def test_started_waits_for_the_first_token_and_progress_does_not() -> None:
    for extra in (STARTED, SCORED):
        written, delivered = await run([wire(QUEUED), wire(PROGRESS), wire(extra)])
        assert written == [wire(QUEUED), wire(PROGRESS), b"ended early"]
        assert not delivered.started


async def test_an_answer_without_tokens_is_an_answer() -> None:
    written, delivered = await run([wire(STARTED), wire(FINISHED), wire(DELTA)])
    assert written == [wire(STARTED), wire(FINISHED)]
    assert (delivered.started, delivered.finished) == (True, True)


@pytest.mark.parametrize("messages", [[], [wire(STARTED), wire(DELTA)], [wire(DELTA), b"\xff\xff\xff"]])
async def test_a_stream_without_an_end_is_no_success(messages: list[bytes]) -> None:
    written, delivered = await run(messages)
    assert written[-1] == b"ended early"
    assert not delivered.finished


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(st.sampled_from([QUEUED, PROGRESS, STARTED, SCORED, DELTA, BESIDE, NOTHING]), st.booleans())))
def test_nothing_is_changed_lost_doubled_or_reordered(script: list[tuple[pb.GenerationEvent, bool]]) -> None:
    messages, count = [], 0
    for event, later in script:
        if event.HasField("delta"):
            event = pb.GenerationEvent(delta=event.delta)
            event.delta.index = count
            count += len(event.delta.token_ids)
        messages.append(wire(event, later=later))
    written, delivered = asyncio.run(run([*messages, wire(FINISHED)]))
    assert written == [*messages, wire(FINISHED)]
    unfinished, delivered = asyncio.run(run(messages))
    assert unfinished[:-1] == messages[: len(unfinished) - 1]
    assert delivered.started is any(event.HasField("delta") for event, _ in script)


async def test_what_a_runner_says_before_its_first_token_is_held_back_up_to_a_bound() -> None:
    long = pb.GenerationEvent(started=pb.Started(runner_id="r" * (1 << 20)))
    written, delivered = await run([*[wire(long)] * 10, wire(DELTA), wire(FINISHED)])
    assert written == [b"broke the contract"]
    assert not delivered.started


# --- over TLS -------------------------------------------------------------------------------------------------------


def scripted_mesh(certificates: MeshCertificates) -> InProcessMesh:
    return InProcessMesh(runners=0, certificates=certificates, registry={"lease_ttl_s": 600, "heartbeat_interval_s": 1})


async def raw_messages(mesh: InProcessMesh, **fields: Any) -> list[bytes]:
    return [message async for message in raw_stream(mesh, **fields)]


async def raw_stream(mesh: InProcessMesh, **fields: Any) -> AsyncIterator[bytes]:
    """The bytes of a generation's stream, as a client gets them."""
    spec = encode_generation(GenerationRequest("", TextPrompt("hi")))
    channel = open_channel(
        mesh.coordinators[0].address,
        identity=mesh.certificates.identity(Role.CLIENT, "raw"),
        server=mesh.certificates.id(Role.COORDINATOR, "coordinator-1"),
    )
    async with channel:
        generate: Any = channel.unary_stream(
            "/chorus.api.coordinator.v1.Coordinator/Generate",
            request_serializer=coordinator_pb2.GenerateRequest.SerializeToString,
        )
        metadata = (("x-request-id", "req-7"), ("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"))
        call = generate(coordinator_pb2.GenerateRequest(spec=spec, **fields), metadata=metadata, timeout=20)
        async for message in call:
            yield message


async def test_fields_that_the_coordinator_does_not_know_reach_the_client(certificates: MeshCertificates) -> None:
    messages = [wire(event, later=True) for event in (STARTED, DELTA, FINISHED)]

    async def script(_request: runner_pb2.GenerateRequest, context: Any) -> None:
        for message in messages:
            await context.write(message)

    runner = ScriptedRunner(script)
    async with scripted_mesh(certificates) as mesh:
        await runner.join(mesh)
        assert await raw_messages(mesh, attempt=4) == messages
        (request,), (metadata,) = runner.requests, runner.metadata
        assert (request.attempt, request.spec.prompt) == (4, "hi")
        assert request.spec.model == "fake-1b.Q8_0.gguf"  # placement chose the artifact
        assert metadata["x-request-id"] == "req-7"
        trace = str(metadata["traceparent"]).split("-")
        assert trace[1] == "a" * 32
        assert trace[2] != "b" * 16
        await runner.leave()


MOST = 2**32 - 1


async def test_a_connection_that_is_closed_after_finished_is_no_break(certificates: MeshCertificates) -> None:
    """As that to a runner which is revoked then: the answer is whole, and nobody is to go on with it."""
    ended = asyncio.Event()
    messages = [wire(event) for event in (STARTED, DELTA, FINISHED)]

    async def script(_request: runner_pb2.GenerateRequest, context: Any) -> None:
        for message in messages:
            await context.write(message)
        await ended.wait()

    runner = ScriptedRunner(script)
    async with scripted_mesh(certificates) as mesh:
        await runner.join(mesh)
        stream = raw_stream(mesh)
        assert [await anext(stream) for _ in messages] == messages
        channel = mesh.coordinators[0]._pool.get("scripted")
        assert channel is not None
        await channel._channel.close()
        assert [message async for message in stream] == []
        assert len(runner.requests) == 1
        ended.set()
        await runner.leave()


async def test_a_request_that_meets_a_defect_is_told_to_have_ended(certificates: MeshCertificates) -> None:
    def defect(_candidate: object) -> None:
        raise ZeroDivisionError

    async with InProcessMesh(runners=1, certificates=certificates) as mesh:
        service = mesh.coordinators[0]
        told: list[object] = []
        service.events.on_event(lambda event: told.append(event.detail))
        service._placing.on_start(defect)
        with pytest.raises(grpc.RpcError, match="request id req-7"):
            await raw_messages(mesh)
        ends = [detail.reason for detail in told if isinstance(detail, RequestRefused)]
        assert ends == ["INTERNAL"]
        assert service._admission.running == 0


async def test_attempts_are_counted_as_far_as_their_field_goes(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    engines[1].faults = engines[0].faults
    engines[0].fail_next()  # whoever is asked first
    async with InProcessMesh(runners=engines, certificates=certificates) as mesh:
        events = [runner_pb2.GenerateResponse.FromString(raw).event for raw in await raw_messages(mesh, attempt=MOST)]
    (started,) = [event.started for event in events if event.HasField("started")]
    assert started.attempt == MOST
    assert events[-1].HasField("finished")


async def test_a_stream_that_just_ends_is_an_error(certificates: MeshCertificates) -> None:
    async def script(_request: runner_pb2.GenerateRequest, context: Any) -> None:
        await context.write(wire(STARTED))
        await context.write(wire(DELTA))

    runner = ScriptedRunner(script)
    async with scripted_mesh(certificates) as mesh:
        await runner.join(mesh)
        with pytest.raises(UnavailableError, match=r"ended early.* broke off after 2 tokens") as caught:
            await mesh.client().complete("hi")
        facts = caught.value.metadata
        assert (facts["runner_id"], facts["delivered_tokens"], facts["cause"]) == ("scripted", "2", "UNAVAILABLE")
        # It is asked to go on, and begins anew every time, which is not taken for an answer.
        first, *others = runner.requests
        assert not first.spec.HasField("resume")
        assert 1 <= len(others) <= 3
        for request in others:
            assert [list(choice.token_ids) for choice in request.spec.resume.choices] == [[1, 2]]
        await runner.leave()


async def test_an_impostor_gets_no_request(certificates: MeshCertificates) -> None:
    async def script(_request: runner_pb2.GenerateRequest, _context: Any) -> None:
        return

    runner = ScriptedRunner(script)
    async with scripted_mesh(certificates) as mesh:
        # It is registered as `scripted`, and what answers at its address has the certificate of another runner.
        await runner.join(mesh, identity="somebody-else")
        await mesh.until(lambda directory: not directory.entries["scripted"].reachable)
        with pytest.raises(RunnersUnavailableError, match="scripted cannot be reached"):
            await mesh.client().complete("hi")
        assert runner.requests == []
        await runner.leave()


async def test_the_upstream_call_ends_with_the_clients(certificates: MeshCertificates) -> None:
    async def script(_request: runner_pb2.GenerateRequest, context: Any) -> None:
        await context.write(wire(STARTED))
        await context.write(wire(DELTA))
        await asyncio.get_running_loop().create_future()  # hangs

    runner = ScriptedRunner(script)
    async with scripted_mesh(certificates) as mesh:
        await runner.join(mesh)
        async with mesh.client().generate("hi") as generation:
            await anext(generation)
            assert not runner.ended.is_set()
        await runner.ended.wait()
        await runner.leave()
