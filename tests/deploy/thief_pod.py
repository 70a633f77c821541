"""What somebody runs who is root on a runner's node: with the leaf that he finds there he registers as others, and
elsewhere. Each try is a line of JSON: as whom, on which node, and what the registry made of it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.core.identity import Role, SpiffeId
from chorus.transport import TlsIdentity, open_channel
from chorus.wire.errors import from_rpc_error
from chorus.wire.resources import encode_runner_record
from tests.core.fleet_records import node, record

BELIEVED = "BELIEVED"


async def main(leaf: Path, tries: list[tuple[str, str, int]]) -> None:
    """Each try is (runner, node, incarnation)."""
    server = SpiffeId("chorus.local", Role.REGISTRY, "registry")
    async with open_channel("chorus-registry:7101", identity=TlsIdentity.load(leaf), server=server) as channel:
        stub: Any = registry_pb2_grpc.RegistryStub(channel)
        for runner_id, node_id, incarnation in tries:
            claimed = encode_runner_record(record(runner_id, incarnation, machine=node(node_id)))
            said = BELIEVED
            try:
                await stub.Register(registry_pb2.RegisterRequest(record=claimed), timeout=60)
            except grpc.RpcError as error:
                said = from_rpc_error(error, peer="the registry").reason
            sys.stdout.write(json.dumps([runner_id, node_id, said]) + "\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
