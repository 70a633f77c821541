"""Runners that join: the Job's tokens in a Secret of a simulated API server, redeemed at a real identity service."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from chorus.config import Endpoint
from chorus.core.errors import CertificateError, ConfigError, RevokedError, TokenNodeError
from chorus.core.identity import Role, SpiffeId
from chorus.k8s.enrolling import TOKENS_SECRET, invite_with, join_once
from chorus.k8s.secrets import Secrets
from chorus.transport.tls import TlsIdentity
from tests.deploy.api_server import ApiServer, serving
from tests.identity.identity_mesh import DOMAIN, IdentityMesh, identity_mesh

PATH = f"/api/v1/namespaces/chorus/secrets/{TOKENS_SECRET}"


class Scene:
    """An identity service and a cluster with its admin's Secret; `certs` are the folders that nodes keep."""

    def __init__(self, mesh: IdentityMesh, api: ApiServer, secrets: Secrets, folder: Path) -> None:
        self.mesh, self.api, self.secrets, self._folder = mesh, api, secrets, folder
        admin = mesh.identity(Role.ADMIN, "operator")
        leaf = {"ca.crt": admin.ca_pem, "tls.crt": admin.cert_pem, "tls.key": admin.key_pem}
        secrets.create("chorus-admin-tls", leaf)

    def certs(self, node: str) -> Path:
        return self._folder / node

    async def invite(self, *nodes: str) -> tuple[tuple[str, ...], ...]:
        """A run of the Job: who was invited, whose token stays, whose was taken away."""
        return await self.invite_named({node: node for node in nodes})

    async def invite_named(self, runners: dict[str, str]) -> tuple[tuple[str, ...], ...]:
        """The same, of runners each with its node."""
        done = await invite_with(self.secrets.cluster, self.mesh.endpoint, runners, self.mesh.service.office.now)
        return done.invited, done.kept, done.withdrawn

    async def join(self, node: str, runner: str = "") -> bool:
        """What the pod on that node does before its runner starts, which is called so too unless `runner` is said."""
        tokens = self._folder / "tokens"
        tokens.mkdir(exist_ok=True)
        for old in tokens.iterdir():
            old.unlink()
        for name, text in self.api.objects[PATH]["data"].items():
            (tokens / name).write_bytes(base64.b64decode(text))
        where = Endpoint.parse(self.mesh.service.join_address)
        return await asyncio.to_thread(join_once, runner or node, node, tokens, where, self.certs(node))

    def leaf(self, node: str, runner: str = "") -> TlsIdentity:
        return TlsIdentity.load(self.certs(node) / f"runner-{runner or node}")


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    (tmp_path / "account").mkdir()
    with serving(tmp_path / "account") as (api, cluster):
        async with identity_mesh(tmp_path / "authority") as mesh:
            yield Scene(mesh, api, Secrets(cluster), tmp_path)


async def test_each_node_joins_once_with_its_own_token(scene: Scene):
    assert await scene.invite("desktop", "laptop") == (("desktop", "laptop"), (), ())
    assert await scene.invite("desktop", "laptop") == ((), ("desktop", "laptop"), ())
    assert await scene.join("desktop")
    leaf = scene.leaf("desktop")
    assert (leaf.spiffe_id, leaf.node) == (SpiffeId(DOMAIN, Role.RUNNER, "desktop"), "desktop")
    assert (scene.certs("desktop") / "runner-desktop" / "tls.key").stat().st_mode & 0o777 == 0o600
    # Its pod starts again: with the key that it has, and whether or not the used token lies there still.
    assert not await scene.join("desktop")
    assert await scene.invite("desktop", "laptop") == ((), ("laptop",), ("desktop",))
    assert not await scene.join("desktop")
    assert scene.leaf("desktop").key_pem == leaf.key_pem
    assert set(scene.api.objects[PATH]["data"]) == {"laptop"}


async def test_a_node_that_lost_its_key_needs_a_token_by_hand(scene: Scene):
    await scene.invite("attic")
    await scene.join("attic")
    await scene.invite("attic")
    for path in (scene.certs("attic") / "runner-attic").iterdir():
        path.unlink()
    (scene.certs("attic") / "runner-attic").rmdir()
    with pytest.raises(CertificateError, match=r"chorus token create --name attic --node attic"):
        await scene.join("attic")
    assert await scene.invite("attic") == ((), (), ())
    line = await scene.mesh.token(name="attic")
    scene.api.objects[PATH]["data"]["attic"] = base64.b64encode(str(line).encode()).decode()
    assert await scene.invite("attic") == ((), ("attic",), ())
    assert await scene.join("attic")


async def test_who_was_shut_out_is_not_invited_again(scene: Scene):
    await scene.invite("attic")
    async with scene.mesh.admin() as admin:
        await admin.revoke(SpiffeId(DOMAIN, Role.RUNNER, "attic"), "lost")
    with pytest.raises(RevokedError):
        await scene.join("attic")
    assert await scene.invite("attic") == ((), (), ("attic",))
    assert await scene.invite("attic") == ((), (), ())


async def test_a_node_that_is_gone_has_its_token_taken_away(scene: Scene):
    await scene.invite("attic", "desktop")
    assert await scene.invite("desktop") == ((), ("desktop",), ("attic",))


async def test_what_is_no_token_is_replaced(scene: Scene):
    await scene.invite("attic")
    scene.api.objects[PATH]["data"]["attic"] = base64.b64encode(b"chorus1_half").decode()
    assert await scene.invite("attic") == (("attic",), (), ())
    assert await scene.join("attic")


async def test_a_token_that_lies_ready_for_a_node_is_good_on_no_other_one(scene: Scene):
    """All nodes with a runner can read all tokens."""
    await scene.invite("desktop", "attic")
    with pytest.raises(TokenNodeError, match="node is attic"):
        await scene.join("desktop", "attic")
    assert await scene.join("attic")


async def test_a_runner_of_a_statefulset_is_of_the_node_from_which_it_joins(scene: Scene):
    name = "chorus-runner-0"
    assert await scene.invite_named({name: ""}) == ((name,), (), ())
    assert await scene.join("attic", name)
    leaf = scene.leaf("attic", name)
    assert (leaf.spiffe_id, leaf.node) == (SpiffeId(DOMAIN, Role.RUNNER, name), "attic")
    assert await scene.invite_named({name: ""}) == ((), (), (name,))


async def test_without_an_identity_service_nobody_is_invited(scene: Scene):
    with pytest.raises(ConfigError, match=r"mesh\.identity_service"):
        await invite_with(scene.secrets.cluster, None, {"attic": "attic"}, 0.0)
