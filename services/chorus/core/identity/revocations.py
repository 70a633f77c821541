"""Who is not to be believed any more, whatever their certificates say: what every service checks of each call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from chorus.core.identity.spiffe import SpiffeId


@dataclass(frozen=True, slots=True)
class Revocation:
    """One decision of an admin. Without `serials` the identity is shut out; with some, these certificates of it alone.

    Times are seconds since 1970; after `until` nothing that it is about can be valid.
    """

    identity: SpiffeId
    revoked_at: float
    until: float
    why: str = ""
    serials: frozenset[int] = frozenset()


class Revocations:
    """Everything that is revoked, at one `revision` of the list. Immutable."""

    def __init__(self, entries: Iterable[Revocation] = (), *, revision: int = 0) -> None:
        self.entries = tuple(entries)
        self.revision = revision
        whole = [entry for entry in self.entries if not entry.serials]
        self._identities = {entry.identity: entry for entry in whole}
        self._names = {entry.identity.dns_name: entry for entry in whole}
        self._serials = {serial: entry for entry in self.entries for serial in entry.serials}

    def of(self, identity: SpiffeId, serial: int) -> Revocation | None:
        """What shuts out the holder of that certificate, if anything."""
        if not self.entries:
            return None
        return self._identities.get(identity) or self._serials.get(serial)

    def of_name(self, dns_name: str) -> Revocation | None:
        """What shuts out whoever is dialled by that name; a client of gRPC sees no more of a server's certificate."""
        return self._names.get(dns_name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Revocations) and (self.entries, self.revision) == (other.entries, other.revision)

    def __hash__(self) -> int:
        return hash((self.entries, self.revision))


NOTHING = Revocations()
