"""A new authority takes over: under load by itself, over a restart in the middle, and for who was away."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from chorus.core.errors import CertificateError, InvalidRequestError
from chorus.core.identity import Role, SpiffeId
from chorus.identity import succession
from chorus.identity.ca import CertificateAuthority
from chorus.transport import TlsIdentity
from chorus.transport.keeping import CertificateKeeper
from tests.identity.identity_mesh import IdentityMesh, identity_mesh
from tests.security.rotating_mesh import RotatingMesh

LIFE_S = 6.0


async def test_it_takes_over_by_itself_and_no_answer_is_lost(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(180):
        at = await stack.enter_async_context(identity_mesh(tmp_path / "certs", leaf_lifetime_s=LIFE_S))
        mesh = RotatingMesh(at, tmp_path, stack)
        await mesh.start(runners=2)
        me = await mesh.identity(Role.CLIENT, "kim")
        old = at.authority.certificate
        async with at.admin() as admin:
            assert (await admin.rotate_authority()).HasField("rotation")
            assert len((await admin.authority()).rotation.waits_for) == 5
        answers = 0
        async with mesh.client(me) as client:
            while at.service.office.ledger.rotation is not None:
                answers += 1
                assert (await client.complete(f"echo:answer {answers}")).text == f"answer {answers}"
            new = at.authority.certificate
            assert new != old
            while not all(is_of(new, identity) for identity in mesh.kept.values()):  # they hear of it a moment later
                assert (await client.complete("echo:with the old one forgotten")).text
        assert sorted(path.name for path in at.certs.glob("ca.*")) == ["ca.crt", "ca.key"]
        await mesh.identity(Role.RUNNER, "newcomer")  # by a token with the new one's fingerprint


def is_of(authority: x509.Certificate, identity: TlsIdentity) -> bool:
    """Whether its certificate is of that authority, and no other one is believed there."""
    shown = x509.load_pem_x509_certificate(identity.cert_pem)
    return shown.issuer == authority.subject and x509.load_pem_x509_certificates(identity.ca_pem) == [authority]


async def test_a_backup_of_the_middle_goes_on_and_waits_for_who_is_away(tmp_path: Path) -> None:
    now = time.time()
    day, grace = 86_400.0, 30 * 86_400.0
    certs, home = tmp_path / "certs", tmp_path / "home"
    at: IdentityMesh
    async with asyncio.timeout(120):
        async with identity_mesh(certs, wall=lambda: now) as at:
            office = at.service.office
            old = office.authority.certificate
            await at.join(home, await at.token(), name="attic")
            with pytest.raises(InvalidRequestError):
                async with at.admin() as admin:
                    await admin.rotate_authority(at_once=True)
            office.rotate(by="test")
            assert office.authority.certificate == old
        certs.rename(tmp_path / "restored")
        certs = tmp_path / "restored"
        attic = SpiffeId(office.authority.trust_domain, Role.RUNNER, "attic")
        async with identity_mesh(certs, wall=lambda: now) as at:
            office = at.service.office
            now += day / 2
            office.advance()
            assert office.authority.certificate == old
            assert office.waits_for() == (attic,)
            now += day  # it sleeps past its end, and knows the old one alone
            office.advance()
            assert office.authority.certificate != old
            assert office.authority_sha256 == old.fingerprint(SHA256()), "the service still shows what sleepers know"
            now += day
            office.advance()
            assert office.ledger.rotation is not None
            assert office.waits_for() == (attic,)
            # What was left half done is done again.
            succession.switch(certs)
            assert CertificateAuthority.load(certs).certificate == office.authority.certificate
            now += grace
            office.advance()
            assert office.ledger.rotation is None
            assert office.authorities_pem == office.authority.certificate_pem
            assert office.authority_sha256 != old.fingerprint(SHA256())


async def test_who_slept_through_the_change_renews_and_learns_of_it(tmp_path: Path) -> None:
    async with asyncio.timeout(120), identity_mesh(tmp_path / "certs") as at:
        await at.join(tmp_path, await at.token(), name="attic")
        directory = tmp_path / "certs" / "runner-attic"
        asleep = TlsIdentity.load(directory)
        office = at.service.office
        old = office.authority.certificate
        for _ in range(2):  # an admin who can't wait
            async with at.admin() as admin:
                await (
                    admin.rotate_authority() if office.ledger.rotation is None else admin.rotate_authority(at_once=True)
                )
        assert office.authority.certificate != old
        await CertificateKeeper(asleep, directory, renewal=at.where.named("identity")).renew()
        assert len(x509.load_pem_x509_certificates(asleep.ca_pem)) == 2
        x509.load_pem_x509_certificate(asleep.cert_pem).verify_directly_issued_by(office.authority.certificate)


async def test_a_folder_that_cannot_be_written_to_is_named_and_nothing_is_begun(tmp_path: Path) -> None:
    async with identity_mesh(tmp_path / "certs") as at:
        (tmp_path / "certs" / succession.NEXT_KEY).mkdir()
        with pytest.raises(CertificateError, match="cannot write"):
            at.service.office.rotate(by="test")
        assert at.service.office.ledger.rotation is None
