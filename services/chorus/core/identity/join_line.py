"""The token as people copy it: one word with the authority's fingerprint, the token's name and its secret."""

from __future__ import annotations

import binascii
import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field

from chorus.core.errors import InvalidRequestError

_PREFIX = "chorus1_"
_FINGERPRINT, _ID, _SECRET, _CHECK = 32, 8, 32, 4


@dataclass(frozen=True, slots=True)
class JoinLine:
    """What a machine needs to know to join: whom to believe, and what to show them."""

    authority_sha256: bytes
    token_id: str
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        """The word; reading it back gives the same."""
        raw = self.authority_sha256 + bytes.fromhex(self.token_id) + self.secret
        return _PREFIX + urlsafe_b64encode(raw + _check(raw)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> JoinLine:
        """Reads the word. Raises InvalidRequestError where it is none, or was not copied whole."""
        word = text.strip()
        try:
            if not word.startswith(_PREFIX):
                raise ValueError
            coded = word.removeprefix(_PREFIX)
            raw = urlsafe_b64decode(coded + "=" * (-len(coded) % 4))
        except (ValueError, binascii.Error):
            raw = b""
        body, check = raw[:-_CHECK], raw[-_CHECK:]
        if len(raw) != _FINGERPRINT + _ID + _SECRET + _CHECK or check != _check(body):
            raise InvalidRequestError(
                "token", f"is not whole: it starts with {_PREFIX}, and `chorus token create` printed all of it"
            )
        fingerprint, rest = body[:_FINGERPRINT], body[_FINGERPRINT:]
        return cls(fingerprint, rest[:_ID].hex(), rest[_ID:])


def _check(raw: bytes) -> bytes:
    return hashlib.sha256(b"chorus join" + raw).digest()[:_CHECK]
