"""How long certificates live: `policy.toml`, read and checked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from pathlib import Path

from chorus.core.errors import ConfigError, InvalidRequestError
from chorus.core.identity import Role
from chorus.core.identity.spiffe import check_trust_domain


@dataclass(frozen=True, slots=True)
class Policy:
    """What new certificates are like."""

    trust_domain: str
    backdate: timedelta
    warn: timedelta
    authority_lifetime: timedelta
    lifetimes: Mapping[Role, timedelta]


def load_policy(path: Path | None = None) -> Policy:
    """Returns the policy in `path`, or the one that the package carries. Raises ConfigError naming file and key."""
    where = str(path) if path else "policy.toml"
    try:
        text = path.read_text("utf-8") if path else files("chorus.identity").joinpath("policy.toml").read_text("utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the certificate policy {where}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not TOML: {error}") from error
    days = data.get("lifetime_days")
    if not isinstance(days, dict):
        raise ConfigError(f"{where}: lifetime_days must be a table")
    trust_domain = data.get("trust_domain")
    if not isinstance(trust_domain, str):
        raise ConfigError(f"{where}: trust_domain must be a string")
    try:
        check_trust_domain(trust_domain)
    except InvalidRequestError as error:
        raise ConfigError(f"{where}: {error}") from error
    known = {"authority", *Role}
    if unknown := sorted(set(days) - known):
        raise ConfigError(f"{where}: lifetime_days.{unknown[0]} is unknown; there are {', '.join(sorted(known))}")
    return Policy(
        trust_domain=trust_domain,
        backdate=timedelta(minutes=_positive(data, "backdate_minutes", where)),
        warn=timedelta(days=_positive(data, "warn_days", where)),
        authority_lifetime=timedelta(days=_positive(days, "authority", where)),
        lifetimes={role: timedelta(days=_positive(days, role, where)) for role in Role},
    )


def _positive(table: Mapping[str, object], key: str, where: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 36500:
        raise ConfigError(f"{where}: {key} must be a number over 0 and at most 36500, not {value!r}")
    return value
