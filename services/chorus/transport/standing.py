"""Whom a listener believes, and until when: holders of certificates, or whoever else shows something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from chorus.core.errors import ChorusError, DrainingError, RevokedError
from chorus.transport.peer import Peer, authenticate
from chorus.transport.tls import TlsIdentity


class Standing(Protocol):
    """How callers of a listener stand. Times are seconds since 1970."""

    async def authenticate(self, context: Any, now: float) -> Peer:
        """Who calls. Raises UnauthenticatedErrors, and UnavailableError where that can't be found out now."""

    def check(self, peer: Peer) -> None:
        """Raises an UnauthenticatedError where somebody who was believed is not any more."""

    def expired(self, peer: Peer) -> ChorusError:
        """What ends the calls of somebody whose time is over."""

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` when it should look at everybody again, until what is returned is called."""


class CertificateStanding:
    """Holders of certificates of the mesh of `identity`, which hears of revocations."""

    def __init__(self, identity: TlsIdentity) -> None:
        self._identity = identity

    async def authenticate(self, context: Any, now: float) -> Peer:
        """Who the certificate of the connection names. Raises UnauthenticatedError, RevokedError."""
        peer = authenticate(context, self._identity.spiffe_id.trust_domain, now)
        self.check(peer)
        return peer

    def check(self, peer: Peer) -> None:
        """Raises RevokedError where the caller is shut out."""
        revocation = self._identity.revoked.of(peer.spiffe_id, peer.serial)
        if revocation is not None:
            why = f" ({revocation.why})" if revocation.why else ""
            what = "the certificate of " if revocation.serials else ""
            raise RevokedError(
                f"{what}{peer.spiffe_id} was revoked{why}; an admin of the mesh can let it join again",
                metadata={"caller": str(peer.spiffe_id)},
            )

    def expired(self, peer: Peer) -> ChorusError:
        """Who renews in time has a newer connection by now, so the caller may well go on."""
        return DrainingError(
            f"the certificate of {peer.spiffe_id} has expired since this connection was made; "
            "go on over a new connection"
        )

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` when somebody was revoked."""
        return self._identity.on_change(listener)
