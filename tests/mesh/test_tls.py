"""Whom mutual TLS lets in, and what both sides are told of a refusal: real sockets, the server in its own process."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue

import grpc
import pytest

from chorus.api.registry.v1 import registry_pb2, registry_pb2_grpc
from chorus.core.errors import ChorusError, PermissionDeniedError, UnauthenticatedError, UnavailableError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates, tls_identity
from chorus.transport import MeshServer, TlsIdentity, build_server, open_channel
from chorus.wire.errors import from_rpc_error
from tests.mesh.tiny_registry import tiny_registry

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0

CERTIFICATES = MeshCertificates()
OTHER_MESH = MeshCertificates()  # the same trust domain, another authority
SERVER = CERTIFICATES.id(Role.REGISTRY, "one")


class ServerProcess:
    """A registry in its own process, and its log as it comes."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.mesh.tls_server", str(directory)],
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT / 'services'}:{ROOT}", "PATH": "/usr/bin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.lines: Queue[str] = Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        first = self.process.stdout.readline()
        assert first, "\n".join(self.rest())
        self.address = f"127.0.0.1:{int(first)}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.put(line.decode())

    def event(self, name: str, **fields: object) -> dict[str, object]:
        """Returns the next event of that name with those fields."""
        seen: list[str] = []
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                raise AssertionError(f"no {name} with {fields} came, but:\n" + "".join(seen)) from None
            seen.append(line)
            event = json.loads(line)
            if event["event"] == name and all(event.get(key) == value for key, value in fields.items()):
                return dict(event)

    def rest(self) -> list[str]:
        """Ends the process, and returns what it wrote and nobody has looked at."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        self.reader.join(PATIENCE_S)
        self.process.stdout.close()
        self.process.stderr.close()
        return [self.lines.get() for _ in range(self.lines.qsize())]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = CERTIFICATES.leaf(Role.REGISTRY, "one").write(tmp_path_factory.mktemp("certs"))
    process = ServerProcess(directory)
    yield process
    rest = process.rest()
    # What native code writes passes through untouched, to its last line.
    assert "last words of native code\n" in rest
    assert process.process.returncode == 0


async def list_nodes(
    address: str, identity: TlsIdentity | None, *, server: object = SERVER, credentials: object = None
) -> registry_pb2.ListNodesResponse:
    if credentials is not None:
        options = [("grpc.ssl_target_name_override", SERVER.dns_name)]
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    else:
        channel = open_channel(address, identity=identity, server=server, insecure_loopback=identity is None)
    async with channel:
        stub = registry_pb2_grpc.RegistryStub(channel)
        try:
            return await stub.ListNodes(registry_pb2.ListNodesRequest(), timeout=PATIENCE_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=f"the registry at {address}") from error


async def refusal(*args: object, **kwargs: object) -> ChorusError:
    with pytest.raises(ChorusError) as caught:
        await list_nodes(*args, **kwargs)
    return caught.value


async def test_a_client_of_the_mesh_is_let_in(server: ServerProcess) -> None:
    response = await list_nodes(server.address, CERTIFICATES.identity(Role.CLIENT, "alice"))
    assert response.epoch == 7


async def test_another_authority_is_refused_by_the_server(server: ServerProcess) -> None:
    stranger = OTHER_MESH.leaf(Role.CLIENT, "alice")
    credentials = grpc.ssl_channel_credentials(
        CERTIFICATES.authority.certificate_pem, stranger.key_pem, stranger.cert_pem
    )
    error = await refusal(server.address, None, credentials=credentials)
    assert isinstance(error, UnavailableError)
    assert "refused our certificate" in error.message
    event = server.event("handshake.refused", reason="UNKNOWN_AUTHORITY", dialled=False)
    assert event["level"] == "warning"
    assert "another authority" in str(event["why"])
    assert str(event["peer"]).startswith("127.0.0.1:")
    assert event["local"] == server.address


async def test_another_authority_is_refused_by_the_client(server: ServerProcess) -> None:
    error = await refusal(server.address, OTHER_MESH.identity(Role.CLIENT, "alice"))
    assert isinstance(error, UnavailableError)
    assert "signed by another authority" in error.message
    assert f"the registry at {server.address}" in error.message
    # All that the server can know is that the other side hung up.
    server.event("handshake.refused", reason="PEER_CLOSED", level="info")


async def test_an_expired_client_is_refused(server: ServerProcess) -> None:
    error = await refusal(server.address, CERTIFICATES.expired(Role.CLIENT, "alice"))
    assert isinstance(error, UnavailableError)
    event = server.event("handshake.refused", reason="CERTIFICATE_EXPIRED")
    assert "expired" in str(event["why"])
    assert str(event["peer"]).startswith("127.0.0.1:")


async def test_a_client_without_a_certificate_is_refused(server: ServerProcess) -> None:
    credentials = grpc.ssl_channel_credentials(CERTIFICATES.authority.certificate_pem)
    error = await refusal(server.address, None, credentials=credentials)
    assert isinstance(error, UnavailableError)
    assert "showed no certificate" in str(server.event("handshake.refused", reason="NO_CERTIFICATE")["why"])


async def test_plaintext_is_refused(server: ServerProcess) -> None:
    error = await refusal(server.address, None)
    assert isinstance(error, UnavailableError)
    assert "does not speak TLS" in str(server.event("handshake.refused", reason="PLAINTEXT")["why"])


async def test_a_wrong_role_is_refused_by_name(server: ServerProcess) -> None:
    error = await refusal(server.address, CERTIFICATES.identity(Role.RUNNER, "laptop"))
    assert isinstance(error, PermissionDeniedError)
    assert error.metadata["allowed_roles"] == "admin,client,coordinator"
    event = server.event("call.refused", reason="PERMISSION_DENIED", caller=str(CERTIFICATES.id(Role.RUNNER, "laptop")))
    assert event["level"] == "warning"
    assert event["method"] == "/chorus.api.registry.v1.Registry/ListNodes"
    assert "127.0.0.1" in str(event["peer"])
    assert event["request_id"] == error.metadata["request_id"]


async def test_a_certificate_of_another_trust_domain_is_refused(server: ServerProcess) -> None:
    # As if one authority served two meshes: the signature is right, the name is not.
    elsewhere = MeshCertificates("elsewhere.test")
    elsewhere.authority._key = CERTIFICATES.authority._key
    elsewhere.authority.certificate = CERTIFICATES.authority.certificate
    error = await refusal(server.address, elsewhere.identity(Role.CLIENT, "alice"))
    assert isinstance(error, UnauthenticatedError)
    assert "another mesh" in str(server.event("call.refused", reason="UNAUTHENTICATED")["why"])


async def test_tls_1_2_ends_in_the_handshake(server: ServerProcess) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.to_thread(tls_1_2_connection, server.address)
    assert "TLS 1.3" in str(server.event("handshake.refused", reason="OLD_TLS")["why"])


# --- servers that are wrong, in this process -----------------------------------------------------------------------


async def started(identity: TlsIdentity) -> MeshServer:
    server = build_server(identity=identity, listen=["127.0.0.1:0"], services=[tiny_registry()])
    await server.start()
    return server


async def test_an_impostor_is_refused_by_the_client() -> None:
    # A runner's certificate, which the authority did sign, answering where the registry should.
    impostor = await started(CERTIFICATES.identity(Role.RUNNER, "one"))
    try:
        error = await refusal(impostor.addresses[0], CERTIFICATES.identity(Role.CLIENT, "alice"))
    finally:
        await impostor.stop(0)
    assert isinstance(error, UnavailableError)
    assert "another identity than the one dialled" in error.message
    assert impostor.addresses[0] in error.message


async def test_an_expired_server_is_refused_by_the_client() -> None:
    old = await started(CERTIFICATES.expired(Role.REGISTRY, "one"))
    try:
        error = await refusal(old.addresses[0], CERTIFICATES.identity(Role.CLIENT, "alice"))
    finally:
        await old.stop(0)
    assert isinstance(error, UnavailableError)
    assert "its certificate has expired" in error.message


async def test_a_clients_certificate_cannot_serve() -> None:
    admin = await started(CERTIFICATES.identity(Role.ADMIN, "one"))
    try:
        server = CERTIFICATES.id(Role.ADMIN, "one")
        error = await refusal(admin.addresses[0], CERTIFICATES.identity(Role.CLIENT, "alice"), server=server)
    finally:
        await admin.stop(0)
    assert isinstance(error, UnavailableError)
    assert "not made for this side" in error.message


async def test_tls_to_a_plaintext_port_says_so() -> None:
    plain = build_server(identity=None, listen=["127.0.0.1:0"], services=[tiny_registry()], insecure_loopback=True)
    await plain.start()
    try:
        error = await refusal(plain.addresses[0], CERTIFICATES.identity(Role.CLIENT, "alice"))
    finally:
        await plain.stop(0)
    assert isinstance(error, UnavailableError)


async def test_a_port_where_nobody_listens_says_so() -> None:
    with socket.socket() as taken:  # bound, never listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error = await refusal(address, CERTIFICATES.identity(Role.CLIENT, "alice"))
    assert isinstance(error, UnavailableError)
    assert "nothing listens there" in error.message


async def test_a_tls_1_2_connection_that_comes_about_serves_no_call() -> None:
    # In this process TLS 1.2 is not turned off, as in a program that never called prepare_core().
    lenient = await started(CERTIFICATES.identity(Role.REGISTRY, "one"))
    try:
        answer = await asyncio.to_thread(tls_1_2_call, lenient.addresses[0])
    finally:
        await lenient.stop(0)
    assert b"grpc-status\x0216" in answer  # UNAUTHENTICATED
    assert b"speaks TLS 1.3" in answer


async def test_a_connection_outlives_its_certificate_but_serves_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    server = await started(CERTIFICATES.identity(Role.REGISTRY, "one"))
    alice = CERTIFICATES.identity(Role.CLIENT, "alice")
    try:
        async with open_channel(server.addresses[0], identity=alice, server=SERVER) as channel:
            stub = registry_pb2_grpc.RegistryStub(channel)
            await stub.ListNodes(registry_pb2.ListNodesRequest(), timeout=PATIENCE_S)
            late = alice.not_after.timestamp()
            monkeypatch.setattr("chorus.transport.open_calls._now", lambda: late)
            with pytest.raises(grpc.RpcError) as caught:
                await stub.ListNodes(registry_pb2.ListNodesRequest(), timeout=PATIENCE_S)
    finally:
        await server.stop(0)
    error = from_rpc_error(caught.value)
    assert isinstance(error, UnauthenticatedError)
    assert "has expired since" in error.message


# --- a client of TLS 1.2, made by hand -----------------------------------------------------------------------------


def tls_1_2_connection(address: str) -> ssl.SSLSocket:
    alice = CERTIFICATES.leaf(Role.CLIENT, "alice")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=alice.ca_pem.decode())
    load_chain(context, alice.cert_pem + alice.key_pem)
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    try:
        return context.wrap_socket(connection, server_hostname=SERVER.dns_name)
    except BaseException:
        connection.close()
        raise


def load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    import tempfile  # the ssl module reads certificates from files alone

    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)


def tls_1_2_call(address: str) -> bytes:
    """Returns the bytes that answer one call over HTTP/2."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def header(name: str, value: str) -> bytes:  # literal, without indexing, without Huffman
        return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    headers = b"".join(
        (
            header(":method", "POST"),
            header(":scheme", "https"),
            header(":path", "/chorus.api.registry.v1.Registry/ListNodes"),
            header(":authority", SERVER.dns_name),
            header("te", "trailers"),
            header("content-type", "application/grpc"),
        )
    )
    message = b"\x00" + (0).to_bytes(4, "big")
    with tls_1_2_connection(address) as connection:
        assert connection.version() == "TLSv1.2"
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(4, 0, 0, b"")
            + frame(1, 4, 1, headers)
            + frame(0, 1, 1, message)
        )
        answer = b""
        while b"grpc-status" not in answer:
            chunk = connection.recv(65536)
            assert chunk, f"the server hung up after {answer!r}"
            answer += chunk
        return answer


def test_tls_identity_keeps_its_key_to_itself() -> None:
    leaf = CERTIFICATES.leaf(Role.CLIENT, "alice")
    assert b"PRIVATE KEY" in leaf.key_pem
    assert "PRIVATE KEY" not in repr(leaf)
    assert "PRIVATE KEY" not in repr(tls_identity(leaf))
