"""`chorus registry` as a process: its listeners, its end, and what it says of wrong certificates and taken ports."""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport import open_channel
from tests.mesh.child import REGISTRY, child, configured
from tests.mesh.conftest import TRUST_DOMAIN, Identities

LONG_S = 60.0


@pytest.fixture
def certs_dir(certificates: MeshCertificates, tmp_path: Path) -> Path:
    """A folder with the registry's certificate, as `chorus certs issue` writes it."""
    certificates.leaf(Role.REGISTRY, "registry").write(tmp_path)
    return tmp_path


def with_registry(certs_dir: Path, **registry: Any) -> str:
    return configured(certs_dir, TRUST_DOMAIN, registry={"listen": "127.0.0.1:0", **registry})


async def test_it_serves_the_mesh_and_at_its_side_doors(certs_dir: Path, identity_of: Identities) -> None:
    sides = dict.fromkeys(("health_listen", "admin_listen", "metrics_listen"), "127.0.0.1:0")
    async with child(REGISTRY, with_registry(certs_dir, **sides)) as process:
        ready = await process.event("service.ready")
        registry = identity_of(Role.REGISTRY, "registry").spiffe_id
        async with open_channel(ready["address"], identity=identity_of(Role.CLIENT, "cli"), server=registry) as channel:
            listed = await registry_pb2_grpc.RegistryStub(channel).ListNodes(registry_pb2.ListNodesRequest())
            assert listed.epoch > 0
        async with grpc.aio.insecure_channel(ready["health_address"]) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                await registry_pb2_grpc.RegistryStub(channel).ListNodes(registry_pb2.ListNodesRequest())
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        admin = open_channel(ready["admin_address"], identity=identity_of(Role.ADMIN, "kim"), server=registry)
        async with admin as channel:
            servers = await channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest())
            assert servers.server
        metrics = await asyncio.to_thread(fetch, f"http://{ready['metrics_address']}/metrics")
        assert "chorus_rpc_requests_total" in metrics
        assert 'chorus_build_info{service="registry"' in metrics
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
        assert process.plain == []


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=LONG_S) as response:
        return str(response.read(), "utf-8")


async def test_without_certificates_it_says_how_to_make_them(tmp_path: Path) -> None:
    async with child(REGISTRY, with_registry(tmp_path / "none")) as process:
        assert await process.ended() == 2
        (line,) = process.plain
        assert line.startswith("chorus registry: ")
        assert "chorus certs" in line


async def test_somebody_elses_certificate_is_refused(certificates: MeshCertificates, tmp_path: Path) -> None:
    certificates.leaf(Role.RUNNER, "r1").write(tmp_path)
    (tmp_path / "runner-r1").rename(tmp_path / "registry-registry")
    async with child(REGISTRY, with_registry(tmp_path)) as process:
        assert await process.ended() == 2
        (line,) = process.plain
        assert f"spiffe://{TRUST_DOMAIN}/runner/r1" in line


async def test_a_port_that_is_taken_is_named(certs_dir: Path) -> None:
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as taken:
        address = f"127.0.0.1:{taken.sockets[0].getsockname()[1]}"
        for key in ("listen", "metrics_listen"):
            async with child(REGISTRY, with_registry(certs_dir, **{key: address})) as process:
                assert await process.ended() == 2
                (line,) = process.plain
                assert address in line
