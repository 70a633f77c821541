"""The ways to runners that a client streams from itself: dialled when a ticket leads there, kept for the next."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import grpc
import grpc.aio

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.runner.v1 import runner_pb2, runner_pb2_grpc
from chorus.core.errors import UnavailableError
from chorus.core.identity import Role, SpiffeId
from chorus.transport import TlsIdentity, open_channel
from chorus.transport.guarding import Question
from chorus.transport.renewing import is_shut_out

# Idle connections cost a runner little, but a client may live long and meet many.
_MOST = 32
_Connectivity = grpc.ChannelConnectivity


class RunnerChannel:
    """The way to one incarnation of a runner, which must prove to be that runner."""

    def __init__(self, runner_id: str, address: str, identity: TlsIdentity) -> None:
        self.runner_id = runner_id
        self.address = address
        server = SpiffeId(identity.spiffe_id.trust_domain, Role.RUNNER, runner_id)
        self._channel = open_channel(address, identity=identity, server=server)
        stub: Any = runner_pb2_grpc.ModelRunnerStub(self._channel)
        self.generate: Any = stub.Generate
        self._question = Question(stub.GetNode, runner_pb2.GetNodeRequest())
        self.uses = 0

    @property
    def called(self) -> str:
        """Who this leads to, in words."""
        return f"the runner {self.runner_id}"

    @property
    def is_shut_out(self) -> bool:
        """Whether it was revoked."""
        return is_shut_out(self._channel)

    def ask(self) -> asyncio.Task[bool]:
        """Asks whether it lives, once for all who ask meanwhile; the result is whether it said anything."""
        return self._question.ask()

    def suspect(self) -> None:
        """It is silent; the coordinator, which places the next request, finds that out by itself."""

    async def connected(self, timeout_s: float) -> None:
        """Returns once there is a connection. Raises UnavailableError where there can't be one, or not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while (state := self._channel.get_state(try_to_connect=True)) is not _Connectivity.READY:
                    if state in (_Connectivity.TRANSIENT_FAILURE, _Connectivity.SHUTDOWN):
                        raise UnavailableError(f"{self.called} can't be reached from here at {self.address}")
                    await self._channel.wait_for_state_change(state)
        except TimeoutError:
            raise UnavailableError(
                f"{self.called} can't be reached from here at {self.address} within {timeout_s:g} s"
            ) from None

    async def close(self) -> None:
        """Ends its calls and closes it."""
        await self._question.close()
        await self._channel.close()


class RunnerChannels:
    """The channels of one client, the one used last being the last to go."""

    def __init__(self, identity: TlsIdentity) -> None:
        self._identity = identity
        self._channels: OrderedDict[tuple[str, int, str], RunnerChannel] = OrderedDict()

    async def to(self, placed: coordinator_pb2.PlaceResponse) -> RunnerChannel:
        """The channel to where a request was placed. Raises ConfigError where that is no address."""
        key = (placed.runner_id, placed.incarnation, placed.address)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = RunnerChannel(placed.runner_id, placed.address, self._identity)
            await self._let_go()
        self._channels.move_to_end(key)
        return channel

    async def close(self) -> None:
        """Closes every channel."""
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))

    async def _let_go(self) -> None:
        """Closes those that are too many, but for such as are in use, the one used longest ago first."""
        idle = [key for key, channel in self._channels.items() if not channel.uses]
        for key in idle[: max(0, len(self._channels) - _MOST)]:
            await self._channels.pop(key).close()
