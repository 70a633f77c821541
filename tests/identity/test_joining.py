"""Joining, renewing and being shut out, over real sockets; one identity service for all tests of the module."""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from chorus.config import Endpoint, load_config
from chorus.core.errors import (
    CertificateError,
    InvalidRequestError,
    NameTakenError,
    OverloadedError,
    PermissionDeniedError,
    RenewalError,
    RevokedError,
    TokenExpiredError,
    TokenInvalidError,
    TokenRevokedError,
    TokenUsedError,
    UnavailableError,
)
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.join_line import JoinLine
from chorus.identity.ca import CertificateAuthority
from chorus.identity.policy import load_policy
from chorus.local import joining
from chorus.local.home import MeshHome
from chorus.local.joining import joined_already
from chorus.testing.certificates import MeshCertificates
from chorus.transport import TlsIdentity, build_server, meeting
from chorus.transport.keeping import CertificateKeeper, certificate_request
from tests.identity.identity_mesh import DOMAIN, IdentityMesh, identity_mesh
from tests.mesh.tiny_registry import tiny_registry

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[IdentityMesh]:
    async with identity_mesh(tmp_path_factory.mktemp("mesh") / "certs") as running:
        yield running


async def keeper_of(mesh: IdentityMesh, home: Path, folder: str) -> tuple[TlsIdentity, CertificateKeeper]:
    directory = home / "certs" / folder
    identity = TlsIdentity.load(directory)
    return identity, CertificateKeeper(identity, directory, renewal=mesh.where.named("identity"))


async def test_a_machine_joins_by_the_line_and_its_key_stays(mesh: IdentityMesh, tmp_path: Path) -> None:
    line = await mesh.token()
    joined = await mesh.join(tmp_path, JoinLine.parse(str(line)), name="cellar")
    assert joined.identity == SpiffeId(DOMAIN, Role.RUNNER, "cellar")
    directory = tmp_path / "certs" / "runner-cellar"
    assert stat.S_IMODE((directory / "tls.key").stat().st_mode) == 0o600
    identity = TlsIdentity.load(directory)
    leaf = x509.load_pem_x509_certificate(identity.cert_pem)
    life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    assert life == timedelta(hours=25)  # a day, and an hour for clocks that are late
    config = load_config(file=joined.config_file)
    assert config.runner.name == "cellar"
    assert config.runner.advertise is not None
    assert config.runner.advertise.host == "127.0.0.1"  # the address by which it came
    assert config.mesh.renewal == mesh.where.named("identity")
    assert config.mesh.identity_service == mesh.endpoint
    assert joined_already(MeshHome(tmp_path)) == joined
    assert not list((tmp_path / "certs").glob("joining-*"))
    # The ledger holds no secret, and none of the machine's key.
    kept = (mesh.certs / "identity.json").read_text()
    assert line.secret.hex() not in kept
    assert stat.S_IMODE((mesh.certs / "identity.json").stat().st_mode) == 0o600


async def test_a_token_is_for_one_machine(mesh: IdentityMesh, tmp_path: Path) -> None:
    line = await mesh.token()
    await mesh.join(tmp_path / "one", line, name="one")
    with pytest.raises(TokenUsedError):
        await mesh.join(tmp_path / "two", line, name="two")


