"""The password of the Valkey server that coordinators share, made once and kept in a Secret."""

from __future__ import annotations

import secrets as chance

from chorus.k8s.cluster import ConflictError
from chorus.k8s.secrets import Secrets

VALKEY_SECRET = "chorus-valkey"  # noqa: S105 - a name
_SERVICE = "chorus-valkey:6379"


def make_valkey_secret(secrets: Secrets) -> bool:
    """Makes the Secret unless it is there; returns whether it did.

    `valkey.conf` is what the server reads, `password` what its probes say, `url` what coordinators read.
    """
    if secrets.read(VALKEY_SECRET) is not None:
        return False
    password = chance.token_hex(32)
    data: dict[str, bytes | None] = {
        "password": password.encode(),
        "valkey.conf": f"requirepass {password}\n".encode(),
        "url": f"valkey://:{password}@{_SERVICE}/0\n".encode(),
    }
    try:
        secrets.create(VALKEY_SECRET, data)
    except ConflictError:  # another run was faster, and its password is the one
        return False
    return True
