"""Who may call which RPC: one decision over one table."""

from __future__ import annotations

from collections.abc import Mapping

from chorus.core.errors import PermissionDeniedError, UnauthenticatedError
from chorus.core.identity.spiffe import Role, SpiffeId

AccessTable = Mapping[str, frozenset[Role]]
"""The authorised roles of every RPC, by its full name: `/chorus.api.registry.v1.Registry/Register`."""


def authorize(table: AccessTable, method: str, caller: SpiffeId | None) -> None:
    """Returns if `caller` may call `method`.

    Raises UnauthenticatedError where there is no caller to speak of, PermissionDeniedError where the table does not
    name the caller's role, or does not know the RPC at all.
    """
    if caller is None:
        raise UnauthenticatedError(
            f"{method} needs a certificate of this mesh, and the caller showed none", metadata={"method": method}
        )
    roles = table.get(method, frozenset())
    if caller.role in roles:
        return
    who = "nobody may" if not roles else f"only these roles may: {', '.join(sorted(roles))}"
    raise PermissionDeniedError(
        f"{caller} has the role {caller.role}, which may not call {method}; {who}",
        metadata={"method": method, "caller": str(caller), "allowed_roles": ",".join(sorted(roles))},
    )
