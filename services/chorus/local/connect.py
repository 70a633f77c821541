"""How a command reaches a mesh: as configured, or else the one that runs on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from chorus.config import ChorusConfig, load_with_origins
from chorus.core.errors import UnavailableError
from chorus.local.home import MeshHome
from chorus.local.state import MeshState

API_KEY_FILE_ENV = "CHORUS_API_KEY_FILE"


def client_config(
    home: MeshHome,
    *,
    file: Path | None = None,
    timeout_s: float | None = None,
    must_be_up: bool = True,
    key: Mapping[str, object] | None = None,
) -> ChorusConfig:
    """Returns the configuration of a client of the mesh.

    What flags, environment or file say wins. Where they name no coordinator, the mesh that runs in `home` fills in
    where it is and with which certificates it is reached. `key` are flags of those who show a key (`client.ca`, …).

    Raises ConfigError, and UnavailableError where `home` was named and has no mesh (unless it need not be up): somebody
    who names a folder does not mean whatever else may run on this machine.
    """
    flags: dict[str, object] = {"client.timeout_s": timeout_s, **(key or {})}
    if flags.get("client.api_key_file") is None:
        flags["client.api_key_file"] = os.environ.get(API_KEY_FILE_ENV) or None
    loaded = load_with_origins(file=file, flags=flags)
    state = MeshState.read(home.state_file)
    if state is None and "client.coordinators" not in loaded.origins and home.chosen and must_be_up:
        raise UnavailableError(f"no mesh is up in {home.root}; `chorus up` starts one there")
    if state is None or "client.coordinators" in loaded.origins:
        if home.chosen and "mesh.certs_dir" not in loaded.origins and home.certs.is_dir():
            return load_with_origins(file=file, flags=flags | {"mesh.certs_dir": home.certs}).config
        return loaded.config
    local: dict[str, object] = {
        "client.coordinators": state.coordinator,
        "client.identity": state.identity,
        "mesh.certs_dir": state.certs_dir,
        "mesh.trust_domain": state.trust_domain,
        "mesh.insecure_loopback": state.insecure_loopback,
    }
    return load_with_origins(
        file=file, flags=flags | {key: value for key, value in local.items() if key not in loaded.origins}
    ).config
