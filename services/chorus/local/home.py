"""Where a local mesh keeps what it needs to remember."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from chorus.core.errors import ConfigError

HOME_ENV = "CHORUS_HOME"


@dataclass(frozen=True, slots=True)
class MeshHome:
    """The folder of one local mesh. `chosen` says that somebody named it, so that everything should be inside."""

    root: Path
    chosen: bool = False

    @classmethod
    def find(cls, directory: Path | None = None, environ: Mapping[str, str] | None = None) -> MeshHome:
        """Returns `directory`, or $CHORUS_HOME, or the user's own; none of them need exist."""
        named = (os.environ if environ is None else environ).get(HOME_ENV)
        if directory is not None:
            return cls(directory.expanduser().absolute(), chosen=True)
        if named:
            return cls(Path(named).expanduser().absolute(), chosen=True)
        return cls(platformdirs.user_state_path("chorus") / "mesh")

    @property
    def state_file(self) -> Path:
        """What runs now; there only while a mesh is up."""
        return self.root / "mesh.json"

    @property
    def lock_file(self) -> Path:
        """Locked by whoever starts or supervises the mesh; the kernel lets go when that process ends."""
        return self.root / "up.lock"

    @property
    def certs(self) -> Path:
        """Certificates, where the configuration names no other place for them."""
        return self.root / "certs"

    @property
    def audit(self) -> Path:
        """Audit logs, a folder for each service, where the configuration names no other place for them."""
        return self.root / "audit"

    @property
    def memory(self) -> Path:
        """What the coordinator remembers, where the configuration names no other place for it."""
        return self.root / "coordinator.sqlite"

    @property
    def costs(self) -> Path:
        """The coordinators' cost ledger, where the configuration names no other file for it."""
        return self.root / "costs.sqlite"

    def config_file(self, process: str) -> Path:
        """The configuration of one process."""
        return self.root / "config" / f"{process}.toml"

    def log_file(self, process: str) -> Path:
        """The log of one process."""
        return self.root / "logs" / f"{process}.log"

    def make(self) -> None:
        """Makes the folders, closed to other users. Raises ConfigError where that cannot be."""
        try:
            for path in (self.root, self.root / "config", self.root / "logs"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.root} cannot hold a mesh: {error.strerror or error} (--dir, {HOME_ENV})"
            ) from error
