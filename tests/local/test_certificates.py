"""Certificates are made once, and again only where those that are there no longer do."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from chorus.core.errors import CertificateError
from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import leaf_directory, now_utc
from chorus.local.certificates import ensure_authority, ensure_leaves
from chorus.transport.tls import KEY_FILE, TlsIdentity

WANTED = {(Role.REGISTRY, "registry"): ("localhost", "127.0.0.1"), (Role.CLIENT, "cli"): ()}


def test_they_are_made_once(tmp_path: Path) -> None:
    authority = ensure_authority(tmp_path, trust_domain=None)
    made = ensure_leaves(tmp_path, authority, WANTED)
    assert [identity.name for identity in made] == ["registry", "cli"]
    again = ensure_authority(tmp_path, trust_domain=authority.trust_domain)
    assert again.certificate == authority.certificate
    assert ensure_leaves(tmp_path, again, WANTED) == []
    for identity in made:
        assert TlsIdentity.load(leaf_directory(tmp_path, identity)).spiffe_id == identity
        assert leaf_directory(tmp_path, identity).joinpath(KEY_FILE).stat().st_mode & 0o777 == 0o600


def test_a_new_address_makes_that_certificate_anew_and_no_other(tmp_path: Path) -> None:
    authority = ensure_authority(tmp_path, trust_domain=None)
    ensure_leaves(tmp_path, authority, WANTED)
    wider = WANTED | {(Role.REGISTRY, "registry"): ("localhost", "127.0.0.1", "192.168.7.20")}
    assert ensure_leaves(tmp_path, authority, wider) == [
        SpiffeId(authority.trust_domain, Role.REGISTRY, "registry"),
    ]
    assert ensure_leaves(tmp_path, authority, wider) == []
    assert ensure_leaves(tmp_path, authority, WANTED) == []  # naming more than is needed does no harm


def test_services_that_renew_get_short_ones_and_keep_their_keys(tmp_path: Path) -> None:
    authority, day = ensure_authority(tmp_path, trust_domain=None), timedelta(days=1)
    ensure_leaves(tmp_path, authority, WANTED)
    long = TlsIdentity.load(tmp_path / "registry-registry")
    [made] = ensure_leaves(tmp_path, authority, WANTED, renewed=day)  # the command's own stays
    assert made == long.spiffe_id
    short = TlsIdentity.load(tmp_path / "registry-registry")
    assert short.not_after <= now_utc() + day
    assert short.key_pem == long.key_pem
    assert ensure_leaves(tmp_path, authority, WANTED, renewed=day) == []
    # More than half of a longer life is over: as if it had not run for a while.
    assert ensure_leaves(tmp_path, authority, WANTED, renewed=2 * day + timedelta(hours=1)) == [made]
    assert TlsIdentity.load(tmp_path / "registry-registry").key_pem == long.key_pem
    # Nobody renews it any more.
    assert ensure_leaves(tmp_path, authority, WANTED) == [made]


def test_a_runners_names_this_machine_and_is_made_anew_where_it_names_another(tmp_path: Path) -> None:
    authority = ensure_authority(tmp_path, trust_domain=None)
    wanted = WANTED | {(Role.RUNNER, "runner-1"): ("127.0.0.1",)}
    ensure_leaves(tmp_path, authority, wanted)  # as a version before made them
    [made] = ensure_leaves(tmp_path, authority, wanted, node="node-1")
    assert (made.role, TlsIdentity.load(leaf_directory(tmp_path, made)).node) == (Role.RUNNER, "node-1")
    assert ensure_leaves(tmp_path, authority, wanted, node="node-1") == []
    assert ensure_leaves(tmp_path, authority, wanted, node="node-2") == [made]


def test_what_another_authority_signed_or_is_damaged_is_made_anew(tmp_path: Path) -> None:
    authority = ensure_authority(tmp_path / "old", trust_domain=None)
    ensure_leaves(tmp_path / "old", authority, WANTED)
    other = ensure_authority(tmp_path / "new", trust_domain=None)
    (tmp_path / "old" / "registry-registry").rename(tmp_path / "new" / "registry-registry")
    assert len(ensure_leaves(tmp_path / "new", other, WANTED)) == 2
    key = tmp_path / "new" / "client-cli" / KEY_FILE
    key.write_bytes(key.read_bytes()[:40])
    assert [identity.name for identity in ensure_leaves(tmp_path / "new", other, WANTED)] == ["cli"]


def test_half_an_authority_is_no_reason_to_make_another(tmp_path: Path) -> None:
    ensure_authority(tmp_path, trust_domain=None)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(CertificateError):
        ensure_authority(tmp_path, trust_domain=None)


def test_an_authority_of_another_mesh_is_refused(tmp_path: Path) -> None:
    ensure_authority(tmp_path, trust_domain="attic.example")
    with pytest.raises(CertificateError, match=r"attic\.example"):
        ensure_authority(tmp_path, trust_domain="cellar.example")
