"""Asking a process of the mesh whether it serves, as any other member would: over mutual TLS, by its pinned name."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chorus.core.identity import SpiffeId
from chorus.local.plan import ProcessPlan
from chorus.transport.channel import open_channel
from chorus.transport.tls import TlsIdentity

_ASK_INTERVAL_S = 0.05
_ASK_TIMEOUT_S = 2.0


async def wait_serving(plan: ProcessPlan, identity: TlsIdentity | None) -> None:
    """Returns once the process says SERVING; until then it asks again and again. Cancel it when the process ends."""
    server = SpiffeId(plan.config.mesh.trust_domain, plan.role, plan.name)
    while True:
        # A channel of its own for each try: one that found nobody listening would wait longer before it looks again.
        async with open_channel(
            plan.address.authority,
            identity=identity,
            server=server,
            insecure_loopback=plan.config.mesh.insecure_loopback,
        ) as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=_ASK_TIMEOUT_S
                )
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass  # not yet
        await asyncio.sleep(_ASK_INTERVAL_S)
