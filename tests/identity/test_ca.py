from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.errors import CertificateError, ConfigError, InvalidRequestError
from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import CertificateAuthority, leaf_directory
from chorus.identity.policy import load_policy
from chorus.transport.tls import TlsIdentity

POLICY = load_policy()
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
AUTHORITY = CertificateAuthority.create(POLICY, now=NOW, trust_domain="home.internal")


def identity(role: Role = Role.RUNNER, name: str = "laptop") -> SpiffeId:
    return SpiffeId("home.internal", role, name)


def certificate(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


@pytest.mark.parametrize("role", Role)
def test_a_leaf_says_who_it_is_and_what_it_is_for(role: Role) -> None:
    leaf = certificate(AUTHORITY.issue(identity(role), POLICY, now=NOW, addresses=["10.0.0.7", "laptop.lan"]).cert_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://home.internal/{role}/laptop"]
    assert names.get_values_for_type(x509.DNSName) == [f"laptop.{role}.home.internal", "laptop.lan"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    purposes = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    serving = {ExtendedKeyUsageOID.SERVER_AUTH} if role not in (Role.CLIENT, Role.ADMIN) else set()
    assert purposes == {ExtendedKeyUsageOID.CLIENT_AUTH} | serving
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
    own = AUTHORITY.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    issuer = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert issuer.key_identifier == own.digest
    leaf.verify_directly_issued_by(AUTHORITY.certificate)


def test_the_authority_may_sign_leaves_and_nothing_else() -> None:
    constraints = AUTHORITY.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca
    assert constraints.value.path_length == 0
    usage = AUTHORITY.certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature


def test_lifetimes_are_the_policys_and_never_beyond_the_authoritys() -> None:
    for role in Role:
        leaf = certificate(AUTHORITY.issue(identity(role), POLICY, now=NOW).cert_pem)
        assert leaf.not_valid_after_utc == NOW + POLICY.lifetimes[role]
        assert leaf.not_valid_before_utc == NOW - POLICY.backdate
    late = AUTHORITY.not_after - timedelta(days=1)
    assert AUTHORITY.issue(identity(), POLICY, now=late).not_after == AUTHORITY.not_after
    with pytest.raises(CertificateError, match="expired"):
        AUTHORITY.issue(identity(), POLICY, now=AUTHORITY.not_after)
    with pytest.raises(CertificateError, match="set the clock"):
        AUTHORITY.issue(identity(), POLICY, now=NOW - timedelta(days=1))


def test_every_key_and_serial_is_new() -> None:
    leaves = [AUTHORITY.issue(identity(), POLICY, now=NOW) for _ in range(2)]
    assert leaves[0].key_pem != leaves[1].key_pem
    assert certificate(leaves[0].cert_pem).serial_number != certificate(leaves[1].cert_pem).serial_number


@pytest.mark.parametrize("role", Role)
def test_no_leaf_carries_another_identitys_name(role: Role) -> None:
    for address in (
        f"registry.{role}.home.internal",
        f"REGISTRY.{role}.home.internal.",
        f"{role}.home.internal",
        f"a.b.{role}.home.internal",
        "node-1.node.home.internal",
    ):
        with pytest.raises(InvalidRequestError, match="could pose as it"):
            AUTHORITY.issue(identity(Role.COORDINATOR, "one"), POLICY, now=NOW, addresses=[address])


@pytest.mark.parametrize("address", ["*.lan", "*", "a b", "", "10.0.0.7:7101", "-a.lan", "a..lan", "a" * 64 + ".lan"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="neither an IP address nor"):
        AUTHORITY.issue(identity(), POLICY, now=NOW, addresses=[address])


@given(st.lists(st.ip_addresses().map(str), max_size=4))
def test_any_ip_address_can_be_named_once(addresses: list[str]) -> None:
    leaf = certificate(AUTHORITY.issue(identity(), POLICY, now=NOW, addresses=addresses * 2).cert_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == list(dict.fromkeys(addresses))


def test_another_meshs_identity_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not of this authority's trust domain"):
        AUTHORITY.issue(SpiffeId("elsewhere.internal", Role.RUNNER, "a"), POLICY, now=NOW)


# --- files -----------------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> object:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_keys_are_their_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "certs"
    AUTHORITY.write(directory)
    path = AUTHORITY.issue(identity(), POLICY, now=NOW).write(directory)
    assert path == leaf_directory(directory, identity()) == directory / "runner-laptop"
    assert mode(directory) == mode(path) == 0o700
    assert mode(directory / "ca.key") == mode(path / "tls.key") == 0o600
    assert mode(directory / "ca.crt") == mode(path / "tls.crt") == mode(path / "ca.crt") == 0o644
    assert sorted(entry.name for entry in directory.iterdir()) == ["ca.crt", "ca.key", "runner-laptop"]
    assert sorted(entry.name for entry in path.iterdir()) == ["ca.crt", "tls.crt", "tls.key"]


def test_a_key_is_never_readable_by_others_not_even_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real_open = os.open

    def watched(path: object, flags: int, given: int = 0o777, **kwargs: object) -> int:
        descriptor = real_open(path, flags, given, **kwargs)  # type: ignore[call-overload]
        opened.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        assert flags & os.O_EXCL
        return int(descriptor)

    before = os.umask(0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", watched)
            AUTHORITY.write(tmp_path / "certs")
    finally:
        os.umask(before)
    assert opened == [0o600, 0o600]


def test_what_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path)
    first = AUTHORITY.issue(identity(), POLICY, now=NOW)
    path = first.write(tmp_path)
    with pytest.raises(CertificateError, match="exists already; --force"):
        AUTHORITY.write(tmp_path)
    second = AUTHORITY.issue(identity(), POLICY, now=NOW)
    with pytest.raises(CertificateError, match="exists already; --force"):
        second.write(tmp_path)
    assert (path / "tls.key").read_bytes() == first.key_pem
    assert second.write(tmp_path, replace=True) == path
    assert (path / "tls.key").read_bytes() == second.key_pem
    assert mode(path / "tls.key") == 0o600
    assert TlsIdentity.load(path, now=NOW).spiffe_id == identity()


def test_half_an_authority_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "ca.key").write_text("precious")
    with pytest.raises(CertificateError, match="exists already"):
        AUTHORITY.write(tmp_path)
    assert (tmp_path / "ca.key").read_text() == "precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ca.key"]


def test_an_authority_is_read_back(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path)
    again = CertificateAuthority.load(tmp_path)
    assert again.trust_domain == "home.internal"
    leaf = certificate(again.issue(identity(), POLICY, now=NOW).cert_pem)
    leaf.verify_directly_issued_by(AUTHORITY.certificate)


def test_what_is_no_authority_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="chorus certs init"):
        CertificateAuthority.load(tmp_path)
    AUTHORITY.write(tmp_path)
    (tmp_path / "ca.key").write_bytes(AUTHORITY.issue(identity(), POLICY, now=NOW).key_pem)
    with pytest.raises(CertificateError, match="is not the key of"):
        CertificateAuthority.load(tmp_path)
    (tmp_path / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    with pytest.raises(CertificateError, match="damaged"):
        CertificateAuthority.load(tmp_path)


# --- the policy ------------------------------------------------------------------------------------------------------


def test_the_documented_policy_is_the_packages_own() -> None:
    root = Path(__file__).parents[2]
    documented, packaged = root / "certs" / "policy.toml", root / "services" / "chorus" / "identity" / "policy.toml"
    assert documented.read_text() == packaged.read_text()
    assert load_policy(documented) == POLICY


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("runner = 365", "runner = 0", "runner must be a number over 0"),
        ("runner = 365", "runner = true", "runner must be a number over 0"),
        ("runner = 365", "", "runner must be a number over 0"),
        ("runner = 365", "runer = 365", "lifetime_days.runer is unknown"),
        ("[lifetime_days]", "[lifetimes]", "lifetime_days must be a table"),
        ('"chorus.local"', '"Chorus Local"', "not a DNS label"),
        ("backdate_minutes = 60", "backdate_minutes = ", "is not TOML"),
    ],
)
def test_a_bad_policy_names_the_key(tmp_path: Path, before: str, after: str, says: str) -> None:
    packaged = Path(__file__).parents[2] / "services" / "chorus" / "identity" / "policy.toml"
    text = packaged.read_text()
    assert before in text
    path = tmp_path / "policy.toml"
    path.write_text(text.replace(before, after))
    with pytest.raises(ConfigError) as caught:
        load_policy(path)
    assert says in caught.value.message
    assert str(path) in caught.value.message
