"""From `chorus certs revoke` to the end of all that the revoked one had open: how long?

    make bench ONLY=revocation

A mesh of processes that joined. In each try an admin joins (the role that may open most) and has a stream open at every
service: the registry's directory, an answer of the runner, an answer and the events of the coordinator, the identity
service's revocations. The command then runs as a process, its start included in the time; after each stream's end
another call is made there, which must be refused.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
from figures import Bar, percentile, verdict
from joined_mesh import Mesh, start
from processes import BenchmarkError, machine, processes_in, say

from chorus.api.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from chorus.api.identity.v1 import identity_pb2, identity_pb2_grpc
from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.api.runner.v1 import runner_pb2, runner_pb2_grpc
from chorus.config import to_toml
from chorus.core.errors import ChorusError, RevokedError
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.core.identity import Role
from chorus.local.home import MeshHome
from chorus.local.joining import Wish, join
from chorus.testing.service import TOKENS_PER_SECOND_ENV
from chorus.transport import TlsIdentity, open_channel
from chorus.wire.errors import from_rpc_error
from chorus.wire.generation import encode_generation

BAR_S = 5.0
_LIMIT_S = 60.0
_SERVED = ((Role.REGISTRY, "registry"), (Role.COORDINATOR, "coordinator"), (Role.RUNNER, "r1"))
_ENVIRON = {TOKENS_PER_SECOND_ENV: "20"}
_LONG = encode_generation(GenerationRequest(model="", prompt=TextPrompt("echo:" + "word " * 390)))

Opening = Callable[[Any], Any]
_STREAMS: tuple[tuple[str, str, Any, Opening], ...] = (
    ("registry", "directory", registry_pb2_grpc.RegistryStub,
     lambda stub: stub.WatchNodes(registry_pb2.WatchNodesRequest())),
    ("r1", "answer", runner_pb2_grpc.ModelRunnerStub,
     lambda stub: stub.Generate(runner_pb2.GenerateRequest(spec=_LONG))),
    ("coordinator", "answer", coordinator_pb2_grpc.CoordinatorStub,
     lambda stub: stub.Generate(coordinator_pb2.GenerateRequest(spec=_LONG))),
    ("coordinator", "events", coordinator_pb2_grpc.CoordinatorStub,
     lambda stub: stub.WatchEvents(coordinator_pb2.WatchEventsRequest())),
    ("identity", "revocations", identity_pb2_grpc.IdentityStub,
     lambda stub: stub.WatchRevocations(identity_pb2.WatchRevocationsRequest())),
)  # fmt: skip


async def refused(call: Any) -> ChorusError:
    """Reads to the end of a stream, which must be an error. Raises BenchmarkError."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.RpcError as error:
        return from_rpc_error(error)
    raise BenchmarkError("a stream of somebody who was revoked ended as if nothing had happened")


async def once(mesh: Mesh, folder: Path, number: int) -> dict[str, float]:
    """Seconds from the command's start to the end of each stream and a refusal there. Raises BenchmarkError."""
    name = f"mallory-{number}"
    joined = await asyncio.to_thread(
        join, MeshHome(folder / name), mesh.joins_at, await mesh.token(Role.ADMIN), Wish(name)
    )
    own = TlsIdentity.load(folder / name / "certs" / f"admin-{name}")
    async with AsyncExitStack() as stack, asyncio.timeout(_LIMIT_S):
        stubs = []
        for service, _, stub, _ in _STREAMS:
            port, server = mesh.addresses[service]
            channel = open_channel(f"{mesh.host}:{port}", identity=own, server=server)
            stubs.append(stub(await stack.enter_async_context(channel)))
        calls = [opening(stub) for stub, (_, _, _, opening) in zip(stubs, _STREAMS, strict=True)]
        for call in calls[:3] + calls[4:]:  # nothing may happen that is an event
            await call.read()
        began = time.monotonic()
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "chorus.cli.main", "certs", "revoke", str(joined.identity)),
            *("--config", str(folder / "admin.toml")),
            stderr=asyncio.subprocess.DEVNULL,
        )

        async def until_out(which: int) -> tuple[str, float]:
            service, what, _, opening = _STREAMS[which]
            for error in (await refused(calls[which]), await refused(opening(stubs[which]))):
                if not isinstance(error, RevokedError):
                    raise BenchmarkError(f"{service}, {what}: {error.reason} instead of REVOKED: {error}")
            return f"{service}, {what}", time.monotonic() - began

        times = dict(await asyncio.gather(*map(until_out, range(len(_STREAMS)))))
        if await command.wait():
            raise BenchmarkError("chorus certs revoke failed")
    return times


async def tries(mesh: Mesh, folder: Path, count: int) -> list[dict[str, float]]:
    """Revokes so many, one after the other."""
    seen = []
    for number in range(count):
        seen.append(await once(mesh, folder, number))
        say(f"{number + 1}: all out after {max(seen[-1].values()):.2f} s")
    return seen


def main() -> int:
    """Runs it; returns 1 if the bar was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tries", type=int, default=20, help="how many are revoked")
    parser.add_argument("--quick", action="store_true", help="three")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch, processes_in(Path(scratch)) as processes:
        folder = Path(scratch)
        mesh = start(folder, processes, _SERVED, environ=_ENVIRON)
        admin = mesh.client.model_copy(
            update={
                "mesh": mesh.client.mesh.model_copy(update={"certs_dir": folder / "certs"}),
                "client": mesh.client.client.model_copy(update={"identity": "admin-root"}),
            }
        )
        (folder / "admin.toml").write_text(to_toml(admin, "mesh", "client"))
        seen = asyncio.run(tries(mesh, folder, 3 if given.quick else given.tries))
    bars = []
    for stream in seen[0]:
        times = [one[stream] for one in seen]
        told = f"{percentile(times, 0.5):.2f} s (the slowest of {len(times)}: {max(times):.2f} s)"
        bars.append(
            Bar(f"{stream}: ended and refused within {BAR_S:.0f} s of the command's start: {told}", max(times) <= BAR_S)
        )
    return verdict(bars)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchmarkError, ChorusError) as error:
        sys.exit(f"revocation: {error}")
