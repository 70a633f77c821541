"""Tokens, members and revocations, as messages and as core types."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from chorus.api.identity.v1 import access_pb2
from chorus.api.identity.v1 import identity_pb2 as pb
from chorus.core.errors import InvalidRequestError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.ledger import JoinToken, Member
from chorus.core.identity.revocations import Revocation, Revocations
from chorus.core.identity.rotation import Phase

ROLES: dict[Role, access_pb2.Role.ValueType] = {role: access_pb2.Role.Value(f"ROLE_{role.name}") for role in Role}
ROLE_OF: dict[int, Role] = {value: role for role, value in ROLES.items()}
_STATES = {
    "open": pb.TOKEN_STATE_OPEN,
    "used": pb.TOKEN_STATE_USED,
    "expired": pb.TOKEN_STATE_EXPIRED,
    "revoked": pb.TOKEN_STATE_REVOKED,
}
ROTATION_PHASES: dict[Phase, pb.RotationPhase.ValueType] = {
    phase: pb.RotationPhase.Value(f"ROTATION_PHASE_{phase.name}") for phase in Phase
}
STATES = {value: name for name, value in _STATES.items()}


def encode_time(seconds: float) -> Timestamp:
    """Seconds since 1970 as a message."""
    stamp = Timestamp()
    stamp.FromNanoseconds(round(seconds * 1e9))
    return stamp


def decode_time(stamp: Timestamp) -> float:
    """A message as seconds since 1970."""
    return stamp.ToNanoseconds() / 1e9


def decode_role(role: int) -> Role:
    """Returns the role. Raises InvalidRequestError where there is none."""
    known = ROLE_OF.get(role)
    if known is None:
        raise InvalidRequestError("role", f"should be one of {', '.join(Role)}")
    return known


def encode_token(token: JoinToken, now: float) -> pb.Token:
    """A token as it stands at `now`."""
    return pb.Token(
        token_id=token.token_id,
        role=ROLES[token.role],
        name=token.name,
        created_at=encode_time(token.created_at),
        expires_at=encode_time(token.expires_at),
        created_by=token.created_by,
        state=_STATES[token.state(now)],
        used_by=token.used_by,
        node_id=token.node,
    )


def encode_member(member: Member) -> pb.Member:
    """Somebody who has joined."""
    return pb.Member(
        spiffe_id=str(member.identity),
        joined_at=encode_time(member.joined_at),
        renewed_at=encode_time(member.renewed_at),
        not_after=encode_time(member.not_after),
        addresses=member.addresses,
        node_id=member.node,
    )


def encode_revocation(revocation: Revocation) -> pb.Revocation:
    """Somebody who is not believed any more."""
    return pb.Revocation(
        spiffe_id=str(revocation.identity),
        revoked_at=encode_time(revocation.revoked_at),
        until=encode_time(revocation.until),
        why=revocation.why,
        serials=[serial.to_bytes(20, "big") for serial in sorted(revocation.serials)],
    )


def decode_revocations(messages: Iterable[pb.Revocation], revision: int) -> Revocations:
    """A whole list. Raises InvalidRequestError where an identity is none."""
    return Revocations(
        (
            Revocation(
                SpiffeId.parse(message.spiffe_id),
                decode_time(message.revoked_at),
                decode_time(message.until),
                message.why,
                frozenset(int.from_bytes(serial, "big") for serial in message.serials),
            )
            for message in messages
        ),
        revision=revision,
    )
