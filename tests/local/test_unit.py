"""The systemd unit: systemd's own checker reads it, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from chorus.local.home import MeshHome
from chorus.local.unit import install, joined_unit


@pytest.mark.parametrize("for_user", [True, False])
def test_systemd_understands_it(tmp_path: Path, for_user: bool) -> None:
    home = MeshHome(tmp_path / 'a "home" of 100%', chosen=True)
    unit = joined_unit(home, for_user=for_user, environ={"XDG_CONFIG_HOME": str(tmp_path / "config")})
    assert "-m chorus.cli.main join" in unit.text
    assert "100%%" in unit.text
    if not for_user:
        assert unit.path.parent == Path("/etc/systemd/system")
        return
    install(unit)
    assert unit.path.is_relative_to(tmp_path)
    checker = shutil.which("systemd-analyze")
    if checker is None:
        pytest.skip("there is no systemd-analyze here")
    checked = subprocess.run(
        [checker, "verify", "--man=no", str(unit.path)], capture_output=True, text=True, check=False
    )
    assert unit.path.name not in checked.stderr, checked.stderr
