"""The one authorisation table of a server, read from the `access` option of its services' RPCs."""

from __future__ import annotations

from google.protobuf.descriptor import ServiceDescriptor

from chorus.api.identity.v1 import access_pb2
from chorus.core.identity import AccessTable, Role
from chorus.wire.identity import ROLE_OF

EVERY_ROLE = frozenset(Role)


def access_table(*services: ServiceDescriptor) -> AccessTable:
    """Returns the authorised roles of every RPC of `services`. An RPC without the option is in it with nobody."""
    return {
        f"/{service.full_name}/{method.name}": _authorised(method.GetOptions().Extensions[access_pb2.access])
        for service in services
        for method in service.methods
    }


def callers_table(*services: ServiceDescriptor) -> AccessTable:
    """Returns the RPCs of `services` for callers without a certificate, who are clients; nobody may call the others."""
    return {
        f"/{service.full_name}/{method.name}": frozenset({Role.CLIENT} if access.callers else ())
        for service in services
        for method in service.methods
        for access in [method.GetOptions().Extensions[access_pb2.access]]
    }


def _authorised(access: access_pb2.Access) -> frozenset[Role]:
    return EVERY_ROLE if access.anybody else frozenset(ROLE_OF[role] for role in access.roles if role in ROLE_OF)


def fixed_table(roles: frozenset[Role], *services: ServiceDescriptor) -> AccessTable:
    """Returns a table that gives every RPC of `services` to `roles`; for services whose protos are not ours."""
    return {f"/{service.full_name}/{method.name}": roles for service in services for method in service.methods}
