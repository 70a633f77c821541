"""A servicer to try the transport with."""

from __future__ import annotations

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.transport import Service

REGISTRY = registry_pb2.DESCRIPTOR.services_by_name["Registry"]


class TinyRegistry(registry_pb2_grpc.RegistryServicer):
    """Knows nobody."""

    async def ListNodes(self, request, context):  # noqa: N802
        return registry_pb2.ListNodesResponse(epoch=7)


def tiny_registry() -> Service:
    """Returns the service, ready for `build_server`."""
    return Service(REGISTRY, registry_pb2_grpc.add_RegistryServicer_to_server, TinyRegistry())
