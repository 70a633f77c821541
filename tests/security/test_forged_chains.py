"""A client signs a certificate of a coordinator with its own key, and tries it wherever a chain is looked at."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from chorus.api.registry.v1 import registry_pb2
from chorus.core.errors import CertificateError, TicketError
from chorus.core.identity import Role
from chorus.core.identity.tickets import Ticket
from chorus.identity.inspection import inspect
from chorus.testing.certificates import MeshCertificates
from chorus.transport import TlsIdentity, build_server, open_channel
from chorus.transport.tickets import TicketSigner, TicketVerifier
from tests.mesh.tiny_registry import tiny_registry
from tests.security.attackers import signed_by_a_leaf

MESH = MeshCertificates()
FORGED = signed_by_a_leaf(MESH, Role.COORDINATOR, "coordinator")
LIST_NODES = "/chorus.api.registry.v1.Registry/ListNodes"


def test_no_process_loads_it() -> None:
    with pytest.raises(CertificateError, match="may sign no certificates"):
        TlsIdentity.from_pem(ca_pem=FORGED.ca_pem, cert_pem=FORGED.cert_pem, key_pem=FORGED.key_pem)


def test_nor_with_the_leaf_as_its_authority() -> None:
    leaf = MESH.leaf(Role.CLIENT, "mallory")
    for ca_pem in (leaf.cert_pem, leaf.cert_pem + MESH.authority.certificate_pem):
        with pytest.raises(CertificateError):
            TlsIdentity.from_pem(ca_pem=ca_pem, cert_pem=FORGED.cert_pem, key_pem=FORGED.key_pem)


def test_verify_says_so(tmp_path: Path) -> None:
    for name, content in (("ca.crt", FORGED.ca_pem), ("tls.crt", FORGED.cert_pem), ("tls.key", FORGED.key_pem)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    report = inspect(tmp_path / "tls.crt", now=MESH.now, warn=MESH.policy.warn)
    assert not report.works
    assert any("may sign no certificates" in problem.text for problem in report.problems)


def test_no_runner_takes_its_tickets() -> None:
    now = MESH.now.timestamp()
    ticket = Ticket("t", "spiffe://x/client/y", "r", 1, b"", "m", 0, now + 10)
    with pytest.raises(TicketError, match="none of this mesh"):
        TicketVerifier(MESH.identity(Role.RUNNER, "r")).open(TicketSigner(FORGED.identity).sign(ticket), now)


async def test_no_server_lets_it_in() -> None:
    server = build_server(
        identity=MESH.identity(Role.REGISTRY, "registry"), listen=["127.0.0.1:0"], services=[tiny_registry()]
    )
    await server.start()
    registry = MESH.id(Role.REGISTRY, "registry")
    try:
        async with open_channel(server.addresses[0], identity=FORGED.identity, server=registry) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(LIST_NODES)(b"", timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        # A certificate that the authority signed does get in there.
        async with open_channel(
            server.addresses[0], identity=MESH.identity(Role.COORDINATOR, "coordinator"), server=registry
        ) as channel:
            answer = registry_pb2.ListNodesResponse.FromString(await channel.unary_unary(LIST_NODES)(b"", timeout=10))
            assert answer.epoch == 7
    finally:
        await server.stop(0)


async def test_no_client_believes_it() -> None:
    server = build_server(identity=FORGED.identity, listen=["127.0.0.1:0"], services=[tiny_registry()])
    await server.start()
    try:
        async with open_channel(
            server.addresses[0],
            identity=MESH.identity(Role.CLIENT, "kim"),
            server=MESH.id(Role.COORDINATOR, "coordinator"),
        ) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(LIST_NODES)(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "CERTIFICATE_VERIFY_FAILED" in (refused.value.details() or "")
    finally:
        await server.stop(0)
