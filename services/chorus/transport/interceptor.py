"""What every RPC of every server passes through, whoever wrote its servicer.

In this order: the call gets its request id, the caller is authenticated, then authorised by the one table, then the
request is decoded, then the servicer works; whatever is raised on the way becomes a status by the one error table.
Handlers are replaced by ones that take and give raw bytes, so that decoding and encoding happen in here as well. A
servicer that answers with `bytes` has them sent as they are.

Servicers are asynchronous: coroutine functions, and async generator functions for streams of responses (or coroutine
functions that give bytes to `context.write`). Requests of a stream come as an async iterator; `context.read` is not for
them.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from chorus.core.errors import (
    ChorusError,
    InternalError,
    MalformedMessageError,
    PermissionDeniedError,
    SlowReaderError,
    UnauthenticatedError,
)
from chorus.core.identity import AccessTable, authorize
from chorus.telemetry import context as request_context
from chorus.telemetry.logs import get_logger
from chorus.transport.guarding import is_being_cancelled
from chorus.transport.open_calls import OpenCalls
from chorus.transport.peer import Peer, set_caller
from chorus.transport.slow_readers import SlowReaders
from chorus.wire.errors import to_status

UNKNOWN_METHOD = "unknown"
"""What observers are told instead of a method's name that a caller made up."""

_UNREAD_S = 1.0

Context = Any  # grpc.aio.ServicerContext; its stubs know nothing of messages that are raw bytes
Body = Callable[[Any, Context], Awaitable[Any]]

_log = get_logger()


class CallObserver(Protocol):
    """Is told of every call; both methods must be quick and must not raise."""

    def call_started(self, method: str) -> None:
        """A call of `method` (full name, or `unknown`) has arrived."""

    def call_finished(self, method: str, code: grpc.StatusCode, reason: str, seconds: float) -> None:
        """It has ended; `reason` is the error's (`UNKNOWN_MODEL`), or empty."""


class _Silent:
    def call_started(self, method: str) -> None: ...

    def call_finished(self, method: str, code: grpc.StatusCode, reason: str, seconds: float) -> None: ...


class MeshInterceptor(grpc.aio.ServerInterceptor):
    """The one interceptor. Without open calls to look after (listeners to which nobody shows who they are) nobody is
    authenticated, and all is allowed."""

    def __init__(
        self,
        access: AccessTable,
        *,
        open_calls: OpenCalls | None,
        observer: CallObserver | None = None,
        slow_readers: SlowReaders | None = None,
    ) -> None:
        self._access = access
        self._open_calls = open_calls
        self._slow_readers = slow_readers if slow_readers is not None else SlowReaders()
        self._observer: CallObserver = observer if observer is not None else _Silent()
        self._replaced: dict[str, tuple[object, Any]] = {}
        self.calls_in_flight = 0

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Returns the handler that stands in for the servicer's own."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._unknown(method))
        known = self._replaced.get(method)
        if known is None or known[0] is not handler:
            known = self._replaced[method] = (handler, self._replace(method, handler))
        return known[1]

    def _replace(self, method: str, handler: Any) -> Any:
        decode = handler.request_deserializer or _as_is
        encode = handler.response_serializer or _as_is
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
            body = _streaming(behaviour, encode)
        else:
            behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
            body = _single(behaviour, encode)
        decoding = _decoding_each if handler.request_streaming else _decoding
        body = decoding(body, decode, method)

        async def replaced(request: Any, context: Context) -> Any:
            return await self._run(method, body, request, context)

        return _FACTORIES[handler.request_streaming, handler.response_streaming](
            replaced, request_deserializer=None, response_serializer=None
        )

    def _unknown(self, method: str) -> Body:
        async def body(_: Any, context: Context) -> None:
            services = sorted({known.split("/")[1] for known in self._access})
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"there is no RPC {method[:200]} here, only those of {', '.join(services)}",
            )

        async def unknown(request: Any, context: Context) -> None:
            await self._run(method, body, request, context, known=False)

        return unknown

    async def _run(self, method: str, body: Body, request: Any, context: Context, *, known: bool = True) -> Any:
        started = time.monotonic()
        label = method if known else UNKNOWN_METHOD
        # Every call has a task, so context variables set here are its own and need no resetting.
        ids = request_context.accept(context.invocation_metadata())
        request_context.bind(ids)
        context = self._slow_readers.watched(context)
        code, reason = grpc.StatusCode.OK, ""
        peer: Peer | None = None
        self.calls_in_flight += 1
        self._observer.call_started(label)
        try:
            try:
                peer = await self._admit(method, context, known)
                response = await body(request, context)
            except grpc.aio.AbortError:
                code = context.code() or grpc.StatusCode.UNKNOWN
                raise
            except grpc.aio.InternalError:
                # A message could not be sent: the caller is gone, and its cancellation is on the way here.
                code = _how_cancelled(context)
                raise asyncio.CancelledError from None
            except asyncio.CancelledError:
                shut_out = self._shut_out(method, peer) or self._slow_readers.why_ended()
                if shut_out is None and is_being_cancelled():
                    code = _how_cancelled(context)
                    raise
                failure: ChorusError = shut_out or self._internal(method, ids.request_id)
            except ChorusError as error:
                failure = error
            except Exception as error:
                failure = _only_leaf(error) or self._internal(method, ids.request_id)
            else:
                code = context.code() or grpc.StatusCode.OK
                return response
            code, reason = to_status(failure).code, failure.reason
            await _fail(method, failure, ids.request_id, context)
        finally:
            self._slow_readers.ended()
            if peer is not None and self._open_calls is not None:
                self._open_calls.ended(peer)
            self.calls_in_flight -= 1
            self._observer.call_finished(label, code, reason, time.monotonic() - started)

    async def _admit(self, method: str, context: Context, known: bool) -> Peer | None:
        if self._open_calls is None:
            return None
        peer: Peer | None = None
        try:
            peer = await self._open_calls.standing.authenticate(context, self._open_calls.now)
            set_caller(peer)
            if known:
                authorize(self._access, method, peer.spiffe_id)
        except (UnauthenticatedError, PermissionDeniedError) as error:
            _log.warning(
                "call.refused",
                method=method[:200],
                peer=context.peer(),
                caller=str(peer.spiffe_id) if peer else None,
                reason=error.reason,
                why=error.message,
            )
            raise
        self._open_calls.began(peer)
        return peer

    def _shut_out(self, method: str, peer: Peer | None) -> ChorusError | None:
        """Why this call was cancelled by us, where it was."""
        if peer is None or self._open_calls is None:
            return None
        error = self._open_calls.why_ended()
        if error is not None:
            _log.warning("call.shut_out", method=method, caller=str(peer.spiffe_id), reason=error.reason)
        return error

    def _internal(self, method: str, request_id: str) -> InternalError:
        _log.exception("call.failed", method=method, reason=InternalError.reason)
        return InternalError(f"internal error; request id {request_id}")


