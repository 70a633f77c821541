"""Callers who show no certificate: what an API key or a token lets them do, and how much of it."""

from chorus.core.callers.grants import EVERYTHING, UNLIMITED, Grant, Limits, Scopes, parse_grant
from chorus.core.callers.keys import PEPPER_BYTES, ApiKey, KeyRing, KeyText
from chorus.core.callers.quota import Account, Refusal, Usage

__all__ = [
    "EVERYTHING",
    "PEPPER_BYTES",
    "UNLIMITED",
    "Account",
    "ApiKey",
    "Grant",
    "KeyRing",
    "KeyText",
    "Limits",
    "Refusal",
    "Scopes",
    "Usage",
    "parse_grant",
]
