"""A client of the identity service, for admins."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from chorus.api.identity.v1 import identity_pb2 as pb
from chorus.api.identity.v1 import identity_pb2_grpc
from chorus.config import Endpoint
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.join_line import JoinLine
from chorus.transport import TlsIdentity, open_channel
from chorus.wire.errors import from_rpc_error
from chorus.wire.identity import ROLES

_TIMEOUT_S = 10.0


class IdentityClient:
    """Asks one identity service; use it as `async with`. Every method raises ChorusErrors."""

    def __init__(self, endpoint: Endpoint, identity: TlsIdentity) -> None:
        server = SpiffeId(identity.spiffe_id.trust_domain, Role.IDENTITY, endpoint.name or "identity")
        self.trust_domain = identity.spiffe_id.trust_domain
        self._endpoint = endpoint
        self._channel = open_channel(endpoint.authority, identity=identity, server=server)
        self._stub: Any = identity_pb2_grpc.IdentityStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def create_token(
        self, role: Role, *, name: str = "", node_id: str = "", ttl_s: float
    ) -> tuple[str, JoinLine, pb.Token]:
        """Where to join, what to show there, and what is known of the token."""
        ttl = Duration()
        ttl.FromNanoseconds(round(ttl_s * 1e9))
        made: pb.CreateTokenResponse = await self._ask(
            "CreateToken", pb.CreateTokenRequest(role=ROLES[role], name=name, ttl=ttl, node_id=node_id)
        )
        line = JoinLine(made.authority_sha256, made.token.token_id, made.secret)
        return made.join_address, line, made.token

    async def tokens(self) -> list[pb.Token]:
        """All tokens, the oldest first."""
        answer: pb.ListTokensResponse = await self._ask("ListTokens", pb.ListTokensRequest())
        return list(answer.tokens)

    async def revoke_token(self, token_id: str) -> None:
        """Makes a token worthless."""
        await self._ask("RevokeToken", pb.RevokeTokenRequest(token_id=token_id))

    async def members(self) -> pb.ListMembersResponse:
        """Who has joined, and who is revoked."""
        answer: pb.ListMembersResponse = await self._ask("ListMembers", pb.ListMembersRequest())
        return answer

    async def revoke(self, identity: SpiffeId, why: str = "") -> None:
        """Shuts an identity out."""
        await self._ask("Revoke", pb.RevokeRequest(spiffe_id=str(identity), why=why))

    async def restore(self, identity: SpiffeId) -> None:
        """Lets an identity in again."""
        await self._ask("Restore", pb.RestoreRequest(spiffe_id=str(identity)))

    async def authority(self) -> pb.Authority:
        """Which authority signs, and how far it is with another one."""
        answer: pb.GetAuthorityResponse = await self._ask("GetAuthority", pb.GetAuthorityRequest())
        return answer.authority

    async def rotate_authority(self, *, at_once: bool = False) -> pb.Authority:
        """Has a new authority take over; `at_once`: takes the next step of that, whoever is shut out by it."""
        answer: pb.RotateAuthorityResponse = await self._ask(
            "RotateAuthority", pb.RotateAuthorityRequest(at_once=at_once)
        )
        return answer.authority

    async def _ask(self, name: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, name)(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=f"the identity service {self._endpoint}") from error
