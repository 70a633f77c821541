"""gRPC over mutual TLS: channels, servers, who is calling, and what every RPC passes through."""

from chorus.telemetry.context import outgoing_metadata
from chorus.transport.access import access_table
from chorus.transport.calls import cancelled_after, responses
from chorus.transport.channel import open_channel, open_sync_channel
from chorus.transport.health import Health
from chorus.transport.interceptor import CallObserver, MeshInterceptor
from chorus.transport.peer import current_caller
from chorus.transport.server import MeshServer, Service, build_server
from chorus.transport.tls import TlsIdentity

__all__ = [
    "CallObserver",
    "Health",
    "MeshInterceptor",
    "MeshServer",
    "Service",
    "TlsIdentity",
    "access_table",
    "build_server",
    "cancelled_after",
    "current_caller",
    "open_channel",
    "open_sync_channel",
    "outgoing_metadata",
    "responses",
]
