"""Whether a runner is believed that it is on the node that it states: what is listed of a machine depends on it.

A certificate that names its holder's node decides it: that node, and no other. One that names none (issued by hand, by
cert-manager, or by a version before) is believed for a node that nobody else is on, or that others are on who speak
from the same host; a certificate that names the node is believed before it, whoever came first, and remembered when its
holder is away. Where a runner with no such certificate was first believed to be, there it stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from chorus.core.errors import PermissionDeniedError


class NodeClaims(StrEnum):
    """What a certificate that names no node is good for."""

    CERTIFICATE = "certificate"
    FIRST = "first"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a runner's word is worth: the nodes that its certificate names, and the host that it speaks from."""

    nodes: frozenset[str] = frozenset()
    host: str = ""

    def proves(self, node_id: str) -> bool:
        """Whether the certificate says so."""
        return node_id in self.nodes

    def disproves(self, other: Claim, node_id: str) -> bool:
        """Whether `other` can't be on that node, since the holder of this is, elsewhere."""
        return self.proves(node_id) and not other.proves(node_id) and self.host != other.host


def check_claim(
    runner_id: str, node_id: str, claim: Claim, others: Iterable[Claim], rule: NodeClaims, *, home: str = ""
) -> None:
    """Returns if the runner may state that node. `others` are the claims of the other runners that are on it, or whose
    certificates name it; `home` is where the runner was before, empty where that isn't known.

    Raises PermissionDeniedError, saying what to do.
    """
    if claim.proves(node_id):
        return
    facts = {"runner_id": runner_id, "node_id": node_id[:80]}
    if claim.nodes:
        raise PermissionDeniedError(
            f"the certificate of {runner_id} is for the node {', '.join(sorted(claim.nodes))}, not for "
            f"{node_id[:80]!r}; set runner.node_id to that, or have it join again from the new machine",
            metadata=facts,
        )
    if rule is NodeClaims.CERTIFICATE:
        raise PermissionDeniedError(
            f"the certificate of {runner_id} names no node, and this registry asks for one that does "
            "(registry.node_claims); let it join, or issue the certificate with --node",
            metadata=facts,
        )
    if rule is NodeClaims.FIRST and home not in ("", node_id):
        raise PermissionDeniedError(
            f"{runner_id} was on {home[:80]}, and its certificate names no node, so that it can't move to "
            f"{node_id[:80]!r}; let it join, issue the certificate with --node, or start the registries anew",
            metadata=facts,
        )
    for other in others:
        if other.disproves(claim, node_id) or (rule is NodeClaims.FIRST and other.host != claim.host):
            raise PermissionDeniedError(
                f"another machine is {node_id[:80]} already, and the certificate of {runner_id} names no node; let it "
                "join, issue the certificate with --node, or, if their disks are copies, set runner.node_id",
                metadata=facts,
            )
