"""Which nodes of a cluster are given a token to join with: those whose runner is no member of the mesh yet."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

TOKEN_TTL_S = 7200.0
"""How long a token is good. It lies where every node can read it, so not for long after nobody needs it."""
_LEFT_S = TOKEN_TTL_S / 2


@dataclass(frozen=True, slots=True)
class Invitations:
    """What is to be done: nodes whose token stays, that get a new one, that have one to be taken away."""

    kept: tuple[str, ...]
    invited: tuple[str, ...]
    withdrawn: tuple[str, ...]


def invite(
    nodes: Collection[str],
    stored: Mapping[str, str],
    open_until: Mapping[str, float],
    members: Collection[str],
    shut_out: Collection[str],
    now: float,
) -> Invitations:
    """Decides it. `stored` are the tokens that lie ready (node -> id), `open_until` those that nobody has used, with
    their ends; `members` are the runners that have joined and can renew, `shut_out` those that were revoked.

    A token that an admin laid ready for a member stays while it is open: its machine has lost its key.
    """
    wanted = [node for node in dict.fromkeys(nodes) if node not in shut_out]
    kept = tuple(
        node
        for node in wanted
        if node in stored and open_until.get(stored[node], 0.0) - now > (0.0 if node in members else _LEFT_S)
    )
    invited = tuple(node for node in wanted if node not in kept and node not in members)
    withdrawn = tuple(node for node in stored if node not in kept and node not in invited)
    return Invitations(kept, invited, withdrawn)
