"""`chorus certs revoke`, `chorus token` and `chorus service install`, as an admin and a joined machine run them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner, Result

from chorus.cli.main import app
from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import now_utc
from chorus.identity.policy import load_policy
from tests.identity.identity_mesh import DOMAIN, IdentityMesh, identity_mesh

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def at(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[IdentityMesh]:
    async with identity_mesh(tmp_path_factory.mktemp("mesh") / "certs") as mesh:
        admin = mesh.authority.issue(SpiffeId(DOMAIN, Role.ADMIN, "cli"), load_policy(), now=now_utc())
        admin.write(mesh.certs)
        yield mesh


@pytest.fixture(autouse=True)
def admin_here(at: IdentityMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_HOME", str(at.certs.parent))
    monkeypatch.setenv("CHORUS_MESH__TRUST_DOMAIN", DOMAIN)
    monkeypatch.setenv("CHORUS_MESH__IDENTITY_SERVICE", str(at.endpoint))


async def chorus(*words: object) -> Result:
    result = await asyncio.to_thread(CliRunner().invoke, app, [*map(str, words)])
    assert "Traceback" not in result.output
    return result


def told(result: Result) -> Any:
    """The JSON that a command printed; the service in this process logs beside it."""
    return json.loads(result.stdout.splitlines()[-1])


async def test_revoke_shuts_out_and_undo_lets_in_again(at: IdentityMesh) -> None:
    out = await chorus("certs", "revoke", "runner-attic", "--why", "stolen")
    assert out.exit_code == 0, out.output
    assert f"spiffe://{DOMAIN}/runner/attic is out" in out.output.replace("\n", "")
    [revocation] = at.service.office.ledger.revocations.entries
    assert (revocation.identity, revocation.why) == (SpiffeId(DOMAIN, Role.RUNNER, "attic"), "stolen")
    undone = await chorus("certs", "revoke", "runner-attic", "--undo")
    assert undone.exit_code == 0, undone.output
    assert "may join again" in undone.output.replace("\n", " ")
    assert at.service.office.ledger.revocations.entries == ()


@pytest.mark.parametrize(
    ("node", "extra", "code", "said"),
    [
        ("attic", (), 2, "ROLE-NAME"),
        ("gardener-attic", (), 2, "gardener"),
        ("identity-identity", (), 2, "identity service"),
        ("spiffe://elsewhere/runner/attic", (), 2, "not of this mesh"),
        ("runner-attic", ("--undo",), 1, "is not revoked"),
    ],
)
async def test_what_cannot_be_revoked_is_said(node: str, extra: tuple[str, ...], code: int, said: str) -> None:
    refused = await chorus("certs", "revoke", node, *extra)
    assert (refused.exit_code, said in refused.output.replace("\n", " ")) == (code, True), refused.output


async def test_tokens_are_made_listed_and_taken_back() -> None:
    made = told(await chorus("token", "create", "--ttl", "90s", "--json"))
    assert (await chorus("token", "revoke", made["token_id"])).exit_code == 0
    [row] = told(await chorus("token", "list", "--json"))
    assert (row["token_id"], row["state"]) == (made["token_id"], "revoked")


async def test_without_an_identity_service_the_command_says_where_one_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CHORUS_MESH__IDENTITY_SERVICE")
    refused = await chorus("certs", "revoke", "runner-attic")
    assert refused.exit_code == 2
    assert "chorus up --lan" in refused.output.replace("\n", " ")


async def test_a_service_is_installed_by_who_has_joined_alone(
    at: IdentityMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    stranger = await chorus("service", "install", "--dir", tmp_path / "home")
    assert stranger.exit_code == 1
    assert "has joined no mesh yet" in stranger.output.replace("\n", " ")
    await at.join(tmp_path / "home", await at.token(Role.RUNNER), name="cellar", engine="fake")
    shown = await chorus("service", "install", "--print", "--dir", tmp_path / "home")
    assert shown.exit_code == 0, shown.output
    assert not await asyncio.to_thread((tmp_path / "config").exists)
    installed = await chorus("service", "install", "--dir", tmp_path / "home")
    assert installed.exit_code == 0, installed.output
    unit = Path(installed.stdout.strip())
    assert unit.is_relative_to(tmp_path / "config" / "systemd" / "user")
    assert await asyncio.to_thread(unit.read_text) == shown.stdout
    assert "systemctl --user enable --now" in installed.stderr.replace("\n", " ")


async def test_an_authority_is_replaced_step_by_step(at: IdentityMesh) -> None:
    old = at.service.office.authority_sha256.hex()
    steps = [
        (("--show",), old, "no other one takes over"),
        ((), old, "everybody is told of the one that takes over"),
        (("--at-once",), "", "and the old one is still believed"),
        (("--at-once",), "", "no other one takes over"),
    ]
    for options, signs, said in steps:
        done = await chorus("certs", "rotate", *options)
        assert done.exit_code == 0, done.output
        assert said in done.output.replace("\n", " ")
        assert signs in done.output.replace("\n", "")
    assert at.service.office.authority_sha256.hex() != old
    again = await chorus("certs", "rotate", "--at-once")
    assert again.exit_code != 0  # the admin's certificate, issued by hand, is of the old one
