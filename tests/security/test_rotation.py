"""A mesh whose certificates live for seconds: it rotates under streams, and who slept comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from chorus.client import MeshClient
from chorus.core.errors import ChorusError
from chorus.core.identity import Role
from chorus.transport import TlsIdentity
from chorus.transport.keeping import CertificateKeeper
from tests.identity.identity_mesh import identity_mesh
from tests.security.rotating_mesh import RotatingMesh

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIFE_S = 8.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RotatingMesh]:
    folder = tmp_path_factory.mktemp("rotating")
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(identity_mesh(folder / "certs", leaf_lifetime_s=LIFE_S))
        rotating = RotatingMesh(at, folder, stack)
        await rotating.start(runners=2)
        yield rotating


async def test_streams_go_on_while_every_certificate_is_replaced_again_and_again(
    mesh: RotatingMesh, tmp_path: Path
) -> None:
    me = await mesh.identity(Role.CLIENT, "kim")
    answers = 0
    folder = tmp_path / "certs" / "client-app"
    await mesh.at.join(tmp_path, await mesh.at.token(Role.CLIENT), name="app")
    first = TlsIdentity.load(folder)
    # What a program of somebody else's does, that was told where its certificate is and where it is renewed.
    app = MeshClient.connect(f"coordinator@{mesh.coordinator}", certificates=folder, renewal=str(mesh.at.where))
    async with mesh.client(me) as client, app:
        while (
            min(len(seen) for seen in mesh.serials.values()) < 2
            or TlsIdentity.load(folder).not_after == first.not_after
        ):
            assert (await app.complete("echo:an app")).text == "an app"
            text = f"answer {answers} of a mesh that never stops"
            completion = await client.complete(f"echo:{text}")
            assert completion.text == text
            answers += 1
    async with mesh.client(me, direct="always") as client:
        assert (await client.complete("echo:and direct")).text == "and direct"
    assert answers > 0


async def test_who_was_away_past_its_end_comes_back(mesh: RotatingMesh, tmp_path: Path) -> None:
    await mesh.at.join(tmp_path, await mesh.at.token(Role.CLIENT), name="sleeper")
    directory = tmp_path / "certs" / "client-sleeper"
    identity = TlsIdentity.load(directory)
    await asyncio.sleep(identity.not_after.timestamp() - time.time() + 0.1)  # it sleeps, as TLS counts
    async with mesh.client(identity) as client:
        with pytest.raises(ChorusError):
            await client.complete("echo:hello", timeout_s=2)
        await CertificateKeeper(identity, directory, renewal=mesh.at.where.named("identity")).renew()
        assert (await client.complete("echo:hello")).text == "hello"
