"""What the Job makes once, and never changes: the password of Valkey, and the pepper of API keys."""

from __future__ import annotations

import secrets as chance
from collections.abc import Mapping

from chorus.core.callers import PEPPER_BYTES
from chorus.k8s.cluster import ConflictError
from chorus.k8s.secrets import Secrets

VALKEY_SECRET = "chorus-valkey"  # noqa: S105 - a name
CALLERS_SECRET = "chorus-callers"  # noqa: S105 - a name
_VALKEY = "chorus-valkey:6379"


def make_valkey_secret(secrets: Secrets) -> bool:
    """Makes the Secret unless it is there; returns whether it did.

    `valkey.conf` is what the server reads, `password` what its probes say, `url` what coordinators read.
    """
    password = chance.token_hex(32)
    data = {
        "password": password.encode(),
        "valkey.conf": f"requirepass {password}\n".encode(),
        "url": f"valkey://:{password}@{_VALKEY}/0\n".encode(),
    }
    return _make_once(secrets, VALKEY_SECRET, data)


def make_callers_secret(secrets: Secrets) -> bool:
    """Makes the Secret with the coordinators' `pepper` unless it is there; returns whether it did."""
    return _make_once(secrets, CALLERS_SECRET, {"pepper": chance.token_bytes(PEPPER_BYTES)})


def _make_once(secrets: Secrets, name: str, data: Mapping[str, bytes | None]) -> bool:
    if secrets.read(name) is not None:
        return False
    try:
        secrets.create(name, data)
    except ConflictError:  # another run was faster, and what it made counts
        return False
    return True
