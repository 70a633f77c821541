"""Tokens of an identity provider (OpenID Connect): signed JWTs, checked against the provider's public keys.

What is checked: the signature, by an algorithm of the configured ones and a key of the provider's that is for
signatures; issuer, audience, expiry and not-before, with a minute for clocks that differ; that it names somebody.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import jwt

from chorus.config.callers import CallersSettings
from chorus.core.callers import Grant, parse_grant
from chorus.core.errors import BearerTokenError, ConfigError, PermissionDeniedError, UnavailableError
from chorus.telemetry.logs import get_logger

_LEEWAY_S = 60
_REFRESH_S = 600.0
KEPT_S = 24 * 3600.0
"""So long keys are good without having been fetched again: a provider that is away is no reason to shut everybody out,
but who can keep us from asking must not keep a withdrawn key alive."""
_AGAIN_S = 10.0
"""A token with a key that is not known makes keys be fetched again, at most this often."""
_FETCH_S = 5.0
_MAX_BYTES = 1 << 20
_TOKEN_MAX = 12 * 1024
_PUBLIC = ("RSA", "EC", "OKP")

_log = get_logger()


class TokenVerifier:
    """Knows one provider's keys. Used from one event loop; `clock` is monotonic seconds."""

    def __init__(self, settings: CallersSettings, *, clock: Callable[[], float]) -> None:
        """Raises ConfigError where something is missing, or a file can't be read."""
        if settings.oidc_issuer is None or settings.oidc_audience is None or settings.oidc_jwks is None:
            raise ConfigError(
                "callers.oidc_issuer: needs callers.oidc_audience and callers.oidc_jwks, too",
                metadata={"keys": "callers.oidc_issuer"},
            )
        self._issuer, self._audience, self._where = settings.oidc_issuer, settings.oidc_audience, settings.oidc_jwks
        self._trusted = _authorities(settings.oidc_ca)
        self._algorithms = list(settings.oidc_algorithms)
        self._claim = settings.oidc_claim
        self._grants = {value: parse_grant(text) for value, text in settings.oidc_grants.items()}
        self._clock = clock
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched_at = self._tried_at = -math.inf
        self._fetching = asyncio.Lock()

    @classmethod
    def configured(cls, settings: CallersSettings, *, clock: Callable[[], float]) -> TokenVerifier | None:
        """As the configuration says; None where no provider is named. Raises ConfigError."""
        return None if settings.oidc_issuer is None else cls(settings, clock=clock)

    async def verify(self, token: str) -> tuple[str, Grant, float]:
        """Who holds it (a name for the pair of issuer and subject), what they may do, and until when.

        Raises BearerTokenError, PermissionDeniedError where it grants nothing, UnavailableError where the provider's
        keys can't be had.
        """
        if len(token) > _TOKEN_MAX:
            raise BearerTokenError("the token is too long")
        try:
            header = jwt.get_unverified_header(token)
            key = await self._key(str(header.get("kid", "")))
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self._issuer,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise BearerTokenError(f"the token is refused: {error}; get a new one from {self._issuer}") from None
        holder = hashlib.sha256(f"{self._issuer}\0{claims['sub']}".encode()).hexdigest()[:24]
        return holder, self._grant(holder, claims), float(claims["exp"])

    def _grant(self, holder: str, claims: Mapping[str, Any]) -> Grant:
        said = claims.get(self._claim)
        values = (
            set(said.split()) if isinstance(said, str) else set(map(str, said)) if isinstance(said, list) else set()
        )
        for value, (scopes, limits) in self._grants.items():
            if value == "*" or value in values:
                return Grant(f"oidc-{holder}", scopes, limits)
        raise PermissionDeniedError(
            f"the token is good, and grants nothing here: its {self._claim} is none of callers.oidc_grants",
            metadata={"scope": "token"},
        )

    async def _key(self, key_id: str) -> jwt.PyJWK:
        if self._clock() >= self._fetched_at + _REFRESH_S or (
            key_id not in self._keys and self._clock() >= self._tried_at + _AGAIN_S
        ):
            async with self._fetching:
                await self._refresh()
        if not self._keys:
            raise UnavailableError("the identity provider's keys can't be had now", retry_after_s=_AGAIN_S)
        if key_id in self._keys:
            return self._keys[key_id]
        raise jwt.InvalidKeyError("no key of the provider has its kid")

    async def _refresh(self) -> None:
        """Fetches the keys, where that was not tried a moment ago; if it fails, those that are known stay good for a
        day."""
        if self._clock() < self._tried_at + _AGAIN_S:
            return
        self._tried_at = self._clock()
        try:
            self._keys = _public_keys(await self._fetched())
            self._fetched_at = self._clock()
        except (OSError, httpx.HTTPError, ValueError, jwt.PyJWTError) as error:
            if self._keys and self._clock() >= self._fetched_at + KEPT_S:
                self._keys = {}
            _log.warning("oidc.keys_not_fetched", where=self._where, why=str(error)[:200], keys_known=len(self._keys))

    def _read(self) -> bytes:
        with Path(self._where).expanduser().open("rb") as file:
            return file.read(_MAX_BYTES)

    async def _fetched(self) -> bytes:
        if "://" not in self._where:
            return await asyncio.to_thread(self._read)
        content = b""
        async with (
            httpx.AsyncClient(timeout=_FETCH_S, follow_redirects=False, verify=self._trusted) as client,
            client.stream("GET", self._where) as answer,
        ):
            answer.raise_for_status()
            async for chunk in answer.aiter_bytes():
                content += chunk
                if len(content) > _MAX_BYTES:
                    raise ValueError("it is longer than a megabyte")
        return content


def _authorities(file: Path | None) -> ssl.SSLContext | bool:
    """Those in the file and no other ones, or without one the public ones. Raises ConfigError."""
    if file is None:
        return True
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl's own are, too
        raise ConfigError(
            f"callers.oidc_ca: {file} has no authorities: {error}", metadata={"keys": "callers.oidc_ca"}
        ) from error


def _public_keys(content: bytes) -> Mapping[str, jwt.PyJWK]:
    """The keys for signatures in a JWKS, by their ids; secrets that both sides share are none. Raises ValueError."""
    whole = json.loads(content)
    listed = whole.get("keys") if isinstance(whole, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ValueError("it is no list of keys (JWKS)")
    found: dict[str, jwt.PyJWK] = {}
    for one in listed:
        if one.get("kty") in _PUBLIC and one.get("use", "sig") == "sig":
            try:
                found[str(one.get("kid", ""))] = jwt.PyJWK.from_dict(one)
            except jwt.PyJWTError:
                continue  # of a kind that isn't known here
    return found
