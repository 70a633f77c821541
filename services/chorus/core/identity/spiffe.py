"""The name that a certificate gives its holder: `spiffe://<trust domain>/<role>/<name>`.

The same three parts make the DNS name that a dial pins, `<name>.<role>.<trust domain>`: gRPC's TLS checks a server's
DNS name only, so that name has to say the role too, or a runner's certificate would pass for a registry's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from chorus.core.errors import InvalidRequestError

_SCHEME = "spiffe://"
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DNS_NAME_MAX = 253


class Role(StrEnum):
    """What a certificate's holder is in the mesh."""

    REGISTRY = "registry"
    RUNNER = "runner"
    COORDINATOR = "coordinator"
    CLIENT = "client"
    ADMIN = "admin"
    IDENTITY = "identity"

    @property
    def serves(self) -> bool:
        """Whether this role answers RPCs; the others only make them."""
        return self not in (Role.CLIENT, Role.ADMIN)


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """One identity of one mesh. Raises InvalidRequestError where a part cannot be (part of) a DNS name."""

    trust_domain: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        check_label("name", self.name)
        if len(self.dns_name) > _DNS_NAME_MAX:
            raise InvalidRequestError(
                "name", f"{self.dns_name!r} is longer than the {_DNS_NAME_MAX} characters of a DNS name"
            )

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Returns the identity that `text` writes, or raises InvalidRequestError saying what is wrong with it."""
        shape = "a Chorus identity is spiffe://<trust domain>/<role>/<name>"
        if not text.startswith(_SCHEME):
            raise InvalidRequestError("spiffe_id", f"{text[:300]!r} does not start with {_SCHEME}; {shape}")
        parts = text.removeprefix(_SCHEME).split("/")
        if len(parts) != 3:
            raise InvalidRequestError("spiffe_id", f"{text[:300]!r} does not have three parts; {shape}")
        trust_domain, role, name = parts
        return cls(trust_domain, parse_role(role), name)

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}/{self.role}/{self.name}"

    @property
    def dns_name(self) -> str:
        """The DNS name in its certificate that no other identity has; every dial to it pins this."""
        return f"{self.name}.{self.role}.{self.trust_domain}"


def node_dns_name(node_id: str, trust_domain: str) -> str:
    """The DNS name in a certificate that says on which node its holder is. Raises InvalidRequestError.

    A DNS name and no second SPIFFE id: versions before take a certificate with two for none.
    """
    check_label("node_id", node_id)
    return f"{node_id}.{node_zone(trust_domain)}"


def node_zone(trust_domain: str) -> str:
    """Below this are the names of nodes; no role is called so."""
    return f"node.{trust_domain}"


def node_in(dns_name: str, trust_domain: str) -> str | None:
    """The node's id where that is the name of a node."""
    node_id, dot, zone = dns_name.partition(".")
    return node_id if dot and zone == node_zone(trust_domain) else None


def parse_role(text: str) -> Role:
    """Returns the role called `text`, or raises InvalidRequestError naming those there are."""
    try:
        return Role(text)
    except ValueError:
        raise InvalidRequestError("role", f"{text[:80]!r} is none of {', '.join(Role)}") from None


def check_label(field: str, text: str) -> None:
    """Raises InvalidRequestError unless `text` is one DNS label in lower case."""
    if _LABEL.fullmatch(text) is None:
        raise InvalidRequestError(
            field,
            f"{text[:80]!r} is not a DNS label: 1 to 63 lower-case letters, digits and dashes, "
            "neither starting nor ending with a dash",
        )


def check_trust_domain(text: str) -> None:
    """Raises InvalidRequestError unless `text` is a DNS name in lower case without a trailing dot."""
    if not text:
        raise InvalidRequestError("trust_domain", "is empty; it is a DNS name such as home.internal")
    if len(text) > _DNS_NAME_MAX:
        raise InvalidRequestError("trust_domain", f"is longer than the {_DNS_NAME_MAX} characters of a DNS name")
    for label in text.split("."):
        check_label("trust_domain", label)
