"""What a service says when its certificate will not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chorus.core.errors import CertificateError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport.tls import TlsIdentity

MESH = MeshCertificates("home.internal")
OTHER = MeshCertificates("home.internal")


def write(directory: Path) -> Path:
    return MESH.leaf(Role.RUNNER, "laptop").write(directory)


def test_a_good_one_is_loaded(tmp_path: Path) -> None:
    identity = TlsIdentity.load(write(tmp_path))
    assert identity.spiffe_id == MESH.id(Role.RUNNER, "laptop")
    assert identity.not_after > MESH.now
    assert b"PRIVATE KEY" in identity.key_pem
    assert "PRIVATE" not in repr(identity)


def swap_key(path: Path) -> None:
    (path / "tls.key").write_bytes(MESH.leaf(Role.RUNNER, "laptop").key_pem)


def swap_authority(path: Path) -> None:
    (path / "ca.crt").write_bytes(OTHER.authority.certificate_pem)


def show_authority(path: Path) -> None:
    MESH.authority.write(path.parent / "authority")
    (path / "tls.crt").write_bytes(MESH.authority.certificate_pem)
    (path / "tls.key").write_bytes((path.parent / "authority" / "ca.key").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: (path / "tls.crt").unlink(), "tls.crt is missing"),
        (lambda path: (path / "tls.key").unlink(), "tls.key is missing"),
        (lambda path: (path / "ca.crt").unlink(), "ca.crt is missing"),
        (lambda path: (path / "tls.crt").write_text("nonsense"), "tls.crt is damaged"),
        (lambda path: (path / "tls.key").write_text("nonsense"), "tls.key is damaged"),
        (lambda path: (path / "ca.crt").write_bytes(b""), "ca.crt is damaged"),
        (lambda path: (path / "tls.key").chmod(0o644), "chmod 600"),
        (swap_key, "is not the key of tls.crt"),
        (swap_authority, "was not signed by the authority in ca.crt"),
        (show_authority, "not one of a mesh"),
    ],
)
def test_a_bad_one_is_refused_with_the_fix(tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    path = write(tmp_path)
    spoil(path)
    with pytest.raises(CertificateError) as caught:
        TlsIdentity.load(path)
    assert says in caught.value.message
    assert str(path) in caught.value.message


def test_a_folder_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="chorus certs issue"):
        TlsIdentity.load(tmp_path / "runner-laptop")


def test_dates_are_checked_at_the_start(tmp_path: Path) -> None:
    path = write(tmp_path)
    identity = TlsIdentity.load(path)
    with pytest.raises(CertificateError, match="issue it anew"):
        TlsIdentity.load(path, now=identity.not_after)
    with pytest.raises(CertificateError, match="set the clock"):
        TlsIdentity.load(path, now=MESH.now - MESH.policy.backdate * 2)
