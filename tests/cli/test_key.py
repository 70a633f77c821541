"""`chorus key` as an admin runs it, and `chorus ask` as somebody does who has a key and no certificate."""

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
from chorus.core.identity import Role
from chorus.local.certificates import CLIENT_NAME
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(home: Path) -> AsyncIterator[InProcessMesh]:
    certificates = MeshCertificates()
    certificates.leaf(Role.ADMIN, CLIENT_NAME).write(home / "certs")
    async with InProcessMesh(certificates=certificates, callers={"dir": home / "callers"}) as whole:
        yield whole


@pytest.fixture(autouse=True)
def admin_here(mesh: InProcessMesh, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_HOME", str(home))
    monkeypatch.setenv("CHORUS_MESH__TRUST_DOMAIN", mesh.certificates.authority.trust_domain)
    monkeypatch.setenv("CHORUS_CLIENT__COORDINATORS", mesh.coordinator_endpoints()[0])


async def chorus(*words: object) -> Result:
    result = await asyncio.to_thread(CliRunner().invoke, app, [*map(str, words)])
    assert "Traceback" not in result.output
    return result


def told(result: Result) -> Any:
    """The JSON that a command printed; the services in this process log beside it."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


async def test_a_key_is_made_used_seen_and_taken_back(
    mesh: InProcessMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ann.key"
    made = await chorus("key", "create", "ann", "--requests-per-minute", 2, "--ttl", "1h", "--out", file, "--json")
    facts = told(made)
    assert "key" not in facts
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().strip() not in made.output
    again = await chorus("key", "create", "ann", "--out", file)
    assert again.exit_code == 2
    assert "exists already" in again.output

    where = f"coordinator-1@{mesh.coordinators[0].side_addresses['callers']}"
    monkeypatch.setenv("CHORUS_MESH__CERTS_DIR", str(tmp_path / "elsewhere"))  # no certificate there
    ask = ("ask", "--no-stats", "--coordinator", where, "--ca", facts["authority_sha256"], "-n", 3, "hello")
    by_flag = await chorus(*ask[:-1], "--api-key-file", file, "hello")
    assert by_flag.exit_code == 0, by_flag.output
    assert by_flag.stdout.strip()
    monkeypatch.setenv("CHORUS_API_KEY_FILE", str(file))
    assert (await chorus(*ask)).exit_code == 0
    refused = await chorus(*ask)
    assert refused.exit_code == 1
    assert "2 requests in a minute; there is more in" in refused.output
    nobody = await chorus("ask", "--coordinator", where, "hello")
    assert nobody.exit_code == 2
    assert "client.ca" in nobody.output


async def test_keys_are_listed_with_what_was_used_and_revoked() -> None:
    made = await chorus("key", "create", "ben", "--model", "qwen*", "--concurrent", 3)
    assert made.exit_code == 0, made.output
    (line,) = (line for line in made.stdout.splitlines() if line.startswith("chorus_"))
    key_id = line.split("_")[1]
    listed = told(await chorus("key", "list", "--json"))
    (row,) = (one for one in listed if one["key_id"] == key_id)
    assert (row["name"], row["state"], row["models"], row["limits"]["concurrent"]) == ("ben", "open", ["qwen*"], 3)
    assert "3 concurrent" in " ".join((await chorus("key", "list")).stdout.split())
    used = told(await chorus("key", "usage", key_id, "--json"))
    assert used["requests"] == 0
    assert (await chorus("key", "revoke", key_id)).exit_code == 0
    listed = told(await chorus("key", "list", "--json"))
    assert {one["key_id"]: one["state"] for one in listed}[key_id] == "revoked"
    unknown = await chorus("key", "usage", "0" * 16)
    assert unknown.exit_code == 1
    assert "chorus key list" in unknown.output


async def test_wrong_words_are_said(mesh: InProcessMesh) -> None:
    for words in (("--strategy", "votes"), ("--priority", "soon"), ("--ttl", "soon"), ("--requests-per-minute", "-1")):
        wrong = await chorus("key", "create", "x", *words)
        assert wrong.exit_code in (1, 2), wrong.output
