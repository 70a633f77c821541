"""`chorus doctor`: what is wrong on this machine, and what to do about it."""

from __future__ import annotations

from datetime import UTC, datetime

from chorus.config import ChorusConfig
from chorus.core.errors import ConfigError
from chorus.core.findings import Findings
from chorus.local.doctor.machine import (
    ask_llama,
    check_clock,
    check_disk,
    check_gpu,
    check_llama,
    check_memory,
    check_models,
    check_ollama,
    check_open_files,
    find_ollama,
)
from chorus.local.doctor.mesh import check_certificates, check_local, check_reachable
from chorus.local.home import MeshHome
from chorus.local.state import MeshState

__all__ = ["examine"]


def examine(config: ChorusConfig, home: MeshHome, *, coordinator_configured: bool) -> Findings:
    """Yields every finding as it is made. `config` is that of a client of the mesh of `home`.

    The mesh is asked only where one should be: it is up here, or `coordinator_configured` says that one is elsewhere.
    """
    now = datetime.now(UTC)
    build, ollama = ask_llama(), find_ollama()
    yield from check_clock(now)
    yield from check_certificates(config.mesh.certs_dir, now)
    yield from check_llama(build, ollama is not None)
    yield from check_gpu(build)
    yield from check_memory(config)
    yield from check_models(config)
    yield from check_disk(config, home.root)
    yield from check_open_files()
    yield from check_ollama(ollama)
    yield from check_local(home)
    state = _state(home)
    if coordinator_configured or (state is not None and state.alive):
        yield from check_reachable(config, home)


def _state(home: MeshHome) -> MeshState | None:
    try:
        return MeshState.read(home.state_file)
    except ConfigError:  # said by check_local
        return None
