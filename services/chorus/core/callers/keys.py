"""API keys: what is printed once, what is kept, and who has which.

A key is `chorus_<id>_<secret>`: the id names it everywhere, the secret is 256 random bits. Kept is the secret's HMAC
(the pepper is somewhere else than what is kept), so that neither alone is worth anything to a thief; since the secret
can't be guessed, nothing slower is needed. Times are seconds since 1970.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from chorus.core.callers.grants import EVERYTHING, UNLIMITED, Grant, Limits, Scopes
from chorus.core.errors import ApiKeyError, ApiKeyExpiredError, ApiKeyRevokedError, InvalidRequestError
from chorus.core.identity.spiffe import check_label

SECRET_BYTES = 32
PEPPER_BYTES = 32
_TEXT = re.compile(r"chorus_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_NAME_MAX = 100


@dataclass(frozen=True, slots=True)
class KeyText:
    """A key as its holder has it."""

    key_id: str
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"chorus_{self.key_id}_{base64.urlsafe_b64encode(self.secret).decode().rstrip('=')}"

    @classmethod
    def parse(cls, text: str) -> KeyText:
        """Raises ApiKeyError, which shows none of it."""
        found = _TEXT.fullmatch(text)
        try:
            secret = base64.urlsafe_b64decode(f"{found[2]}=") if found is not None else b""
        except binascii.Error:
            secret = b""
        if found is None or len(secret) != SECRET_BYTES:
            raise ApiKeyError("this is no API key; one begins with chorus_ and is printed by `chorus key create`")
        return cls(found[1], secret)

    def digest(self, pepper: bytes) -> bytes:
        """What is kept of the secret."""
        return hmac.digest(pepper, self.key_id.encode() + self.secret, "sha256")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key. `expires_at` and `revoked_at` 0: never. `client`: the name of a client with a certificate
    whose requests are under the same scopes and limits, with and without the key."""

    key_id: str
    name: str
    digest: bytes = field(repr=False)
    created_at: float
    created_by: str = ""
    expires_at: float = 0.0
    revoked_at: float = 0.0
    client: str = ""
    scopes: Scopes = EVERYTHING
    limits: Limits = UNLIMITED

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= _NAME_MAX or not self.name.isprintable():
            raise InvalidRequestError("name", f"should be 1 to {_NAME_MAX} printable characters")
        if self.client:
            check_label("client", self.client)

    @property
    def account(self) -> str:
        """What its use is counted for; the name of its holder in the mesh."""
        return f"key-{self.key_id}"

    @property
    def grant(self) -> Grant:
        """What its holder may do."""
        return Grant(self.account, self.scopes, self.limits)

    def revoked(self, now: float) -> ApiKey:
        """The same, taken back."""
        return replace(self, revoked_at=now)

    def state(self, now: float) -> str:
        """`revoked`, `expired` or `open`."""
        if self.revoked_at:
            return "revoked"
        return "expired" if self.expires_at and now >= self.expires_at else "open"

    def check_open(self, now: float) -> None:
        """Raises ApiKeyRevokedError, ApiKeyExpiredError."""
        state = self.state(now)
        if state == "revoked":
            raise ApiKeyRevokedError(f"the API key {self.key_id} was revoked; ask whoever runs the mesh for another")
        if state == "expired":
            raise ApiKeyExpiredError(f"the API key {self.key_id} has expired; ask whoever runs the mesh for another")


class KeyRing:
    """All keys, as of one revision of what is kept."""

    def __init__(self, keys: Iterable[ApiKey] = (), revision: int = -1) -> None:
        self.revision = revision
        self._keys = {key.key_id: key for key in keys}
        # Of several for one client, the one that was made last counts.
        self._of_client = {
            key.client: key for key in sorted(self._keys.values(), key=lambda key: key.created_at) if key.client
        }

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All of them, the oldest first."""
        return tuple(sorted(self._keys.values(), key=lambda key: key.created_at))

    def get(self, key_id: str) -> ApiKey | None:
        """The key of that id."""
        return self._keys.get(key_id)

    def of_client(self, name: str) -> ApiKey | None:
        """The key whose scopes and limits hold for the client of that name, who has a certificate."""
        return self._of_client.get(name)

    def admit(self, shown: KeyText, pepper: bytes, now: float) -> ApiKey:
        """Whose key that is. Raises ApiKeyErrors; what is wrong with an id or a secret looks alike."""
        key = self._keys.get(shown.key_id)
        kept = key.digest if key is not None else hashlib.sha256(b"").digest()
        if not hmac.compare_digest(kept, shown.digest(pepper)) or key is None:
            raise ApiKeyError("this mesh gave out no such API key; copy the whole of it, or ask for another")
        key.check_open(now)
        return key
