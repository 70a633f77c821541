"""Asking a process of the mesh whether it serves, as any other member would: over mutual TLS, by its pinned name.

Until it serves it is asked many times a second. From its first answer on it is watched as well: one that falls silent
while its process lives is stopped, or hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chorus.core.identity import SpiffeId
from chorus.core.resilience.silence import ProbePolicy, Silence
from chorus.local.plan import ProcessPlan
from chorus.transport.channel import open_channel
from chorus.transport.tls import TlsIdentity

_ASK_INTERVAL_S = 0.05


async def watch_health(
    plan: ProcessPlan, identity: TlsIdentity | None, policy: ProbePolicy, serving: Callable[[], None]
) -> float:
    """Calls `serving` the first time that the process says SERVING, and goes on asking.

    Returns for how many seconds it has been silent, once `policy` says that this is too long. Cancel it when the
    process ends, or was asked to.
    """
    clock = asyncio.get_running_loop().time
    silence: Silence | None = None
    served = False
    late_s = 0.0  # of ourselves, since the last outcome
    while True:
        # A channel that found nobody listening would wait longer before it looks again, so each has one life; while it
        # is answered it is kept, since a handshake a second would be felt.
        async with _channel(plan, identity) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            asked = clock()
            while (state := await _ask(stub, policy.timeout_s)) is not None:
                if silence is None:
                    silence = Silence(policy, clock())
                silence.answered(clock())
                if state == health_pb2.HealthCheckResponse.SERVING and not served:
                    served = True
                    serving()
                late_s = await _pause(policy.interval_s if served else _ASK_INTERVAL_S)
                asked = clock()
        late_s = max(late_s, clock() - asked - policy.timeout_s)
        silent_s = silence.missed(clock(), late_s=late_s) if silence is not None else None
        if silent_s is not None:
            return silent_s
        late_s = await _pause(policy.interval_s if silence is not None else _ASK_INTERVAL_S)


async def _pause(seconds: float) -> float:
    """Sleeps, and returns how many seconds too long that took."""
    clock = asyncio.get_running_loop().time
    due = clock() + seconds
    await asyncio.sleep(seconds)
    return clock() - due


def _channel(plan: ProcessPlan, identity: TlsIdentity | None) -> grpc.aio.Channel:
    return open_channel(
        plan.address.authority,
        identity=identity,
        server=SpiffeId(plan.config.mesh.trust_domain, plan.role, plan.name),
        insecure_loopback=plan.config.mesh.insecure_loopback,
    )


async def _ask(
    stub: health_pb2_grpc.HealthStub, timeout_s: float
) -> health_pb2.HealthCheckResponse.ServingStatus | None:
    """What it says of itself; None where it says nothing in time."""
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError:
        return None
    return answer.status
