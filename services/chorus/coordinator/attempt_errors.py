"""An attempt's error as one of the request: what is between coordinator and runner is no fault of callers."""

from __future__ import annotations

import grpc

from chorus.core.errors import (
    CancelledError,
    ChorusError,
    DeadlineExceededError,
    InternalError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from chorus.core.placement import Candidate
from chorus.core.resilience.retries import LOST
from chorus.wire.errors import from_rpc_error


def of_runner(error: grpc.RpcError, candidate: Candidate) -> ChorusError:
    """A runner's error as one of this request. What is between coordinator and runner is no fault of the caller's."""
    failure = from_rpc_error(error, peer=f"the runner {candidate.runner_id}")
    if isinstance(failure, UnauthenticatedError | PermissionDeniedError):
        return UnavailableError(f"the runner {candidate.runner_id} refuses this coordinator: {failure.message}")
    if isinstance(failure, CancelledError):
        return broken_off(candidate)
    if isinstance(failure, DeadlineExceededError) and "grpc_code" in failure.metadata:
        return DeadlineExceededError(f"the request's deadline passed while the runner {candidate.runner_id} had it")
    if isinstance(failure, InternalError) and "grpc_code" in failure.metadata:
        # Without ErrorInfo it is the transport's word, as when a proxy resets a stream, and no defect of the runner.
        failure = UnavailableError(f"the call to the runner {candidate.runner_id} was broken off: {failure.message}")
    elif not (isinstance(failure, UnavailableError) and "grpc_code" in failure.metadata):
        return failure
    return _lost(failure)


def broken_off(candidate: Candidate) -> ChorusError:
    return _lost(UnavailableError(f"the call to the runner {candidate.runner_id} was broken off"))


def _lost(error: ChorusError) -> ChorusError:
    """The same, as the word of nobody: the runner itself did not say it."""
    error.metadata = {**error.metadata, LOST: "true"}
    return error
