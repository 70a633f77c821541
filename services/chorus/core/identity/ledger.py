"""What an identity service remembers: join tokens, who has joined with which key, and who was revoked.

Pure: every time is `now`, seconds since 1970. Secrets come as their SHA-256 (they are 256 random bits, so nothing
slower is needed), keys as the SHA-256 of their SubjectPublicKeyInfo. Whoever holds a ledger writes it down after each
method that changes it, before anybody is told.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from chorus.core.errors import (
    NameTakenError,
    NodeTakenError,
    NotFoundError,
    RenewalError,
    RevokedError,
    TokenExpiredError,
    TokenInvalidError,
    TokenNodeError,
    TokenRevokedError,
    TokenUsedError,
)
from chorus.core.identity.renewal import GRACE_S
from chorus.core.identity.revocations import Revocation, Revocations
from chorus.core.identity.rotation import Rotation
from chorus.core.identity.spiffe import Role, SpiffeId

KEPT_S = 7 * 86_400.0
"""How long a token that is good for nothing any more is still listed."""


@dataclass(frozen=True, slots=True)
class JoinToken:
    """The right to join once. `name` empty: the machine says its name; else it joins as that, whoever was it before.
    `node`: it joins from that node alone, though others are there."""

    token_id: str
    secret_sha256: bytes
    role: Role
    name: str
    created_at: float
    expires_at: float
    created_by: str
    revoked: bool = False
    used_by: str = ""
    used_key: str = ""
    used_at: float = 0.0
    node: str = ""

    def state(self, now: float) -> str:
        """`used`, `revoked`, `expired` or `open`."""
        if self.used_by:
            return "used"
        if self.revoked:
            return "revoked"
        return "expired" if now >= self.expires_at else "open"


@dataclass(frozen=True, slots=True)
class Member:
    """Who has joined. `serials` are those of its certificates that may still live, with their ends; `node` is the node
    that they name, empty where they name none."""

    identity: SpiffeId
    key: str
    joined_at: float
    renewed_at: float
    addresses: tuple[str, ...]
    serials: Mapping[int, float]
    node: str = ""

    @property
    def not_after(self) -> float:
        """When the last of its certificates ends."""
        return max(self.serials.values(), default=self.renewed_at)


class Ledger:
    """The state. `restore` makes one from what was written down."""

    def __init__(self) -> None:
        self._tokens: dict[str, JoinToken] = {}
        self._members: dict[SpiffeId, Member] = {}
        self._revoked: dict[tuple[SpiffeId, frozenset[int]], Revocation] = {}
        self._retired: dict[tuple[SpiffeId, str], float] = {}  # keys that others took the place of, until then
        self._revision = 0
        self.rotation: Rotation | None = None

    @classmethod
    def restore(
        cls,
        tokens: Iterable[JoinToken],
        members: Iterable[Member],
        revocations: Revocations,
        rotation: Rotation | None = None,
        retired: Mapping[tuple[SpiffeId, str], float] | None = None,
    ) -> Ledger:
        """The ledger that had these."""
        ledger = cls()
        ledger._tokens = {token.token_id: token for token in tokens}
        ledger._members = {member.identity: member for member in members}
        ledger._revoked = {(entry.identity, entry.serials): entry for entry in revocations.entries}
        ledger._revision = revocations.revision
        ledger.rotation = rotation
        ledger._retired = dict(retired or {})
        return ledger

    @property
    def tokens(self) -> tuple[JoinToken, ...]:
        """All of them, the oldest first."""
        return tuple(sorted(self._tokens.values(), key=lambda token: token.created_at))

    @property
    def members(self) -> tuple[Member, ...]:
        """All who have joined, by identity."""
        return tuple(self._members[identity] for identity in sorted(self._members))

    @property
    def retired(self) -> Mapping[tuple[SpiffeId, str], float]:
        """Keys whose place another machine took, and until when their certificates could be renewed otherwise."""
        return self._retired

    @property
    def revocations(self) -> Revocations:
        """What every service is told."""
        return Revocations(self._revoked.values(), revision=self._revision)

    # --- tokens -----------------------------------------------------------------------------------------------------

    def add(self, token: JoinToken, now: float) -> None:
        """Takes in a new token; those that ended long ago are forgotten."""
        self._tokens = {
            key: kept for key, kept in self._tokens.items() if now < max(kept.expires_at, kept.used_at) + KEPT_S
        }
        self._tokens[token.token_id] = token

    def revoke_token(self, token_id: str) -> JoinToken:
        """Makes a token worthless. Raises NotFoundError, TokenUsedError where somebody has joined with it."""
        token = self._tokens.get(token_id)
        if token is None:
            raise NotFoundError(f"there is no token {token_id[:40]!r}; `chorus token list` names them")
        if token.used_by:
            raise TokenUsedError(
                f"{token.used_by} has joined with it already; `chorus certs revoke` shuts a node out",
                metadata={"identity": token.used_by},
            )
        self._tokens[token_id] = replace(token, revoked=True)
        return self._tokens[token_id]

    def redeem(
        self, token_id: str, secret_sha256: bytes, *, key: str, name: str, trust_domain: str, now: float, node: str = ""
    ) -> SpiffeId:
        """Who the holder of `key` joins as; the token is used up. Asked again with the same key, it says the same.

        `node` is where it says that it is. Raises TokenErrors, of one for another node too, NameTakenError where
        somebody else has the name that it says, NodeTakenError where somebody else is on the node, RevokedError where
        that name is shut out. Nothing is changed then.
        """
        token = self._tokens.get(token_id)
        if token is None or not hmac.compare_digest(token.secret_sha256, secret_sha256):
            raise TokenInvalidError("this mesh gave out no such token; copy the whole line, or get another one")
        state = token.state(now)
        if state == "used" and self._is_retry(token, key, node):
            return SpiffeId.parse(token.used_by)
        if state != "open":
            raise _NO_LONGER_GOOD[state]()
        identity = SpiffeId(trust_domain, token.role, token.name or name)
        self._check_not_revoked(identity, None)
        if token.node and node != token.node:
            raise TokenNodeError(
                f"this token is for a machine whose node is {token.node}, and this one is {node or 'not known'}; get "
                "another one, or set runner.node_id (CHORUS_RUNNER__NODE_ID) here if it is that machine"
            )
        member = self._members.get(identity)
        there = self.who_is_on(node, now, besides=identity) if node and not token.node else None
        if there is not None:
            raise NodeTakenError(
                f"{there.identity.name} has joined from {node} already; if it is the same machine, create the token "
                f"with --node {node}; if their disks are copies, set runner.node_id (CHORUS_RUNNER__NODE_ID) here"
            )
        taken = member is not None and member.key != key and now < member.not_after + GRACE_S
        if taken and not token.name:
            raise NameTakenError(
                f"{identity.name} has joined already, with another key; say another --name, or create the token with "
                f"--name {identity.name}, which has this machine take its place"
            )
        if taken and member is not None:
            self._supersede(member, now)
        self._tokens[token_id] = replace(token, used_by=str(identity), used_key=key, used_at=now)
        return identity

    def _is_retry(self, token: JoinToken, key: str, node: str) -> bool:
        """Whether it is the one that has joined with the token asking for the same again, as after a lost answer: not
        once it was shut out or somebody took its place, and from no other node."""
        member = self._members.get(SpiffeId.parse(token.used_by))
        stated = node if token.role is Role.RUNNER else ""
        return token.used_key == key and member is not None and (member.key, member.node) == (key, stated)

    # --- certificates -----------------------------------------------------------------------------------------------

    def check_renewal(self, identity: SpiffeId, *, key: str, serial: int, not_after: float, now: float) -> None:
        """Returns if the holder of that key and certificate may have another one.

        Raises RevokedError, RenewalError where the key is not the one that joined, or the certificate ended too long
        ago. Somebody who is not known has a certificate that was issued by hand.
        """
        self._check_not_revoked(identity, serial)
        member = self._members.get(identity)
        if (member is not None and member.key != key) or now < self._retired.get((identity, key), 0.0):
            raise RenewalError(f"another machine has joined as {identity} since; join again with a new token")
        if now > not_after + GRACE_S:
            raise RenewalError(
                f"the certificate of {identity} ended {(now - not_after) / 86_400:.0f} days ago, and is renewed for "
                f"{GRACE_S / 86_400:.0f} days; join again with a new token"
            )

    def who_is_on(self, node: str, now: float, *, besides: SpiffeId) -> Member | None:
        """Another member whose certificates name that node, and who may still renew them."""
        return next(
            (
                member
                for member in self._members.values()
                if member.node == node and member.identity != besides and now < member.not_after + GRACE_S
            ),
            None,
        )

    def issued(
        self,
        identity: SpiffeId,
        *,
        key: str,
        serial: int,
        not_after: float,
        addresses: tuple[str, ...],
        now: float,
        node: str = "",
    ) -> None:
        """Notes a certificate that was issued."""
        known = self._members.get(identity)
        known = known if known is not None and known.key == key else None
        serials = {kept: end for kept, end in (known.serials if known else {}).items() if end > now}
        self._retired.pop((identity, key), None)  # it has joined anew
        self._members[identity] = Member(
            identity=identity,
            key=key,
            joined_at=known.joined_at if known else now,
            renewed_at=now,
            addresses=addresses,
            serials={**serials, serial: not_after},
            node=node,
        )

    # --- revoking ---------------------------------------------------------------------------------------------------

    def revoke(self, identity: SpiffeId, *, why: str, now: float, longest_s: float) -> Revocation:
        """Shuts out whoever is `identity`, for as long as a certificate of it may live: `longest_s` for those that
        were issued by hand. Safe to ask twice."""
        member = self._members.pop(identity, None)
        until = max(now + longest_s, member.not_after if member else 0.0) + GRACE_S
        return self._enter(Revocation(identity, revoked_at=now, until=until, why=why), now)

    def restore_identity(self, identity: SpiffeId) -> None:
        """Lets an identity join again; its certificates that still live are good again. Raises NotFoundError."""
        if self._revoked.pop((identity, frozenset()), None) is None:
            raise NotFoundError(f"{identity} is not revoked")
        self._revision += 1

    def _supersede(self, member: Member, now: float) -> None:
        """Another machine takes a member's place: its certificates are worth nothing any more."""
        self._retired = {held: until for held, until in self._retired.items() if until > now}
        self._retired[member.identity, member.key] = member.not_after + GRACE_S
        living = {serial: end for serial, end in member.serials.items() if end > now}
        if living:
            until = max(living.values())
            why = "another machine took its place"
            self._enter(Revocation(member.identity, now, until, why, frozenset(living)), now)

    def _enter(self, revocation: Revocation, now: float) -> Revocation:
        self._revoked = {key: entry for key, entry in self._revoked.items() if entry.until > now}
        self._revoked[revocation.identity, revocation.serials] = revocation
        self._revision += 1
        return revocation

    def _check_not_revoked(self, identity: SpiffeId, serial: int | None) -> None:
        entry = self.revocations.of(identity, serial if serial is not None else -1)
        if entry is not None:
            why = f" ({entry.why})" if entry.why else ""
            raise RevokedError(f"{identity} was revoked{why}; an admin can restore it, or choose another name")


_NO_LONGER_GOOD: Mapping[str, Callable[[], TokenInvalidError]] = {
    "used": lambda: TokenUsedError("another machine has joined with this token, which is good for one; get another"),
    "revoked": lambda: TokenRevokedError("this token was revoked; get another one"),
    "expired": lambda: TokenExpiredError("this token has expired; `chorus token create` makes another one"),
}
