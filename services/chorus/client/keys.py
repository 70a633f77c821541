"""API keys, as admins make, see and take them back."""

from __future__ import annotations

from dataclasses import dataclass, fields

from chorus.api.coordinator.v1 import keys_pb2 as pb
from chorus.client.coordinators import Coordinators
from chorus.core.callers import EVERYTHING, UNLIMITED, Limits, Scopes, Usage
from chorus.wire.identity import decode_time
from chorus.wire.keys import STATES, decode_limits, decode_scopes, encode_limits, encode_scopes
from chorus.wire.resources import encode_duration


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key, as coordinators know it. Times are seconds since 1970; `state` is `open`, `expired` or `revoked`."""

    key_id: str
    name: str
    state: str
    created_at: float
    created_by: str
    expires_at: float | None
    client: str
    scopes: Scopes
    limits: Limits

    @classmethod
    def decode(cls, message: pb.ApiKey) -> KnownKey:
        """Out of its message."""
        return cls(
            message.key_id,
            message.name,
            STATES.get(message.state, "unknown"),
            decode_time(message.created_at),
            message.created_by,
            decode_time(message.expires_at) if message.HasField("expires_at") else None,
            message.client,
            decode_scopes(message.scopes),
            decode_limits(message.limits),
        )


class MeshKeys:
    """The keys of one mesh. Whichever coordinator answers does; all that share a store know it within a second."""

    def __init__(self, coordinators: Coordinators) -> None:
        self._coordinators = coordinators

    async def create(
        self,
        name: str,
        *,
        ttl_s: float | None = None,
        client: str = "",
        scopes: Scopes = EVERYTHING,
        limits: Limits = UNLIMITED,
    ) -> tuple[KnownKey, str]:
        """A new key, and its text, which nobody can tell again."""
        request = pb.CreateKeyRequest(
            name=name,
            ttl=encode_duration(ttl_s) if ttl_s is not None else None,
            client=client,
            scopes=encode_scopes(scopes),
            limits=encode_limits(limits),
        )
        made: pb.CreateKeyResponse = await self._coordinators.single("CreateKey", request)
        return KnownKey.decode(made.key), made.text

    async def list(self) -> list[KnownKey]:
        """All keys, the oldest first."""
        answer: pb.ListKeysResponse = await self._coordinators.single("ListKeys", pb.ListKeysRequest())
        return [KnownKey.decode(key) for key in answer.keys]

    async def revoke(self, key_id: str) -> None:
        """Makes a key worthless. Raises NotFoundError."""
        await self._coordinators.single("RevokeKey", pb.RevokeKeyRequest(key_id=key_id))

    async def usage(self, key_id: str) -> Usage:
        """What was used with a key. Raises NotFoundError."""
        told: pb.GetKeyUsageResponse = await self._coordinators.single(
            "GetKeyUsage", pb.GetKeyUsageRequest(key_id=key_id)
        )
        return Usage(
            requests=told.request_count,
            prompt_tokens=told.prompt_token_count,
            output_tokens=told.output_token_count,
            total_tokens=told.total_token_count,
            requests_this_minute=told.requests_this_minute,
            tokens_this_minute=told.tokens_this_minute,
            tokens_this_day=told.tokens_this_day,
            concurrent=told.concurrent,
        )


LIMIT_NAMES = tuple(field.name for field in fields(Limits))
