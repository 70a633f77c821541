"""How commands reach the identity service, as an admin."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import chorus.cli.quiet  # noqa: F401
from chorus.client.identity import IdentityClient
from chorus.config import Endpoint
from chorus.core.errors import ConfigError
from chorus.core.identity import Role
from chorus.local.certificates import CLIENT_NAME
from chorus.local.connect import client_config
from chorus.local.home import MeshHome
from chorus.local.state import MeshState
from chorus.transport import TlsIdentity

_Result = TypeVar("_Result")


async def as_admin(
    run: Callable[[IdentityClient], Awaitable[_Result]], directory: Path | None, file: Path | None
) -> _Result:
    """Runs `run` with a client of the identity service that is configured, or else of that of the mesh here.

    Raises ConfigError where there is none.
    """
    home = MeshHome.find(directory)
    config = client_config(home, file=file, must_be_up=False)
    endpoint = config.mesh.identity_service or _of_this_machine(home)
    if endpoint is None:
        raise ConfigError(
            "no identity service is known: `chorus up --lan` runs one, mesh.identity_service says where another one is"
        )
    folder = config.mesh.certs_dir / f"{Role.ADMIN}-{CLIENT_NAME}"
    if not folder.is_dir():
        folder = config.mesh.certs_dir / config.client.identity
    async with IdentityClient(endpoint, TlsIdentity.load(folder)) as admin:
        return await run(admin)


def _of_this_machine(home: MeshHome) -> Endpoint | None:
    state = MeshState.read(home.state_file)
    for process in state.processes if state is not None else ():
        if process.role == Role.IDENTITY:
            return Endpoint.parse(process.address).named(process.name)
    return None
