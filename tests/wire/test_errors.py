from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from chorus.core import errors
from chorus.core.errors import ChorusError
from chorus.wire.errors import CODES, DETAILS_KEY, code_of, from_rpc_error, to_status


def tree(cls: type[ChorusError] = ChorusError) -> Iterator[type[ChorusError]]:
    yield cls
    for sub in cls.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from tree(sub)


class FailedCall(grpc.RpcError):
    """What grpc raises, as far as the table looks at it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: object = ()) -> None:
        self._code, self._details, self._trailers = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> object:
        return self._trailers


def make(cls: type[ChorusError], message: str = "it broke", **kwargs: object) -> ChorusError:
    error = cls.__new__(cls)
    ChorusError.__init__(error, message, **kwargs)  # type: ignore[arg-type]
    return error


@pytest.mark.parametrize("cls", list(tree()))
def test_every_class_has_a_status_of_its_own_and_comes_back_as_itself(cls: type[ChorusError]) -> None:
    assert cls in CODES
    error = make(cls, metadata={"model": "smollm2"}, retry_after_s=1.5)
    status = to_status(error, request_id="r-1")
    assert status.code is code_of(cls) is CODES[cls]
    assert status.code is not grpc.StatusCode.OK
    back = from_rpc_error(FailedCall(status.code, status.message, status.trailers))
    assert type(back) is (errors.InternalError if cls is ChorusError else cls)
    assert back.message == "it broke"
    assert back.metadata == {"request_id": "r-1", "model": "smollm2"}
    assert back.retry_after_s == 1.5


def test_no_two_classes_share_a_reason() -> None:
    classes = [cls for cls in tree() if cls is not ChorusError]
    assert len({cls.reason for cls in classes}) == len(classes)
    assert all(cls.reason.replace("_", "").isalpha() and cls.reason.isupper() for cls in classes)


def test_the_numbers_of_a_prompt_that_is_too_long_come_back() -> None:
    status = to_status(errors.PromptTooLongError(5000, 2048, model="smollm2"))
    back = from_rpc_error(FailedCall(status.code, status.message, status.trailers))
    assert isinstance(back, errors.PromptTooLongError)
    assert (back.prompt_tokens, back.context_length) == (5000, 2048)


def test_a_field_to_blame_is_named_as_google_names_it() -> None:
    status = to_status(errors.InvalidRequestError("spec.sampling.top_p", "is 3, over 1"))
    packed = status_pb2.Status.FromString(status.details).details
    bad_request = error_details_pb2.BadRequest()
    assert [detail.Unpack(bad_request) for detail in packed] == [False, True]
    assert bad_request.field_violations[0].field == "spec.sampling.top_p"
    assert bad_request.field_violations[0].description == "is 3, over 1"


def test_retry_info_is_there_only_where_waiting_helps() -> None:
    def has_retry_info(error: ChorusError) -> bool:
        packed = status_pb2.Status.FromString(to_status(error).details).details
        return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in packed)

    assert has_retry_info(errors.OverloadedError("full", retry_after_s=2))
    assert not has_retry_info(errors.OverloadedError("full"))


@given(st.text(), st.dictionaries(st.text(), st.text()), st.none() | st.floats(-10, 1e6))
def test_every_status_fits_into_trailers(message: str, metadata: dict[str, str], retry_after_s: float | None) -> None:
    error = make(errors.UnknownModelError, message, metadata=metadata, retry_after_s=retry_after_s)
    status = to_status(error, request_id="r")
    percent_encoded = sum(1 if 0x20 <= byte < 0x7F else 3 for byte in status.message.encode())
    assert percent_encoded + len(status.details) < 8000
    back = from_rpc_error(FailedCall(status.code, status.message, status.trailers))
    assert isinstance(back, errors.UnknownModelError)


def test_a_long_message_keeps_its_beginning() -> None:
    status = to_status(errors.UnknownModelError("there is no model x, only " + "é" * 5000))
    assert status.message.startswith("there is no model x")
    assert status.message.endswith("…")


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_a_status_without_our_details_becomes_an_error_all_the_same(code: grpc.StatusCode) -> None:
    error = from_rpc_error(FailedCall(code, "", None), peer="the runner laptop")
    assert error.metadata["grpc_code"] == code.name
    assert "the runner laptop" in error.message
    known = CODES[type(error)] is code
    assert known or code in {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
    }


def test_a_message_that_is_too_large_is_the_requests_fault() -> None:
    details = "SERVER: Received message larger than max (70000000 vs. 67108864)"
    error = from_rpc_error(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
    assert isinstance(error, errors.InvalidRequestError)


@given(st.binary(max_size=200))
def test_details_of_a_stranger_are_survived(details: bytes) -> None:
    error = from_rpc_error(FailedCall(grpc.StatusCode.NOT_FOUND, "no", ((DETAILS_KEY, details),)))
    assert isinstance(error, ChorusError)


def test_a_reason_of_another_domain_is_not_ours() -> None:
    info = error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="googleapis.com")
    status = status_pb2.Status(code=5)
    status.details.add().Pack(info)
    trailers = ((DETAILS_KEY, status.SerializeToString()),)
    assert isinstance(from_rpc_error(FailedCall(grpc.StatusCode.NOT_FOUND, "no", trailers)), errors.NotFoundError)
