"""The way to one coordinator: dialled when it is first needed, and asked whether it serves again after it failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chorus.api.coordinator.v1 import coordinator_pb2_grpc
from chorus.config import Endpoint
from chorus.core.identity import Role, SpiffeId
from chorus.transport import TlsIdentity, open_channel
from chorus.transport.bearer import Bearer
from chorus.transport.channel import open_channel_with_key
from chorus.transport.guarding import QUESTION_TIMEOUT_S, Question
from chorus.transport.renewing import is_shut_out

_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class CoordinatorChannel:
    """One coordinator, at a place in the client's list; `on_failed` and `on_recovered` are called with that place."""

    def __init__(
        self,
        place: int,
        endpoint: Endpoint,
        *,
        identity: TlsIdentity | Bearer | None,
        insecure_loopback: bool,
        on_failed: Callable[[int], None],
        on_recovered: Callable[[int], None],
    ) -> None:
        self.place = place
        self.endpoint = endpoint
        self._identity = identity
        self._insecure_loopback = insecure_loopback
        self._on_failed = on_failed
        self._on_recovered = on_recovered
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._health: Any = None
        self._question: Question | None = None
        self._recovering: asyncio.Task[None] | None = None

    @property
    def called(self) -> str:
        """Who this leads to, in words."""
        return f"the coordinator {self.endpoint}"

    def method(self, name: str) -> Callable[..., Any]:
        """An RPC of its service. Raises ConfigError where it can't be dialled."""
        if self._channel is None:
            self._open()
        method: Callable[..., Any] = getattr(self._stub, name)
        return method

    @property
    def is_shut_out(self) -> bool:
        """Whether it was revoked."""
        return self._channel is not None and is_shut_out(self._channel)

    def ask(self) -> asyncio.Task[bool]:
        """Asks whether it lives, once for all who ask meanwhile; the result is whether it said anything."""
        assert self._question is not None, "who asks has made a call"
        return self._question.ask()

    def suspect(self) -> None:
        """It is silent, cannot be reached, breaks calls off, or stops: others come first until it serves again."""
        self._on_failed(self.place)
        if self._channel is not None and (self._recovering is None or self._recovering.done()):
            self._recovering = asyncio.create_task(self._recover())

    async def close(self) -> None:
        """Ends its calls and closes it."""
        if self._recovering is not None:
            self._recovering.cancel()
            await asyncio.wait({self._recovering})
        if self._question is not None:
            await self._question.close()
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def _open(self) -> None:
        self._channel = self._dialled()
        self._stub = coordinator_pb2_grpc.CoordinatorStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._question = Question(self._health.Check, health_pb2.HealthCheckRequest())

    def _dialled(self) -> grpc.aio.Channel:
        name, identity = self.endpoint.name or "coordinator", self._identity
        if isinstance(identity, Bearer):
            server = SpiffeId(identity.trust_domain, Role.COORDINATOR, name)
            return open_channel_with_key(self.endpoint.authority, bearer=identity, server=server)
        return open_channel(
            self.endpoint.authority,
            identity=identity,
            server=SpiffeId(identity.spiffe_id.trust_domain, Role.COORDINATOR, name) if identity is not None else "",
            insecure_loopback=self._insecure_loopback,
        )

    async def _recover(self) -> None:
        pause_s = _PAUSE_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            try:
                answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=QUESTION_TIMEOUT_S)
            except grpc.RpcError:
                continue
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return self._on_recovered(self.place)
