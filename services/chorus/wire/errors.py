"""The one table between the error tree and gRPC statuses, in both directions.

A status carries `google.rpc.ErrorInfo` (reason, domain `chorus`, metadata), with RetryInfo where waiting helps,
QuotaFailure where a quota is used up and BadRequest where a field is to blame, so that a program in any language can
branch on the reason, and ours gets its class back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from chorus.core import errors
from chorus.core.errors import ChorusError
from chorus.wire.unreachable import explain_unreachable

DOMAIN = "chorus"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID = "request_id"  # in ErrorInfo's metadata

# A status travels in HTTP/2 trailers, of which peers accept 8 KiB in all: the message twice (once percent-encoded, up
# to three times as long) and the metadata must fit.
_MESSAGE_MAX_BYTES = 1500
_METADATA_MAX_BYTES = 1000

CODES: Mapping[type[ChorusError], grpc.StatusCode] = {
    ChorusError: grpc.StatusCode.INTERNAL,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.MalformedMessageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.PromptTooLongError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownModelError: grpc.StatusCode.NOT_FOUND,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.UnknownLeaseError: grpc.StatusCode.NOT_FOUND,
    errors.UnsupportedFeatureError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StaleIncarnationError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NoCapableRunnerError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RunnersUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SlowReaderError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.BudgetExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DrainingError: grpc.StatusCode.UNAVAILABLE,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.ModelFileError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OutOfMemoryError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DownloadError: grpc.StatusCode.UNAVAILABLE,
    errors.EngineError: grpc.StatusCode.UNAVAILABLE,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.RevokedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.ApiKeyError: grpc.StatusCode.UNAUTHENTICATED,
    errors.ApiKeyExpiredError: grpc.StatusCode.UNAUTHENTICATED,
    errors.ApiKeyRevokedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.BearerTokenError: grpc.StatusCode.UNAUTHENTICATED,
    errors.QuotaExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.TokenInvalidError: grpc.StatusCode.UNAUTHENTICATED,
    errors.TokenUsedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.TokenExpiredError: grpc.StatusCode.UNAUTHENTICATED,
    errors.TokenRevokedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.TokenNodeError: grpc.StatusCode.UNAUTHENTICATED,
    errors.RenewalError: grpc.StatusCode.UNAUTHENTICATED,
    errors.NameTakenError: grpc.StatusCode.ALREADY_EXISTS,
    errors.NodeTakenError: grpc.StatusCode.ALREADY_EXISTS,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.TicketError: grpc.StatusCode.PERMISSION_DENIED,
    errors.TicketRequiredError: grpc.StatusCode.PERMISSION_DENIED,
    errors.TicketGrantorError: grpc.StatusCode.PERMISSION_DENIED,
    errors.TicketCallerError: grpc.StatusCode.PERMISSION_DENIED,
    errors.TicketRequestError: grpc.StatusCode.PERMISSION_DENIED,
    # Another ticket will do.
    errors.TicketRunnerError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TicketExpiredError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TicketUsedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CancelledError: grpc.StatusCode.CANCELLED,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CertificateError: grpc.StatusCode.FAILED_PRECONDITION,
}
"""The status of every class. A class that is not in it has that of its nearest base that is."""

# What a status without our ErrorInfo means: it comes from the library, a proxy, or another kind of server.
_CLASSES_BY_CODE: Mapping[grpc.StatusCode, type[ChorusError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedFeatureError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.UnsupportedFeatureError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.CANCELLED: errors.CancelledError,
}


class Status(NamedTuple):
    """What a failed call ends with; `details` is a serialised `google.rpc.Status`, for the trailer `DETAILS_KEY`."""

    code: grpc.StatusCode
    message: str
    details: bytes

    @property
    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """The trailing metadata to send."""
        return ((DETAILS_KEY, self.details),)


def code_of(error: ChorusError | type[ChorusError]) -> grpc.StatusCode:
    """Returns the status code of an error or of a class of the tree."""
    cls = error if isinstance(error, type) else type(error)
    return next(CODES[base] for base in cls.__mro__ if base in CODES)


def to_status(error: ChorusError, *, request_id: str = "") -> Status:
    """Returns the status that tells a caller of `error`, shortened where it would not fit into HTTP/2 trailers."""
    code = code_of(error)
    message = _shorten(error.message, _MESSAGE_MAX_BYTES)
    metadata = _bounded({**({REQUEST_ID: request_id} if request_id else {}), **error.metadata})
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(max(0, round(error.retry_after_s * 1e9)))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, errors.QuotaExceededError):
        failure = error_details_pb2.QuotaFailure()
        failure.violations.add(subject=error.metadata.get("quota", ""), description=_shorten(message, 300))
        status.details.add().Pack(failure)
    if field := error.metadata.get("field"):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_shorten(field, 200), description=_shorten(message.removeprefix(f"{field}: "), 300)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return Status(code, message, status.SerializeToString())


def from_rpc_error(error: grpc.RpcError, *, peer: str = "") -> ChorusError:
    """Returns the error that a failed call (of grpc or grpc.aio) tells of, to be raised `from error`.

    The class is that of ErrorInfo's reason; without one (the connection broke, a proxy answered) that of the code.
    `peer` says in the message who could not be reached. The metadata is the sender's, its request id included.
    """
    said = _call(error, "code")
    code = said if isinstance(said, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
    message = str(_call(error, "details") or "")
    status = _status_details(error)
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for detail in status.details if status is not None else ():
        try:
            if detail.Is(info.DESCRIPTOR) and not info.reason:
                detail.Unpack(info)
            elif detail.Is(retry.DESCRIPTOR):
                detail.Unpack(retry)
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:  # of a peer that is not ours; the code still says enough
            continue
    cls = _CLASSES_BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    if cls is not None:
        return _build(cls, message, dict(info.metadata), retry_after_s)
    cls = _CLASSES_BY_CODE.get(code, errors.InternalError)
    if code is grpc.StatusCode.UNAVAILABLE:
        message = explain_unreachable(message, peer)
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in message:
        # Said by the library on either side. It is about the message, not about load: waiting cannot help.
        cls, message = errors.InvalidRequestError, f"a message is larger than the mesh allows ({message})"
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"{peer or 'the peer'} does not have this RPC; it may be of another version ({message})"
    elif not message:
        message = f"{peer or 'the peer'} ended the call with {code.name}"
    return _build(cls, message, {"grpc_code": code.name}, retry_after_s)


def error_of_reason(reason: str, message: str) -> ChorusError:
    """Returns the error that a reason of ErrorInfo stands for; one that this version doesn't know is InternalError."""
    return _build(_CLASSES_BY_REASON.get(reason, errors.InternalError), message, {}, None)


