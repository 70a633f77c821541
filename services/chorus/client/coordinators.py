"""The coordinators that a client knows: one is asked, and the next one where it cannot be reached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from chorus.api.coordinator.v1 import coordinator_pb2_grpc
from chorus.config import Endpoint
from chorus.core.errors import ChorusError, ConfigError, DeadlineExceededError, DrainingError, UnavailableError
from chorus.core.identity import Role, SpiffeId
from chorus.telemetry import context
from chorus.transport import TlsIdentity, open_channel
from chorus.wire.errors import from_rpc_error

_CLOSED = "this client is closed"


@dataclass(slots=True)
class _Coordinator:
    """One of them, dialled when it is first asked."""

    endpoint: Endpoint
    channel: grpc.aio.Channel | None = None
    stub: Any = None


class Coordinators:
    """Calls to whichever coordinator answers. The one that answered last is asked first."""

    def __init__(
        self, endpoints: Sequence[Endpoint], *, identity: TlsIdentity | None, insecure_loopback: bool, timeout_s: float
    ) -> None:
        if not endpoints:
            raise ConfigError("a client needs the address of a coordinator (client.coordinators)")
        self._coordinators = [_Coordinator(endpoint.named("coordinator")) for endpoint in endpoints]
        self._identity = identity
        self._insecure_loopback = insecure_loopback
        self._timeout_s = timeout_s
        self._last_good = 0
        self._closed = False

    async def single(self, name: str, request: Any) -> Any:
        """The answer of a unary RPC. Raises ChorusErrors, UnavailableError where no coordinator can be reached."""
        metadata = self._metadata()
        problems: list[ChorusError] = []
        for index in self._order():
            try:
                answer = await self._method(index, name)(request, timeout=self._timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                problems.append(self._error(index, error, self._timeout_s))
                if not _may_try_next(problems[-1]):
                    raise problems[-1] from error
            except asyncio.CancelledError:
                self._raise_if_closed()
                raise
            else:
                self._last_good = index
                return answer
        raise self._nobody(problems)

    async def stream(self, name: str, request: Any, timeout_s: float | None) -> AsyncGenerator[Any]:
        """The messages of a streaming RPC; the next coordinator is asked only while nothing has come.

        `timeout_s` None: no deadline. Closing it ends the call. Raises as `single`.
        """
        metadata = self._metadata()
        problems: list[ChorusError] = []
        for index in self._order():
            call = self._method(index, name)(request, timeout=timeout_s, metadata=metadata)
            begun = False
            try:
                async for message in call:
                    if not begun:
                        begun, self._last_good = True, index
                    yield message
            except grpc.RpcError as error:
                problems.append(self._error(index, error, timeout_s))
                if begun or not _may_try_next(problems[-1]):
                    raise problems[-1] from error
            except asyncio.CancelledError:
                self._raise_if_closed()
                raise
            else:
                return
            finally:
                call.cancel()
        raise self._nobody(problems)

    async def close(self) -> None:
        """Ends every call and closes every channel."""
        self._closed = True
        for coordinator in self._coordinators:
            if coordinator.channel is not None:
                await coordinator.channel.close()
                coordinator.channel = coordinator.stub = None

    def _order(self) -> list[int]:
        count = len(self._coordinators)
        return [(self._last_good + offset) % count for offset in range(count)]

    def _method(self, index: int, name: str) -> Callable[..., Any]:
        if self._closed:
            raise UnavailableError(_CLOSED)
        coordinator = self._coordinators[index]
        if coordinator.channel is None:
            server: SpiffeId | str = ""
            if self._identity is not None:
                domain = self._identity.spiffe_id.trust_domain
                server = SpiffeId(domain, Role.COORDINATOR, coordinator.endpoint.name or "coordinator")
            coordinator.channel = open_channel(
                coordinator.endpoint.authority,
                identity=self._identity,
                server=server,
                insecure_loopback=self._insecure_loopback,
            )
            coordinator.stub = coordinator_pb2_grpc.CoordinatorStub(coordinator.channel)
        method: Callable[..., Any] = getattr(coordinator.stub, name)
        return method

    def _raise_if_closed(self) -> None:
        """Where a call was cancelled because its channel was closed, its caller was not, and must not think so."""
        task = asyncio.current_task()
        if self._closed and (task is None or not task.cancelling()):
            raise UnavailableError(_CLOSED) from None

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """The ids of the request that this call is part of, or of a new one."""
        with context.bound(context.current() or context.new_context()):
            return context.outgoing_metadata()

    def _error(self, index: int, error: grpc.RpcError, timeout_s: float | None) -> ChorusError:
        failure = from_rpc_error(error, peer=f"the coordinator {self._coordinators[index].endpoint}")
        if isinstance(failure, DeadlineExceededError) and timeout_s is not None and "grpc_code" in failure.metadata:
            return DeadlineExceededError(
                f"it took longer than the {timeout_s:g} s that it was given; client.timeout_s gives it more",
                metadata=failure.metadata,
            )
        return failure

    def _nobody(self, problems: list[ChorusError]) -> ChorusError:
        if len(problems) == 1 and isinstance(problems[0], DrainingError):
            return problems[0]
        told = "; ".join(dict.fromkeys(problem.message for problem in problems))
        return UnavailableError(
            f"no coordinator answers: {told}. Is the mesh up? `chorus up` starts one on this machine, "
            "`chorus status` shows it"
        )


def _may_try_next(error: ChorusError) -> bool:
    """Whether the coordinator itself is the trouble; an error that it passes on is the mesh's answer."""
    # Only gRPC's own word of a broken connection has the code in it.
    unreachable = isinstance(error, UnavailableError) and "grpc_code" in error.metadata
    return unreachable or (isinstance(error, DrainingError) and "runner_id" not in error.metadata)
