"""API keys, as messages and as core types."""

from __future__ import annotations

from dataclasses import fields

from chorus.api.coordinator.v1 import keys_pb2 as pb
from chorus.core.callers import ApiKey, Limits, Scopes, Usage
from chorus.core.errors import InvalidRequestError
from chorus.wire.ensemble import STRATEGIES_BACK, STRATEGY_VALUES
from chorus.wire.generation import PRIORITIES, decode_priority
from chorus.wire.identity import encode_time

_STATES = {
    "open": pb.API_KEY_STATE_OPEN,
    "expired": pb.API_KEY_STATE_EXPIRED,
    "revoked": pb.API_KEY_STATE_REVOKED,
}
STATES = {value: name for name, value in _STATES.items()}
_LIMITS = tuple(field.name for field in fields(Limits))


def encode_key(key: ApiKey, now: float) -> pb.ApiKey:
    """A key as it stands at `now`, without its digest."""
    return pb.ApiKey(
        key_id=key.key_id,
        name=key.name,
        created_at=encode_time(key.created_at),
        created_by=key.created_by,
        expires_at=encode_time(key.expires_at) if key.expires_at else None,
        state=_STATES[key.state(now)],
        client=key.client,
        scopes=encode_scopes(key.scopes),
        limits=encode_limits(key.limits),
    )


def encode_scopes(scopes: Scopes) -> pb.KeyScopes:
    """Scopes as a message."""
    return pb.KeyScopes(
        models=scopes.models,
        strategies=[STRATEGY_VALUES[strategy] for strategy in sorted(scopes.strategies)],
        priorities=[PRIORITIES[priority] for priority in sorted(scopes.priorities)],
    )


def decode_scopes(message: pb.KeyScopes) -> Scopes:
    """Scopes of a message. Raises InvalidRequestError."""
    unknown = [value for value in message.strategies if value not in STRATEGIES_BACK]
    if unknown:
        raise InvalidRequestError("scopes.strategies", f"{unknown[0]} is no strategy that this version knows")
    return Scopes(
        tuple(message.models),
        frozenset(STRATEGIES_BACK[value] for value in message.strategies),
        frozenset(decode_priority("scopes.priorities", value) for value in message.priorities),
    )


def encode_limits(limits: Limits) -> pb.KeyLimits:
    """Limits as a message."""
    return pb.KeyLimits(**{name: getattr(limits, name) for name in _LIMITS})


def decode_limits(message: pb.KeyLimits) -> Limits:
    """Limits of a message. Raises InvalidRequestError."""
    return Limits(**{name: getattr(message, name) for name in _LIMITS})


def encode_usage(usage: Usage) -> pb.GetKeyUsageResponse:
    """What was used, as a message."""
    return pb.GetKeyUsageResponse(
        request_count=max(0, usage.requests),
        prompt_token_count=usage.prompt_tokens,
        output_token_count=usage.output_tokens,
        total_token_count=max(0, usage.total_tokens),
        requests_this_minute=max(0, usage.requests_this_minute),
        tokens_this_minute=max(0, usage.tokens_this_minute),
        tokens_this_day=max(0, usage.tokens_this_day),
        concurrent=usage.concurrent,
    )
