"""Dialling a peer: always over mutual TLS, always pinned to the one identity that is meant."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
import grpc.aio

from chorus.config.address import ListenAddress
from chorus.core.errors import ConfigError
from chorus.core.identity import SpiffeId
from chorus.transport.bearer import Bearer
from chorus.transport.options import Options, client_options
from chorus.transport.renewing import RenewingChannel
from chorus.transport.tls import TlsIdentity

_NOBODY = "unix:/revoked/by/an/admin/of/the/mesh"
"""Where nobody listens: calls to who was revoked fail as those to who is down, so that they are tried elsewhere."""


def open_channel(
    address: str,
    *,
    identity: TlsIdentity | None,
    server: SpiffeId | str = "",
    insecure_loopback: bool = False,
    options: Iterable[tuple[str, str | int]] = (),
) -> grpc.aio.Channel:
    """Returns a channel to `address` (`host:port`) for this event loop; it connects when it is first used.

    `server` is who must answer there (its SPIFFE id, or its pinned DNS name): anybody else is refused in the handshake.
    It follows the identity: see `RenewingChannel`.
    Without an identity the channel is plaintext, which is allowed for loopback addresses alone, and only if
    `insecure_loopback` says so; `server` is ignored then. Raises ConfigError for a bad address or a plaintext one.
    """
    name, complete = _prepare(address, identity, server, insecure_loopback, options)
    if identity is None:
        return grpc.aio.insecure_channel(address, options=complete)
    return RenewingChannel(
        identity,
        name,
        lambda: grpc.aio.secure_channel(address, identity.channel_credentials(), options=complete),
        lambda: grpc.aio.insecure_channel(_NOBODY, options=complete),
    )


def open_channel_with_key(address: str, *, bearer: Bearer, server: SpiffeId) -> grpc.aio.Channel:
    """Returns a channel that shows a key in place of a certificate; `server` alone may answer there."""
    options = client_options((("grpc.ssl_target_name_override", server.dns_name),))
    return grpc.aio.secure_channel(address, bearer.credentials(), options=options)


def open_sync_channel(
    address: str,
    *,
    identity: TlsIdentity | None,
    server: SpiffeId | str = "",
    insecure_loopback: bool = False,
    options: Iterable[tuple[str, str | int]] = (),
) -> grpc.Channel:
    """The same as `open_channel`, for code without an event loop; it keeps the certificate that it began with."""
    _, complete = _prepare(address, identity, server, insecure_loopback, options)
    if identity is None:
        return grpc.insecure_channel(address, options=complete)
    return grpc.secure_channel(address, identity.channel_credentials(), options=complete)


def open_channel_to_join(address: str, *, ca_pem: bytes, server: SpiffeId) -> grpc.aio.Channel:
    """Returns a channel on which this side shows no certificate; `server` must answer there, signed by `ca_pem`."""
    options = client_options((("grpc.ssl_target_name_override", server.dns_name),))
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca_pem), options=options)


def _prepare(
    address: str,
    identity: TlsIdentity | None,
    server: SpiffeId | str,
    insecure_loopback: bool,
    options: Iterable[tuple[str, str | int]],
) -> tuple[str, Options]:
    """The name that is pinned (none for plaintext), and all options."""
    if parse_address(address).port == 0:
        raise ConfigError(f"cannot dial {address!r}: port 0 only asks for a free one when listening")
    if identity is None:
        check_insecure(address, insecure_loopback)
        return "", client_options(options)
    name = server.dns_name if isinstance(server, SpiffeId) else server
    if not name:
        raise ConfigError(f"cannot dial {address}: say who must answer there, or anybody with a certificate could")
    # Last, so that no option of the caller's can undo the pin.
    pin = (("grpc.ssl_target_name_override", name),)
    return name, client_options((*options, *pin))


def parse_address(address: str) -> ListenAddress:
    """Returns `host:port` in its parts. Raises ConfigError where it is none."""
    try:
        return ListenAddress.parse(address)
    except ValueError as error:
        raise ConfigError(f"{address!r} is not an address: {error}") from None


def check_insecure(address: str, insecure_loopback: bool) -> None:
    """Raises ConfigError unless plaintext at `address` was asked for and stays within this machine."""
    if not insecure_loopback:
        raise ConfigError(f"{address} needs a certificate: make one with `chorus certs issue`")
    if not parse_address(address).is_loopback:
        raise ConfigError(
            f"{address} is not a loopback address; without certificates Chorus talks within this machine only"
        )
