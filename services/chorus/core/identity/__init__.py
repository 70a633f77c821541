"""Who somebody is in a mesh, and what they may call."""

from chorus.core.identity.access import AccessTable, authorize
from chorus.core.identity.spiffe import Role, SpiffeId

__all__ = ["AccessTable", "Role", "SpiffeId", "authorize"]
