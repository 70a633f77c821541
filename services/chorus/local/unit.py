"""A systemd unit that has this machine serve in its mesh from every start on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chorus.core.errors import ConfigError
from chorus.local.home import HOME_ENV, MeshHome

NAME = "chorus-join.service"


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit's file, its text, and what to run once it is there."""

    path: Path
    text: str
    enable: str


def joined_unit(home: MeshHome, *, for_user: bool, environ: Mapping[str, str] = os.environ) -> Unit:
    """The unit that runs `chorus join` for the mesh in `home`, as this user or as the system's service."""
    wanted_by = "default.target" if for_user else "multi-user.target"
    text = f"""\
[Unit]
Description=Chorus: this machine serves in its mesh
Wants=network-online.target
After=network-online.target
# A certificate that was revoked, or a wrong configuration, is not tried for ever.
StartLimitIntervalSec=300
StartLimitBurst=10

[Service]
ExecStart={_quoted(sys.executable)} -m chorus.cli.main join
Environment={_quoted(f"{HOME_ENV}={home.root}")}
Restart=always
RestartSec=2
RestartPreventExitStatus=2
KillSignal=SIGTERM
TimeoutStopSec=60
NoNewPrivileges=yes

[Install]
WantedBy={wanted_by}
"""
    if for_user:
        config = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        enable = f"systemctl --user enable --now {NAME} && loginctl enable-linger"
        return Unit(config / "systemd" / "user" / NAME, text, enable)
    return Unit(Path("/etc/systemd/system") / NAME, text, f"systemctl enable --now {NAME}")


def install(unit: Unit) -> None:
    """Writes the unit. Raises ConfigError where that may not be."""
    try:
        unit.path.parent.mkdir(parents=True, exist_ok=True)
        unit.path.write_text(unit.text, "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {unit.path}: {error.strerror}; --user installs it for this user") from error


def _quoted(text: str) -> str:
    """As systemd reads words: percent signs and quotes are its own."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
