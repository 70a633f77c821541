"""The ledger on disk: one JSON file, closed to others, written whole before anybody is told what is in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chorus.core.errors import ChorusError, ConfigError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.ledger import JoinToken, Ledger, Member
from chorus.core.identity.revocations import Revocation, Revocations
from chorus.core.identity.rotation import Rotation
from chorus.transport.files import KEY_MODE, make_directory, write_new

_VERSION = 1


def read_ledger(path: Path) -> Ledger:
    """Returns the ledger in `path`, an empty one where there is no file. Raises ConfigError where it is damaged: to
    begin anew would forget who was revoked."""
    try:
        data = json.loads(path.read_text("utf-8"))
        return _decode(data)
    except FileNotFoundError:
        return Ledger()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, ChorusError) as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it from a backup") from error


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Writes the ledger down. Raises CertificateError where that can't be."""
    make_directory(path.parent)
    write_new(path, json.dumps(_encode(ledger), indent=1).encode(), KEY_MODE, replace=True)


def _encode(ledger: Ledger) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "tokens": [
            {
                "token_id": token.token_id,
                "secret_sha256": token.secret_sha256.hex(),
                "role": token.role.value,
                "name": token.name,
                "created_at": token.created_at,
                "expires_at": token.expires_at,
                "created_by": token.created_by,
                "revoked": token.revoked,
                "used_by": token.used_by,
                "used_key": token.used_key,
                "used_at": token.used_at,
                "node": token.node,
            }
            for token in ledger.tokens
        ],
        "members": [
            {
                "identity": str(member.identity),
                "key": member.key,
                "joined_at": member.joined_at,
                "renewed_at": member.renewed_at,
                "addresses": member.addresses,
                "node": member.node,
                "serials": {f"{serial:x}": end for serial, end in member.serials.items()},
            }
            for member in ledger.members
        ],
        "revision": ledger.revocations.revision,
        "revocations": [
            {
                "identity": str(entry.identity),
                "revoked_at": entry.revoked_at,
                "until": entry.until,
                "why": entry.why,
                "serials": [f"{serial:x}" for serial in sorted(entry.serials)],
            }
            for entry in ledger.revocations.entries
        ],
        "retired": [
            {"identity": str(identity), "key": key, "until": until} for (identity, key), until in ledger.retired.items()
        ],
        "rotation": None if ledger.rotation is None else asdict(ledger.rotation),
    }


def _decode(data: dict[str, Any]) -> Ledger:
    if data["version"] != _VERSION:
        raise ValueError(f"it is of version {data['version']!r}, and this Chorus knows {_VERSION}")
    tokens = [
        JoinToken(**{**row, "secret_sha256": bytes.fromhex(row["secret_sha256"]), "role": Role(row["role"])})
        for row in data["tokens"]
    ]
    members = [
        Member(
            identity=SpiffeId.parse(row["identity"]),
            key=row["key"],
            joined_at=row["joined_at"],
            renewed_at=row["renewed_at"],
            addresses=tuple(row["addresses"]),
            serials={int(serial, 16): end for serial, end in row["serials"].items()},
            node=row.get("node", ""),  # versions before knew none
        )
        for row in data["members"]
    ]
    revocations = [
        Revocation(
            SpiffeId.parse(row["identity"]),
            row["revoked_at"],
            row["until"],
            row["why"],
            frozenset(int(serial, 16) for serial in row["serials"]),
        )
        for row in data["revocations"]
    ]
    rotation = data.get("rotation")
    return Ledger.restore(
        tokens,
        members,
        Revocations(revocations, revision=data["revision"]),
        None if rotation is None else Rotation(**rotation),
        # Versions before knew none.
        {(SpiffeId.parse(row["identity"]), row["key"]): row["until"] for row in data.get("retired", ())},
    )
