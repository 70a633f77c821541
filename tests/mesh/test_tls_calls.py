"""What every call passes through, tried with handlers of every shape and of every bad habit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chorus.core import errors
from chorus.core.identity import Role
from chorus.telemetry.context import outgoing_metadata
from chorus.telemetry.logs import configure_logging
from chorus.testing.certificates import MeshCertificates
from chorus.transport import MeshInterceptor, cancelled_after, current_caller, responses
from chorus.transport.options import server_options
from chorus.wire.errors import from_rpc_error

PATIENCE_S = 20.0
SHAPES = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "Writing")
CERTIFICATES = MeshCertificates()


class Observer:
    """Remembers calls, and says when one has ended."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.finished: asyncio.Queue[tuple[str, grpc.StatusCode, str]] = asyncio.Queue()

    def call_started(self, method: str) -> None:
        self.started.append(method)

    def call_finished(self, method: str, code: grpc.StatusCode, reason: str, seconds: float) -> None:
        assert seconds >= 0
        self.finished.put_nowait((method, code, reason))

    async def next(self) -> tuple[str, grpc.StatusCode, str]:
        async with asyncio.timeout(PATIENCE_S):
            return await self.finished.get()


class Odd:
    """Does what the message says; every shape answers with what it was sent."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.closed = asyncio.Event()

    async def answer(self, text: str, context: Any) -> StringValue | bytes:
        match text:
            case "unknown model":
                raise errors.UnknownModelError("there is no model x", metadata={"model": "x"})
            case "overloaded":
                raise errors.OverloadedError("full", retry_after_s=0.25)
            case "bug":
                raise ZeroDivisionError("a secret of the implementation")
            case "group":
                raise ExceptionGroup("tasks", [ExceptionGroup("more", [errors.NotFoundError("gone")])])
            case "stray cancellation":
                raise asyncio.CancelledError
            case "abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "by itself")
            case "bytes":
                return StringValue(value="relayed").SerializeToString()
            case "not a message":
                return 7  # type: ignore[return-value]
            case "ids":
                return StringValue(value=json.dumps(dict(outgoing_metadata())))
            case "caller":
                return StringValue(value=str(current_caller()))
            case "wait":
                self.waiting.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.closed.set()
        return StringValue(value=text)

    async def unary_unary(self, request: StringValue, context: Any) -> Any:
        return await self.answer(request.value, context)

    async def unary_stream(self, request: StringValue, context: Any) -> AsyncIterator[Any]:
        try:
            yield StringValue(value="first")
            if request.value == "flood":
                self.waiting.set()
                while True:
                    yield StringValue(value="x" * 10_000)
            yield await self.answer(request.value, context)
        finally:
            self.closed.set()

    async def stream_unary(self, requests: AsyncIterator[StringValue], context: Any) -> Any:
        texts = [request.value async for request in requests]
        return await self.answer(texts[-1] if texts else "", context)

    async def stream_stream(self, requests: AsyncIterator[StringValue], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield await self.answer(request.value, context)

    async def writing(self, request: StringValue, context: Any) -> None:
        answer = await self.answer(request.value, context)
        await context.write(answer if isinstance(answer, bytes) else answer.SerializeToString())

    def handlers(self) -> grpc.GenericRpcHandler:
        coding = {
            "request_deserializer": StringValue.FromString,
            "response_serializer": StringValue.SerializeToString,
        }
        return grpc.method_handlers_generic_handler(
            "test.Odd",
            {
                "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.unary_unary, **coding),
                "UnaryStream": grpc.unary_stream_rpc_method_handler(self.unary_stream, **coding),
                "StreamUnary": grpc.stream_unary_rpc_method_handler(self.stream_unary, **coding),
                "StreamStream": grpc.stream_stream_rpc_method_handler(self.stream_stream, **coding),
                "Writing": grpc.unary_stream_rpc_method_handler(self.writing, **coding),
            },
        )


class Served:
    """A server of Odd, a channel to it, and its observer."""

    def __init__(self, channel: grpc.aio.Channel, odd: Odd, observer: Observer, interceptor: MeshInterceptor) -> None:
        self.channel, self.odd, self.observer, self.interceptor = channel, odd, observer, interceptor

    def start(self, shape: str, *requests: bytes, **kwargs: Any) -> Any:
        path = f"/test.Odd/{shape}"
        kwargs.setdefault("timeout", PATIENCE_S)
        match shape:
            case "UnaryUnary":
                return self.channel.unary_unary(path)(requests[0], **kwargs)
            case "StreamUnary":
                return self.channel.stream_unary(path)(iter(requests), **kwargs)
            case "StreamStream":
                return self.channel.stream_stream(path)(iter(requests), **kwargs)
        return self.channel.unary_stream(path)(requests[0], **kwargs)

    async def call(self, shape: str, *requests: bytes, **kwargs: Any) -> list[bytes]:
        call = self.start(shape, *requests, **kwargs)
        if shape.endswith("Unary"):
            return [await call]
        return [message async for message in call]

    async def say(self, shape: str, text: str, **kwargs: Any) -> str:
        replies = await self.call(shape, StringValue(value=text).SerializeToString(), **kwargs)
        return StringValue.FromString(replies[-1]).value

    async def refusal(self, shape: str, *requests: bytes, **kwargs: Any) -> tuple[grpc.StatusCode, errors.ChorusError]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(shape, *requests, **kwargs)
        return caught.value.code(), from_rpc_error(caught.value)


@asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    odd, observer = Odd(), Observer()
    interceptor = MeshInterceptor({"/test.Odd/UnaryUnary": frozenset(Role)}, open_calls=None, observer=observer)
    server = grpc.aio.server(interceptors=[interceptor], options=server_options())
    server.add_generic_rpc_handlers((odd.handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(channel, odd, observer, interceptor)
    finally:
        await server.stop(0)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as it:
        yield it


def said(text: str) -> bytes:
    return StringValue(value=text).SerializeToString()


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_shape_answers(served: Served, shape: str) -> None:
    assert await served.say(shape, "hello") == "hello"
    assert await served.observer.next() == (f"/test.Odd/{shape}", grpc.StatusCode.OK, "")
    assert served.interceptor.calls_in_flight == 0


@pytest.mark.parametrize("shape", SHAPES)
async def test_bytes_are_sent_as_they_are(served: Served, shape: str) -> None:
    assert await served.say(shape, "bytes") == "relayed"


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_error_becomes_its_status(served: Served, shape: str) -> None:
    code, error = await served.refusal(shape, said("unknown model"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert isinstance(error, errors.UnknownModelError)
    assert error.message == "there is no model x"
    assert error.metadata["model"] == "x"
    assert error.metadata["request_id"]
    assert await served.observer.next() == (f"/test.Odd/{shape}", grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")


async def test_retry_info_arrives(served: Served) -> None:
    code, error = await served.refusal("UnaryStream", said("overloaded"))
    assert (code, error.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.25)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["bug", "not a message", "stray cancellation"])
async def test_a_defect_shows_nothing_but_a_request_id(
    served: Served, shape: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with configure_logging(service="test", format="json"):
        code, error = await served.refusal(shape, said(text), metadata=(("x-request-id", "r-77"),))
    assert code is grpc.StatusCode.INTERNAL
    assert error.message == "internal error; request id r-77"
    assert dict(error.metadata) == {"request_id": "r-77"}
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    [failed] = [event for event in logged if event["event"] == "call.failed"]
    assert failed["request_id"] == "r-77"
    if text == "bug":
        assert "ZeroDivisionError" in json.dumps(failed)


async def test_one_error_in_a_group_is_that_error(served: Served) -> None:
    code, error = await served.refusal("UnaryUnary", said("group"))
    assert (code, error.message) == (grpc.StatusCode.NOT_FOUND, "gone")


async def test_a_servicer_may_abort_by_itself(served: Served) -> None:
    code, _ = await served.refusal("UnaryStream", said("abort"))
    assert code is grpc.StatusCode.DATA_LOSS
    assert await served.observer.next() == ("/test.Odd/UnaryStream", grpc.StatusCode.DATA_LOSS, "")


async def test_an_rpc_that_is_not_there_is_counted_as_unknown(served: Served) -> None:
    for shape in ("Nothing", "Nothing/else", "x" * 3000):
        code, _ = await served.refusal(shape, b"")
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert await served.observer.next() == ("unknown", grpc.StatusCode.UNIMPLEMENTED, "")


@pytest.mark.parametrize("shape", SHAPES)
async def test_ids_are_taken_over_and_passed_on(served: Served, shape: str) -> None:
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    metadata = (("x-request-id", "r-1"), ("traceparent", traceparent))
    ids = json.loads(await served.say(shape, "ids", metadata=metadata))
    assert ids["x-request-id"] == "r-1"
    assert ids["traceparent"].split("-")[1] == traceparent.split("-")[1]
    assert ids["traceparent"] != traceparent
    fresh = json.loads(await served.say(shape, "ids", metadata=(("x-request-id", "no good!"),)))
    assert fresh["x-request-id"] not in ("r-1", "no good!", "")


async def test_without_tls_there_is_no_caller(served: Served) -> None:
    assert await served.say("UnaryUnary", "caller") == "None"


@given(st.sampled_from(SHAPES), st.binary(max_size=300), st.lists(st.binary(max_size=30), max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_malformed_and_nothing_else(fuzzed: Any, shape: str, garbage: bytes, more: list[bytes]) -> None:
    try:
        StringValue.FromString(garbage)
    except Exception:
        good = [said("a")] * (len(more) if shape.startswith("Stream") else 0)
        code, error = fuzzed(shape, *good, garbage)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error, errors.MalformedMessageError)
        assert "DecodeError" not in error.message
        assert "protobuf" not in error.message


@pytest.fixture(scope="module")
def fuzzed() -> Any:
    """Calls one server over and over, from a test that isn't asynchronous."""
    with asyncio.Runner() as runner:
        context = serving()
        served = runner.run(context.__aenter__())
        yield lambda shape, *requests: runner.run(served.refusal(shape, *requests))
        runner.run(context.__aexit__(None, None, None))


