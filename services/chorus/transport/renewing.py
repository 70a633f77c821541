"""A channel that follows its identity: calls begun after a renewal go over a connection with the new certificate.

gRPC's clients can't reload a certificate, so the channel beneath is made anew; the old one stays for the calls that
began on it. A server that was revoked is dialled no more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from chorus.telemetry.logs import get_logger
from chorus.transport.tls import TlsIdentity

_CONNECT_S = 10.0
"""How long a new connection may take before calls go to it all the same."""
_Connectivity = grpc.ChannelConnectivity

_log = get_logger()


class RenewingChannel(grpc.aio.Channel):
    """What `open_channel` returns for an identity. `dial` makes a channel with its certificate as it is then;
    `dial_nobody` one on which every call fails as where nobody listens."""

    def __init__(
        self,
        identity: TlsIdentity,
        server_name: str,
        dial: Callable[[], grpc.aio.Channel],
        dial_nobody: Callable[[], grpc.aio.Channel],
    ) -> None:
        self._identity = identity
        self._server_name = server_name
        self._dial = dial
        self._dial_nobody = dial_nobody
        self.is_shut_out = self._is_revoked()
        self._shown = identity.cert_pem, identity.ca_pem
        self.way = Way(dial_nobody() if self.is_shut_out else dial())
        self._old: set[Way] = set()
        self._changed = asyncio.Event()
        self._renewing: asyncio.Task[None] | None = None
        self._forget = identity.on_change(self._follow)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The state of the connection that new calls go over."""
        return self.way.channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Returns once the state is another one."""
        while True:
            way, changed = self.way, self._changed
            waits = [
                asyncio.ensure_future(way.channel.wait_for_state_change(last_observed_state)),
                asyncio.ensure_future(changed.wait()),
            ]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
                await asyncio.gather(*waits, return_exceptions=True)
            if self.way is way or self.get_state() is not last_observed_state:
                return

    async def channel_ready(self) -> None:
        """Returns once there is a connection."""
        while (state := self.get_state(try_to_connect=True)) is not _Connectivity.READY:
            await self.wait_for_state_change(state)

    async def close(self, grace: float | None = None) -> None:
        """Closes it; calls on it end, after `grace` seconds where that is given."""
        self._forget()
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
        await asyncio.gather(*(way.close(grace) for way in (self.way, *self._old)))

    async def __aenter__(self) -> RenewingChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        """An RPC of one request and one response."""
        return _Method(self, "unary_unary", arguments, named)

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        """An RPC of one request and a stream of responses."""
        return _Method(self, "unary_stream", arguments, named)

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        """An RPC of a stream of requests and one response."""
        return _Method(self, "stream_unary", arguments, named)

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        """An RPC of a stream of requests and one of responses."""
        return _Method(self, "stream_stream", arguments, named)

    def _is_revoked(self) -> bool:
        return self._identity.revoked.of_name(self._server_name) is not None

    def _follow(self) -> None:
        shut_out, shown = self._is_revoked(), (self._identity.cert_pem, self._identity.ca_pem)
        if shut_out != self.is_shut_out:
            self.is_shut_out, self._shown = shut_out, shown
            if shut_out:
                _log.warning("peer.revoked", server=self._server_name)
            self._go_over(Way(self._dial_nobody() if shut_out else self._dial()))
        elif shown != self._shown and not shut_out:
            self._shown = shown
            if self._renewing is not None:
                self._renewing.cancel()
            self._renewing = asyncio.get_running_loop().create_task(self._renew(), name="renew a channel")

    async def _renew(self) -> None:
        """Goes over to a new connection; once that stands, where the old one works, so that no call waits."""
        way = Way(self._dial())
        try:
            if self.way.channel.get_state() is _Connectivity.READY:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CONNECT_S):
                        await way.channel.channel_ready()
        except asyncio.CancelledError:
            await way.close(None)
            raise
        self._go_over(way)

    def _go_over(self, way: Way) -> None:
        old, self.way = self.way, way
        self._old = {kept for kept in self._old if not kept.is_closed} | {old}
        old.retire()
        self._changed.set()
        self._changed = asyncio.Event()


def is_shut_out(channel: grpc.aio.Channel) -> bool:
    """Whether who is dialled there was revoked."""
    return isinstance(channel, RenewingChannel) and channel.is_shut_out


class Way:
    """One channel beneath, and the calls on it; once retired it closes when the last of them has ended."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._calls = 0
        self._retired = False
        self._closing: asyncio.Task[None] | None = None

    @property
    def is_closed(self) -> bool:
        """Whether it was retired and is closed."""
        return self._closing is not None and self._closing.done()

    def began(self, call: Any) -> Any:
        """Notes a call, which is returned."""
        self._calls += 1
        call.add_done_callback(self._ended)
        return call

    def retire(self) -> None:
        """Closes it as soon as nothing goes on on it."""
        self._retired = True
        self._close_if_done()

    async def close(self, grace: float | None) -> None:
        """Closes it now."""
        if self._closing is not None:
            await asyncio.wait({self._closing})
        else:
            await self.channel.close(grace)

    def _ended(self, _: object) -> None:
        self._calls -= 1
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and self._calls == 0 and self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self.channel.close())


class _Method:
    """An RPC, over whichever way there is when it is called."""

    __slots__ = ("_arguments", "_kind", "_method", "_named", "_owner", "_way")

    def __init__(self, owner: RenewingChannel, kind: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._owner = owner
        self._kind = kind
        self._arguments = arguments
        self._named = named
        self._way: Way | None = None
        self._method: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        way = self._owner.way
        if way is not self._way:
            self._way = way
            self._method = getattr(way.channel, self._kind)(*self._arguments, **self._named)
        return way.began(self._method(*arguments, **named))