async def _fail(method: str, error: ChorusError, request_id: str, context: Context) -> NoReturn:
    status = to_status(error, request_id=request_id)
    _log.debug("call.ended", method=method, code=status.code.name, reason=error.reason, why=status.message)
    try:
        # The status goes out behind what waits for the caller, who may never read it.
        async with asyncio.timeout(_UNREAD_S if isinstance(error, SlowReaderError) else None):
            await context.abort(status.code, status.message, status.trailers)
    except TimeoutError:
        raise grpc.aio.AbortError from None
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None  # nobody is there to be told
    raise AssertionError("abort() returned")  # pragma: no cover


def _single(behaviour: Any, encode: Callable[[Any], bytes]) -> Body:
    async def body(request: Any, context: Context) -> bytes:
        response = await behaviour(request, context)
        return response if type(response) is bytes else encode(response)

    return body


def _streaming(behaviour: Any, encode: Callable[[Any], bytes]) -> Body:
    if inspect.iscoroutinefunction(behaviour):
        return behaviour  # type: ignore[no-any-return]  # it writes by itself

    async def body(request: Any, context: Context) -> None:
        write = context.write
        responses = behaviour(request, context)
        try:
            async for response in responses:
                await write(response if type(response) is bytes else encode(response))
        finally:
            # Now, not when the garbage collector finds it: what the generator holds (a slot of an engine) is freed
            # here.
            await responses.aclose()

    return body


def _decoding(body: Body, decode: Callable[[bytes], Any], method: str) -> Body:
    # No coroutine of its own: each that a call waits in is passed through with every message of its stream.
    def decoded(request: bytes, context: Context) -> Awaitable[Any]:
        return body(_decode(decode, request, method), context)

    return decoded


def _decoding_each(body: Body, decode: Callable[[bytes], Any], method: str) -> Body:
    async def messages(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for request in requests:
            yield _decode(decode, request, method)

    async def decoded(requests: AsyncIterator[bytes], context: Context) -> Any:
        return await body(messages(requests), context)

    return decoded


def _decode(decode: Callable[[bytes], Any], request: bytes, method: str) -> Any:
    try:
        return decode(request)
    except Exception as error:
        raise MalformedMessageError(
            f"the {len(request)} bytes sent to {method} are not a message of its request's type",
            metadata={"method": method},
        ) from error


def _as_is(message: Any) -> Any:
    return message


def _only_leaf(error: Exception) -> ChorusError | None:
    """Returns the one error of ours in a task group's collection, if there is just that one in it."""
    leaf: BaseException = error
    while isinstance(leaf, BaseExceptionGroup) and len(leaf.exceptions) == 1:
        leaf = leaf.exceptions[0]
    return leaf if isinstance(leaf, ChorusError) else None


def _how_cancelled(context: Context) -> grpc.StatusCode:
    left = context.time_remaining()
    return grpc.StatusCode.DEADLINE_EXCEEDED if left is not None and left <= 0 else grpc.StatusCode.CANCELLED


_FACTORIES: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