async def test_an_answer_that_was_lost_is_asked_for_again(
    mesh: IdentityMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = await mesh.token()
    with monkeypatch.context() as broken:
        broken.setattr(joining, "write_new_directory", _fails)
        with pytest.raises(CertificateError):
            await mesh.join(tmp_path, line, name="flaky")
    assert (await mesh.join(tmp_path, line, name="flaky")).identity.name == "flaky"


def _fails(*_: object, **__: object) -> None:
    raise CertificateError("the disk is full")


async def test_nothing_is_sent_to_somebody_else(mesh: IdentityMesh) -> None:
    impostor = MeshCertificates(DOMAIN)  # the same names, another authority
    leaf = impostor.leaf(Role.IDENTITY, "identity")
    identity = TlsIdentity(leaf.ca_pem, leaf.cert_pem + leaf.ca_pem, leaf.key_pem, leaf.spiffe_id, leaf.not_after)
    calls = []

    class Observer:
        def call_started(self, method: str) -> None:
            calls.append(method)

        def call_finished(self, *_: object) -> None: ...

    server = build_server(
        identity=identity,
        listen=["127.0.0.1:0"],
        services=[tiny_registry()],
        open_listen="127.0.0.1:0",
        open_services=[tiny_registry()],
        observer=Observer(),
    )
    await server.start()
    line = await mesh.token()
    try:
        for address in (server.open_address, server.addresses[0]):
            assert address is not None
            with pytest.raises((CertificateError, UnavailableError)):
                await asyncio.to_thread(joining.meet, Endpoint.parse(address), line.authority_sha256)
        assert server.open_address is not None
        with pytest.raises(CertificateError, match="another fingerprint"):
            await asyncio.to_thread(joining.meet, Endpoint.parse(server.open_address), line.authority_sha256)
    finally:
        await server.stop(0)
    assert calls == []


async def test_the_authoritys_certificate_beside_anothers_leaf_will_not_do(mesh: IdentityMesh, tmp_path: Path) -> None:
    """Who stands in between can show the real authority's certificate, which is public, beside a leaf of its own."""
    leaf = MeshCertificates(DOMAIN).leaf(Role.IDENTITY, "identity")
    chain = leaf.cert_pem + mesh.authority.certificate_pem
    identity = TlsIdentity(mesh.authority.certificate_pem, chain, leaf.key_pem, leaf.spiffe_id, leaf.not_after)
    server = build_server(
        identity=identity,
        listen=["127.0.0.1:0"],
        services=[tiny_registry()],
        open_listen="127.0.0.1:0",
        open_services=[tiny_registry()],
    )
    await server.start()
    line = await mesh.token()
    try:
        assert server.open_address is not None
        with pytest.raises(UnavailableError):
            await asyncio.to_thread(
                joining.join, MeshHome(tmp_path), Endpoint.parse(server.open_address), line, joining.Wish("attic")
            )
    finally:
        await server.stop(0)
    await mesh.join(tmp_path, line, name="not-deceived")  # the token was not spent


async def test_what_is_wrong_is_said(mesh: IdentityMesh, tmp_path: Path) -> None:
    line = await mesh.token()
    forged = replace(line, secret=bytes(32))
    with pytest.raises(TokenInvalidError, match="no such token"):
        await mesh.join(tmp_path, forged)
    with pytest.raises(InvalidRequestError, match="not whole"):
        JoinLine.parse(str(line)[:-1])
    with pytest.raises(InvalidRequestError, match="DNS label"):
        await mesh.join(tmp_path, line, name="No Label")
    async with mesh.admin() as admin:
        await admin.revoke_token(line.token_id)
        assert {token.token_id for token in await admin.tokens()} >= {line.token_id}
    with pytest.raises(TokenRevokedError):
        await mesh.join(tmp_path, line)
    with pytest.raises(UnavailableError, match="can't be reached"):
        await asyncio.to_thread(joining.meet, Endpoint("127.0.0.1", 1), line.authority_sha256)


async def test_a_clock_that_is_wrong_is_named(mesh: IdentityMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    line = await mesh.token()

    class Late(meeting.datetime):  # type: ignore[misc,name-defined]
        @classmethod
        def now(cls, tz: object = None) -> object:
            return super().now(tz) - timedelta(days=400)

    monkeypatch.setattr(meeting, "datetime", Late)
    with pytest.raises(CertificateError, match="set the clock"):
        await asyncio.to_thread(meeting.meet, mesh.where, line.authority_sha256)


async def test_a_name_is_taken_from_nobody_unless_an_admin_says_so(mesh: IdentityMesh, tmp_path: Path) -> None:
    await mesh.join(tmp_path / "old", await mesh.token(), name="den")
    with pytest.raises(NameTakenError, match="--name"):
        await mesh.join(tmp_path / "new", await mesh.token(), name="den")
    await mesh.join(tmp_path / "new", await mesh.token(name="den"), name="whatever")
    old, keeper = await keeper_of(mesh, tmp_path / "old", "runner-den")
    with pytest.raises((RenewalError, RevokedError)):
        await keeper.renew()
    serial = x509.load_pem_x509_certificate(old.cert_pem).serial_number
    revoked = mesh.service.identity.revoked
    assert revoked.of(old.spiffe_id, serial) is not None
    assert revoked.of(old.spiffe_id, serial + 1) is None


async def test_a_certificate_is_renewed_with_its_own_key_even_after_its_end(mesh: IdentityMesh, tmp_path: Path) -> None:
    await mesh.join(tmp_path, await mesh.token(), name="sleeper")
    identity, keeper = await keeper_of(mesh, tmp_path, "runner-sleeper")
    before = identity.cert_pem
    await keeper.renew()
    assert identity.cert_pem != before
    assert TlsIdentity.load(tmp_path / "certs" / "runner-sleeper").cert_pem == identity.cert_pem
    # It sleeps past its end.
    office = mesh.service.office
    ended = office.authority.certify(
        identity.spiffe_id,
        x509.load_pem_x509_certificate(before).public_key(),  # type: ignore[arg-type]
        load_policy(),
        now=mesh.authority.certificate.not_valid_before_utc + timedelta(hours=2),
        lifetime=timedelta(minutes=1),
    )
    asleep = TlsIdentity.from_pem(
        ca_pem=identity.ca_pem, cert_pem=ended.public_bytes(Encoding.PEM), key_pem=identity.key_pem
    )
    assert asleep.not_after.timestamp() < time.time()
    directory = tmp_path / "certs" / "runner-sleeper"
    await CertificateKeeper(asleep, directory, renewal=mesh.where.named("identity")).renew()
    assert asleep.not_after.timestamp() > time.time()
    # Nobody gets one by showing it with another key.
    with pytest.raises(InvalidRequestError, match="key of the certificate"):
        office.renew(
            ended.public_bytes(Encoding.DER),
            certificate_request(MeshCertificates(DOMAIN).leaf(Role.RUNNER, "x").key_pem),
            addresses=(),
        )


async def test_a_runners_certificate_names_its_machine_and_one_from_before_does_once_it_is_renewed(
    mesh: IdentityMesh, tmp_path: Path
) -> None:
    await mesh.join(tmp_path / "a", await mesh.token(), name="named", node="node-a")
    identity, keeper = await keeper_of(mesh, tmp_path / "a", "runner-named")
    assert identity.node == "node-a"
    await keeper.renew()
    assert identity.node == "node-a"
    second = await mesh.token(node_id="node-a")  # another runner there
    await mesh.join(tmp_path / "b", second, name="beside", node="node-a")
    for name, node, expected in (("before", "node-b", "node-b"), ("late", "node-a", None)):
        await mesh.join(tmp_path / name, await mesh.token(), name=name)
        old, _ = await keeper_of(mesh, tmp_path / name, f"runner-{name}")
        assert old.node is None
        directory = tmp_path / name / "certs" / f"runner-{name}"
        await CertificateKeeper(old, directory, renewal=mesh.where.named("identity"), node=node).renew()
        assert old.node == expected
    async with mesh.admin() as admin:
        nodes = {member.spiffe_id: member.node_id for member in (await admin.members()).members}
    assert nodes[str(identity.spiffe_id)] == "node-a"


async def test_a_leaf_of_a_forged_chain_is_not_renewed(mesh: IdentityMesh) -> None:
    stranger = MeshCertificates(DOMAIN).leaf(Role.RUNNER, "sleeper")
    shown = x509.load_pem_x509_certificate(stranger.cert_pem).public_bytes(Encoding.DER)
    with pytest.raises(RenewalError, match="not of this mesh"):
        mesh.service.office.renew(shown, certificate_request(stranger.key_pem), addresses=())
    with pytest.raises(InvalidRequestError):
        mesh.service.office.renew(b"nonsense", certificate_request(stranger.key_pem), addresses=())


async def test_who_is_shut_out_is_not_renewed_and_cannot_join(mesh: IdentityMesh, tmp_path: Path) -> None:
    await mesh.join(tmp_path, await mesh.token(), name="stolen")
    identity, keeper = await keeper_of(mesh, tmp_path, "runner-stolen")
    async with mesh.admin() as admin:
        await admin.revoke(identity.spiffe_id, "it was stolen")
        with pytest.raises(RevokedError, match="it was stolen"):
            await keeper.renew()
        with pytest.raises(RevokedError):
            await mesh.join(tmp_path / "again", await mesh.token(), name="stolen")
        listed = await admin.members()
        assert [entry.why for entry in listed.revocations if entry.spiffe_id == str(identity.spiffe_id)]
        await admin.restore(identity.spiffe_id)
    await keeper.renew()


async def test_admins_alone_make_tokens(mesh: IdentityMesh) -> None:
    from chorus.client.identity import IdentityClient

    for role in (Role.RUNNER, Role.CLIENT, Role.COORDINATOR, Role.REGISTRY):
        async with IdentityClient(mesh.endpoint, mesh.identity(role, "mallory")) as client:
            with pytest.raises(PermissionDeniedError):
                await client.create_token(Role.ADMIN, ttl_s=60)
            with pytest.raises(PermissionDeniedError):
                await client.revoke(SpiffeId(DOMAIN, Role.RUNNER, "rival"))


async def test_no_token_makes_an_identity_service(mesh: IdentityMesh) -> None:
    async with mesh.admin() as admin:
        for role, name, ttl_s in ((Role.IDENTITY, "", 60), (Role.RUNNER, "No", 60), (Role.RUNNER, "", 1e9)):
            with pytest.raises(InvalidRequestError):
                await admin.create_token(role, name=name, ttl_s=ttl_s)


async def test_a_backup_remembers_and_tries_are_limited(tmp_path: Path) -> None:
    """Tokens, members and revocations are there again after a restart, or on another machine, with the folder."""
    now = time.time()
    async with identity_mesh(tmp_path / "certs", wall=lambda: now) as first:
        line, late = await first.token(), await first.token(ttl_s=60)
        first.service.office.revoke(SpiffeId(DOMAIN, Role.RUNNER, "out"), why="", by="test")
        spent = await first.token()
        await first.join(tmp_path / "in", spent, name="in")
    (tmp_path / "certs").rename(tmp_path / "restored")
    now += 59
    async with identity_mesh(tmp_path / "restored", wall=lambda: now, joins_per_minute=2) as again:
        assert again.service.identity.revoked.of(SpiffeId(DOMAIN, Role.RUNNER, "out"), 1) is not None
        await again.join(tmp_path / "late", line, name="attic")
        with pytest.raises(TokenUsedError):
            await again.join(tmp_path / "other", spent, name="x")
        now += 2
        with pytest.raises(TokenExpiredError):
            await again.join(tmp_path / "other", late, name="x")
        with pytest.raises(TokenInvalidError):
            await again.join(tmp_path / "other", late, name="x")
        with pytest.raises(OverloadedError) as refused:
            await again.join(tmp_path / "other", late, name="x")
        assert refused.value.retry_after_s is not None


async def test_a_damaged_ledger_is_not_begun_anew(tmp_path: Path) -> None:
    from chorus.core.errors import ConfigError
    from chorus.identity.ledger_file import read_ledger

    (tmp_path / "identity.json").write_text('{"version": 1}')
    with pytest.raises(ConfigError, match="backup"):
        read_ledger(tmp_path / "identity.json")


async def test_an_authority_that_takes_over_signs_once_its_key_is_there(mesh: IdentityMesh, tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    async with identity_mesh(certs) as running:
        await running.join(tmp_path / "home", await running.token(), name="attic")
        old = (certs / "ca.crt").read_bytes()
    other = CertificateAuthority.create(
        load_policy(), now=mesh.authority.certificate.not_valid_before_utc, trust_domain=DOMAIN
    )
    other.write(tmp_path / "other")
    both = old + (tmp_path / "other" / "ca.crt").read_bytes()
    (certs / "ca.crt").write_bytes(both)
    async with identity_mesh(certs) as running:
        identity, keeper = await keeper_of(running, tmp_path / "home", "runner-attic")
        await keeper.renew()
        assert identity.ca_pem == both
    (certs / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    async with identity_mesh(certs) as running:
        assert running.authority.certificate == other.certificate
        identity, keeper = await keeper_of(running, tmp_path / "home", "runner-attic")
        await keeper.renew()
        x509.load_pem_x509_certificate(identity.cert_pem).verify_directly_issued_by(other.certificate)
