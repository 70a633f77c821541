"""The services Enrolment and Identity: messages in, one call of the office, messages out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from chorus.api.identity.v1 import identity_pb2 as pb
from chorus.api.identity.v1 import identity_pb2_grpc
from chorus.core.errors import DrainingError, InvalidRequestError
from chorus.core.identity import SpiffeId
from chorus.core.identity.attempts import Attempts
from chorus.identity.office import Office
from chorus.transport import current_caller
from chorus.transport.peer import caller_host
from chorus.wire.identity import (
    ROTATION_PHASES,
    decode_role,
    encode_member,
    encode_revocation,
    encode_time,
    encode_token,
)
from chorus.wire.resources import decode_duration

TTL_S = 3600.0
_BOOKMARK_S = 1.0


class EnrolmentServicer(identity_pb2_grpc.EnrolmentServicer):
    """What machines without a valid certificate ask. Each try counts, before anything is looked at."""

    def __init__(self, office: Office, attempts: Attempts, endpoints: Callable[[], pb.MeshEndpoints]) -> None:
        self._office = office
        self._attempts = attempts
        self._endpoints = endpoints

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        """Redeems a token."""
        self._count(context)
        identity, certificate = self._office.join(
            request.token_id,
            request.secret,
            request.certificate_request,
            name=request.name,
            addresses=request.addresses,
            node=request.node_id,
        )
        return pb.JoinResponse(certificate=self._issued(identity, certificate), endpoints=self._endpoints())

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        """Renews a certificate."""
        self._count(context)
        identity, certificate = self._office.renew(
            request.certificate, request.certificate_request, addresses=request.addresses, node=request.node_id
        )
        return pb.RenewResponse(certificate=self._issued(identity, certificate))

    def _count(self, context: Any) -> None:
        self._attempts.take(caller_host(context), time.monotonic())

    def _issued(self, identity: SpiffeId, certificate: x509.Certificate) -> pb.IssuedCertificate:
        return pb.IssuedCertificate(
            spiffe_id=str(identity),
            certificate_pem=certificate.public_bytes(Encoding.PEM),
            authorities_pem=self._office.authorities_pem,
            time=encode_time(self._office.now),
        )


class IdentityServicer(identity_pb2_grpc.IdentityServicer):
    """What admins ask, and what every service watches."""

    def __init__(self, office: Office, join_address: Callable[[], str]) -> None:
        self._office = office
        self._join_address = join_address
        self._changed = asyncio.Event()
        self._closed = False
        office.on_change(self._wake)

    def close(self) -> None:
        """Ends every watch."""
        self._closed = True
        self._wake()

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Any) -> pb.CreateTokenResponse:
        """Makes a token."""
        token, secret = self._office.create_token(
            decode_role(request.role),
            name=request.name,
            ttl_s=decode_duration(request.ttl) if request.HasField("ttl") else TTL_S,
            by=_caller(),
            node=request.node_id,
        )
        return pb.CreateTokenResponse(
            token=encode_token(token, self._office.now),
            secret=secret,
            authority_sha256=self._office.authority_sha256,
            join_address=self._join_address(),
        )

    async def ListTokens(self, request: pb.ListTokensRequest, context: Any) -> pb.ListTokensResponse:
        """Lists tokens."""
        now = self._office.now
        return pb.ListTokensResponse(tokens=[encode_token(token, now) for token in self._office.ledger.tokens])

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Any) -> pb.RevokeTokenResponse:
        """Makes a token worthless."""
        self._office.revoke_token(request.token_id, by=_caller())
        return pb.RevokeTokenResponse()

    async def ListMembers(self, request: pb.ListMembersRequest, context: Any) -> pb.ListMembersResponse:
        """Lists members."""
        ledger = self._office.ledger
        return pb.ListMembersResponse(
            members=map(encode_member, ledger.members),
            revocations=map(encode_revocation, ledger.revocations.entries),
        )

    async def Revoke(self, request: pb.RevokeRequest, context: Any) -> pb.RevokeResponse:
        """Shuts an identity out."""
        revocation = self._office.revoke(SpiffeId.parse(request.spiffe_id), why=request.why, by=_caller())
        return pb.RevokeResponse(revocation=encode_revocation(revocation))

    async def Restore(self, request: pb.RestoreRequest, context: Any) -> pb.RestoreResponse:
        """Lets an identity in again."""
        self._office.restore(SpiffeId.parse(request.spiffe_id), by=_caller())
        return pb.RestoreResponse()

    async def GetAuthority(self, request: pb.GetAuthorityRequest, context: Any) -> pb.GetAuthorityResponse:
        """Tells which authority signs."""
        return pb.GetAuthorityResponse(authority=self._authority())

    async def RotateAuthority(self, request: pb.RotateAuthorityRequest, context: Any) -> pb.RotateAuthorityResponse:
        """Begins a rotation, or takes its next step at once."""
        if request.at_once:
            if self._office.ledger.rotation is None:
                raise InvalidRequestError("at_once", "there is no rotation under way whose next step could be taken")
            self._office.advance(by=_caller(), at_once=True)
        else:
            self._office.rotate(by=_caller())
        return pb.RotateAuthorityResponse(authority=self._authority())

    def _authority(self) -> pb.Authority:
        certificate, rotation = self._office.authority.certificate, self._office.ledger.rotation
        told = pb.Authority(
            sha256=certificate.fingerprint(SHA256()),
            not_after=encode_time(certificate.not_valid_after_utc.timestamp()),
        )
        if rotation is not None:
            told.rotation.phase = ROTATION_PHASES[rotation.phase]
            told.rotation.since.CopyFrom(encode_time(rotation.since))
            told.rotation.waits_for.extend(map(str, self._office.waits_for()))
        return told

    async def WatchRevocations(
        self, request: pb.WatchRevocationsRequest, context: Any
    ) -> AsyncIterator[pb.WatchRevocationsResponse]:
        """Tells who is revoked."""
        told = -1
        while not self._closed:
            changed, revocations = self._changed, self._office.ledger.revocations
            response = pb.WatchRevocationsResponse(revision=revocations.revision)
            if revocations.revision != told:
                told = revocations.revision
                response.list.SetInParent()
                response.list.revocations.extend(map(encode_revocation, revocations.entries))
            yield response
            try:
                async with asyncio.timeout(_BOOKMARK_S):
                    await changed.wait()
            except TimeoutError:
                continue
        raise DrainingError("this identity service is stopping; watch it again once it is back")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _caller() -> str:
    caller = current_caller()
    return str(caller) if caller is not None else "somebody on this machine"
