"""What services note: requests by caller, models loaded and unloaded, caches cleared, tokens, members."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chorus.api.runner.v1 import runner_pb2, runner_pb2_grpc
from chorus.cli.main import app
from chorus.core.audit import DeedKind
from chorus.core.callers import Limits, Scopes
from chorus.core.errors import ChorusError, PermissionDeniedError, QuotaExceededError
from chorus.core.identity import Role
from chorus.store.audit_log import audit_files, entries, find_logs, verify_log
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from chorus.transport import open_channel
from tests.identity.identity_mesh import identity_mesh

MESH = MeshCertificates()


def deeds(log: Path) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(what, who without the mesh, to what, facts) of each entry."""
    return [
        (
            entry.deed.kind,
            entry.deed.by.removeprefix(f"spiffe://{MESH.authority.trust_domain}/"),
            entry.deed.target,
            dict(entry.deed.facts),
        )
        for entry in entries(log)
        if entry.deed.kind != DeedKind.LOG_OPENED
    ]


async def used(directory: Path, *, prompts: bool) -> None:
    """A mesh's day: requests that are answered and refused, a cache that is cleared, a model that goes and comes."""
    audit = {"dir": directory, "prompts": prompts}
    async with InProcessMesh(certificates=MESH, audit=audit) as mesh:
        kim, root = mesh.client(name="kim"), mesh.client(role=Role.ADMIN, name="root")
        await kim.complete("echo:a secret", cache="exact")
        await kim.complete("echo:a secret", cache="exact")
        with pytest.raises(ChorusError):
            await kim.complete("echo:hello", model="unheard-of")
        await root.clear_cache(everybody=True)
        channel = open_channel(
            mesh.runners[0].address, identity=MESH.identity(Role.ADMIN, "root"), server=MESH.id(Role.RUNNER, "runner-1")
        )
        async with channel:
            stub: Any = runner_pb2_grpc.ModelRunnerStub(channel)
            [model] = {model.artifact.name for model in (await stub.ListModels(runner_pb2.ListModelsRequest())).models}
            await stub.UnloadModel(runner_pb2.UnloadModelRequest(model=model))
            async for _ in stub.LoadModel(runner_pb2.LoadModelRequest(model=model)):
                pass


async def test_what_a_key_may_not_have_is_noted_and_many_of_a_kind_are_one_entry(tmp_path: Path) -> None:
    ca, file = tmp_path / "ca.crt", tmp_path / "ann.key"
    ca.write_bytes(MESH.authority.certificate_pem)
    audit, callers = {"dir": tmp_path / "audit"}, {"dir": tmp_path / "callers"}
    async with asyncio.timeout(60), InProcessMesh(certificates=MESH, audit=audit, callers=callers) as mesh:
        root = mesh.client(role=Role.ADMIN, name="root")
        model = (await root.list_models()).models[0].artifact.family
        key, text = await root.keys.create("ann", scopes=Scopes((model,)), limits=Limits(requests_per_minute=1))
        file.touch(mode=0o600)
        file.write_text(text)
        ann = mesh.key_client(file, ca=str(ca))
        await ann.complete("hello", model=model, max_tokens=2)
        for asked, refused in (("another", PermissionDeniedError), (model, QuotaExceededError)):
            for _ in range(3):
                with pytest.raises(refused):
                    await ann.complete("hello", model=asked, max_tokens=2)
    told = [
        deed[1:] for deed in deeds(tmp_path / "audit" / "coordinator-coordinator-1") if deed[0] == "request.refused"
    ]
    assert [(target, facts["reason"], facts["unnoted"]) for _, target, facts in told] == [
        ("another", "PERMISSION_DENIED", 0),
        (model, "QUOTA_EXCEEDED", 0),
    ]
    assert (told[0][2]["scope"], told[1][2]["quota"]) == ("models", "requests_per_minute")
    assert all(who.endswith(f"/client/key-{key.key_id}") for who, _, _ in told)


