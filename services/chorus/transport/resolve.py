"""Every address that a configured endpoint stands for."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

from chorus.config import Endpoint


async def resolve(endpoint: Endpoint) -> frozenset[Endpoint]:
    """Returns the endpoint once for each address that its host has, by IP address; an IP address stands for itself.

    A name may stand for several replicas (a headless service in Kubernetes) that know nothing of each other, and a
    balanced channel would mix them. Of a host with addresses of both kinds only those of IPv4 count, or each replica
    would be dialled twice. Raises OSError where the name cannot be resolved now.
    """
    if endpoint.ip is not None:
        return frozenset({endpoint})
    found = await asyncio.get_running_loop().getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    families = {family for family, *_ in found}
    wanted = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return frozenset(replace(endpoint, host=str(address[0])) for family, *_, address in found if family == wanted)