def _build(
    cls: type[ChorusError], message: str, metadata: Mapping[str, str], retry_after_s: float | None
) -> ChorusError:
    # Constructors of subclasses make the message out of facts; here it exists already.
    error = cls.__new__(cls)
    ChorusError.__init__(error, message, metadata=metadata, retry_after_s=retry_after_s)
    if isinstance(error, errors.PromptTooLongError):
        error.prompt_tokens = _count(metadata.get("prompt_tokens"))
        error.context_length = _count(metadata.get("context_length"))
    return error


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0


def _call(error: grpc.RpcError, name: str) -> object:
    # A grpc.RpcError that a call raises is a grpc.Call too, which the base class does not say.
    method = getattr(error, name, None)
    return method() if callable(method) else None


def _status_details(error: grpc.RpcError) -> status_pb2.Status | None:
    trailers = _call(error, "trailing_metadata")
    for key, value in trailers or ():  # type: ignore[attr-defined]
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _bounded(metadata: Mapping[str, str]) -> dict[str, str]:
    bounded: dict[str, str] = {}
    left = _METADATA_MAX_BYTES
    for key, value in metadata.items():
        kept = _shorten(str(value), 300)
        left -= len(key.encode()) + len(kept.encode())
        if left < 0:
            break
        bounded[key] = kept
    return bounded


def _shorten(text: str, limit: int) -> str:
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit:
        return raw.decode("utf-8")
    return raw[: limit - 3].decode("utf-8", "ignore") + "…"


def _tree(cls: type[ChorusError]) -> Iterator[type[ChorusError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _tree(sub)


# The tree's own classes only: another module's subclass keeps its base's reason, and must not take its place.
_CLASSES_BY_REASON: Mapping[str, type[ChorusError]] = {
    cls.reason: cls for cls in _tree(ChorusError) if cls.__module__ == errors.__name__ and cls is not ChorusError
}
