"""`chorus certs`, from the first authority to a certificate that went bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chorus.cli.main import app
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.transport.tls import TlsIdentity


@pytest.fixture
def certs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("CHORUS_CONFIG", "CHORUS_MESH_CERTS_DIR", "CHORUS_MESH_TRUST_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHORUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "certs"


def chorus(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["certs", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def ok(*arguments: object) -> Result:
    result = chorus(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_a_mesh_from_nothing(certs: Path) -> None:
    ok("init", "--trust-domain", "home.internal")
    issued = ok("issue", "runner", "laptop", "-a", "laptop.lan", "-a", "10.0.0.7")
    assert issued.stdout == f"{certs / 'runner-laptop'}\n"
    assert "laptop.runner.home.internal" in issued.stderr
    ok("issue", "client", "alice", "--days", "5")
    assert str(TlsIdentity.load(certs / "runner-laptop").spiffe_id) == "spiffe://home.internal/runner/laptop"
    told = ok("verify").stdout
    assert told.count("ok ") == 3
    assert "warning: it expires within" in told


def test_show_and_verify_for_programs(certs: Path) -> None:
    ok("init")
    ok("issue", "runner", "laptop", "-a", "laptop.lan")
    [leaf] = json.loads(ok("show", "runner-laptop", "--json").stdout)
    assert leaf["identity"] == "spiffe://chorus.local/runner/laptop"
    assert leaf["names"][0] == "laptop.runner.chorus.local"
    assert {"laptop.lan", "127.0.0.1"} <= set(leaf["names"])
    assert leaf["key_mode"] == "0600"
    assert leaf["ok"] is True
    assert 364 * 86400 < leaf["remaining_s"] <= 365 * 86400
    assert len(leaf["sha256_fingerprint"]) == 64
    report = json.loads(ok("verify", "--json").stdout)
    assert report["ok"] is True
    assert [certificate["kind"] for certificate in report["certificates"]] == ["authority", "leaf"]


def test_show_for_people(certs: Path) -> None:
    ok("init")
    ok("issue", "admin", "root")
    shown = ok("show").stdout
    for text in ("spiffe://chorus.local/admin/root", "root.admin.chorus.local", "mode 0600"):
        assert text in shown
    assert "(30 days left)" in shown or "(29 days left)" in shown  # a second may have passed


def test_nothing_is_overwritten_without_force(certs: Path) -> None:
    ok("init")
    ok("issue", "client", "alice")
    before = (certs / "client-alice" / "tls.key").read_bytes()
    for arguments in (("init",), ("issue", "client", "alice")):
        result = chorus(*arguments)
        assert result.exit_code == 1
        assert "--force" in result.stderr
    assert (certs / "client-alice" / "tls.key").read_bytes() == before
    ok("issue", "client", "alice", "--force")
    assert (certs / "client-alice" / "tls.key").read_bytes() != before


def test_a_folder_elsewhere(certs: Path, tmp_path: Path) -> None:
    ok("init", "--dir", tmp_path / "ca")
    ok("issue", "client", "ci", "--dir", tmp_path / "ca", "--out", tmp_path / "ci")
    assert not certs.exists()
    assert "client-ci" in ok("verify", tmp_path / "ci" / "client-ci").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("issue", "client", "alice"), 1, "chorus certs init"),
        (("verify",), 1, "chorus certs init"),
        (("show", "runner-nobody"), 1, "there is no folder"),
        (("issue", "king", "alice"), 2, "king"),
        (("issue", "client", "Alice"), 2, "not a DNS label"),
        (("init", "--trust-domain", "Home Net"), 2, "not a DNS label"),
        (("issue", "client", "alice", "--days", "-1"), 2, "--days"),
        ((), 2, "Usage"),
    ],
)
@pytest.mark.usefixtures("certs")
def test_a_wrong_use_says_what_is_wrong(arguments: tuple[str, ...], code: int, says: str) -> None:
    if arguments[:2] == ("issue", "client") and code == 2:
        ok("init")
    result = chorus(*arguments)
    assert result.exit_code == code, result.output
    assert says in result.output


def test_an_address_of_somebody_else_is_a_wrong_use(certs: Path) -> None:
    ok("init")
    result = chorus("issue", "runner", "laptop", "-a", "registry.registry.chorus.local")
    assert result.exit_code == 2
    assert "could pose as it" in result.stderr
    assert not (certs / "runner-laptop").exists()


# --- verify finds what is wrong --------------------------------------------------------------------------------------

MESH = MeshCertificates("chorus.local")
OTHER = MeshCertificates("chorus.local")


def of_another_authority(path: Path) -> None:
    (path / "ca.crt").write_bytes(OTHER.authority.certificate_pem)


def expired(path: Path) -> None:
    old = MESH.expired(Role.RUNNER, "laptop")
    (path / "tls.crt").write_bytes(old.cert_pem)
    (path / "tls.key").write_bytes(old.key_pem)


def misplaced(path: Path) -> None:
    MESH.leaf(Role.RUNNER, "desktop").write(path.parent)
    for name in ("tls.crt", "tls.key"):
        (path / name).write_bytes((path.parent / "runner-desktop" / name).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: (path / "tls.key").chmod(0o644), "chmod 600"),
        (lambda path: (path / "tls.key").unlink(), "tls.key is missing"),
        (lambda path: (path / "tls.key").write_text("?"), "holds no PEM private key"),
        (lambda path: (path / "tls.crt").write_text("?"), "holds no PEM certificate"),
        (lambda path: (path / "ca.crt").unlink(), "ca.crt is missing"),
        (of_another_authority, "not signed by the authority"),
        (expired, "expired on"),
        (misplaced, "misplaced"),
        (lambda path: OTHER.authority.write(path.parent, replace=True), "authority that was replaced"),
    ],
)
def test_verify_says_what_is_wrong(certs: Path, spoil: Callable[[Path], object], says: str) -> None:
    MESH.authority.write(certs)
    path = MESH.leaf(Role.RUNNER, "laptop").write(certs)
    assert chorus("verify").exit_code == 0
    spoil(path)
    result = chorus("verify", "runner-laptop")
    assert result.exit_code == 1, result.output
    assert says in result.stdout
    report = json.loads(chorus("verify", "runner-laptop", "--json").stdout)
    assert report["ok"] is False
    assert chorus("show", "runner-laptop").exit_code == 0


def test_a_group_readable_key_is_a_warning(certs: Path) -> None:
    MESH.authority.write(certs)
    (MESH.leaf(Role.RUNNER, "laptop").write(certs) / "tls.key").chmod(0o640)
    assert "warning: tls.key is open to its group" in ok("verify").stdout


def test_a_certificate_that_ends_soon_still_works(certs: Path) -> None:
    MESH.authority.write(certs)
    leaf = MESH.authority.issue(MESH.id(Role.RUNNER, "laptop"), MESH.policy, now=MESH.now, lifetime=timedelta(days=3))
    leaf.write(certs)
    assert "expires within" in ok("verify").stdout