async def test_who_did_what_is_there_whole_and_shown_and_prompts_are_not(tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        await used(tmp_path, prompts=False)
    coordinator, runner = tmp_path / "coordinator-coordinator-1", tmp_path / "runner-runner-1"
    assert find_logs(tmp_path) == [coordinator, runner]
    assert not any(verify_log(log).problems for log in (coordinator, runner))
    told = deeds(coordinator)
    assert [(what, who) for what, who, _, _ in told] == [
        ("request.received", "client/kim"),
        ("request.finished", "client/kim"),
        ("request.received", "client/kim"),  # answered out of the cache
        ("request.received", "client/kim"),
        ("request.refused", "client/kim"),
        ("cache.cleared", "admin/root"),
    ]
    assert told[0][3]["request_id"] == told[1][3]["request_id"]
    assert told[1][3]["outcome"] == "completed"
    assert told[4][2:] == ("unheard-of", {"request_id": told[3][3]["request_id"], "reason": "UNKNOWN_MODEL"})
    assert told[5][3] == {"everybody": True, "forgotten": 1}
    models = [(what, who) for what, who, _, _ in deeds(runner)]
    assert models[-4:] == [
        ("model.unload_asked", "admin/root"),
        ("model.unloaded", "runner/runner-1"),
        ("model.load_asked", "admin/root"),
        ("model.loaded", "runner/runner-1"),
    ]
    file = audit_files(coordinator)[0]
    assert b"a secret" not in file.read_bytes()
    shown = CliRunner().invoke(app, ["audit", "show", str(tmp_path), "--by", "root"])
    assert shown.exit_code == 0
    assert [line.split()[2] for line in shown.stdout.splitlines()] == [
        "cache.cleared",
        "model.unload_asked",
        "model.load_asked",
    ]
    assert CliRunner().invoke(app, ["audit", "verify", str(tmp_path)]).exit_code == 0
    file.write_bytes(file.read_bytes().replace(b"client/kim", b"client/pat", 1))
    found = CliRunner().invoke(app, ["audit", "verify", str(tmp_path)])
    assert found.exit_code == 1
    assert "damaged  coordinator-coordinator-1" in found.stdout
    assert "which was changed" in found.stdout


async def test_prompts_are_there_where_they_are_wanted(tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        await used(tmp_path, prompts=True)
    received = [facts for what, _, _, facts in deeds(tmp_path / "coordinator-coordinator-1") if what.endswith("ceived")]
    assert "a secret" in received[0]["prompt"]


async def test_the_identity_service_notes_tokens_and_members(tmp_path: Path) -> None:
    async with asyncio.timeout(60), identity_mesh(tmp_path / "certs") as at, at.admin() as admin:
        line = await at.token(Role.RUNNER)
        joined = await at.join(tmp_path / "home", line)
        _, unused, _ = await admin.create_token(Role.RUNNER, ttl_s=60)
        await admin.revoke_token(unused.token_id)
        await admin.revoke(joined.identity, "stolen")
        await admin.restore(joined.identity)
        log = tmp_path / "certs" / "audit" / "identity-identity"
        # What was answered is on disk, while the service still runs.
        told = [
            (entry.deed.kind, entry.deed.by.rpartition("/")[2], entry.deed.target.rpartition("/")[2])
            for entry in entries(log)
        ]
        assert told == [
            ("log.opened", "", ""),
            ("token.created", "root", line.token_id),
            ("token.used", "attic", line.token_id),
            ("member.joined", "attic", "attic"),
            ("token.created", "root", unused.token_id),
            ("token.revoked", "root", unused.token_id),
            ("member.revoked", "root", "attic"),
            ("member.restored", "root", "attic"),
        ]
        assert verify_log(log).problems == []
        assert line.secret.hex() not in log.joinpath("000000000001.jsonl").read_text()


def test_where_nothing_is_noted_the_command_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHORUS_HOME", str(tmp_path))
    found = CliRunner().invoke(app, ["audit", "verify"])
    assert found.exit_code == 1
    assert str(tmp_path / "audit") in found.output.replace("\n", "")