# --- how calls end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["UnaryUnary", "UnaryStream", "StreamStream", "Writing"])
async def test_a_caller_that_goes_away_ends_the_call(served: Served, shape: str) -> None:
    call = served.start(shape, said("wait"))
    async with asyncio.timeout(PATIENCE_S):
        await served.odd.waiting.wait()
        call.cancel()
        await served.odd.closed.wait()
    assert await served.observer.next() == (f"/test.Odd/{shape}", grpc.StatusCode.CANCELLED, "")


async def test_a_caller_that_stops_reading_and_goes_closes_the_generator(served: Served) -> None:
    call = served.start("UnaryStream", said("flood"))
    async with asyncio.timeout(PATIENCE_S):
        await call.read()
        await served.odd.waiting.wait()
        call.cancel()
        await served.odd.closed.wait()
    assert (await served.observer.next())[1] is grpc.StatusCode.CANCELLED


async def test_a_deadline_is_told_from_a_cancellation(served: Served) -> None:
    code, error = await served.refusal("UnaryUnary", said("wait"), timeout=0.05)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert isinstance(error, errors.DeadlineExceededError)
    assert await served.observer.next() == ("/test.Odd/UnaryUnary", grpc.StatusCode.DEADLINE_EXCEEDED, "")


async def test_leaving_responses_half_read_ends_the_call(served: Served) -> None:
    messages = responses(served.start("UnaryStream", said("wait")))
    assert StringValue.FromString(await anext(messages)).value == "first"
    async with asyncio.timeout(PATIENCE_S):
        await served.odd.waiting.wait()
        await messages.aclose()  # type: ignore[attr-defined]
        await served.odd.closed.wait()


async def test_responses_raise_our_errors(served: Served) -> None:
    with pytest.raises(errors.UnknownModelError):
        async for _ in responses(served.start("UnaryStream", said("unknown model"))):
            pass


async def test_a_block_left_by_an_error_ends_its_call(served: Served) -> None:
    async def left_by_an_error() -> None:
        with cancelled_after(served.start("UnaryStream", said("wait"))) as call:
            await call.read()
            await served.odd.waiting.wait()
            raise KeyError

    with pytest.raises(KeyError):
        await left_by_an_error()
    async with asyncio.timeout(PATIENCE_S):
        await served.odd.closed.wait()
