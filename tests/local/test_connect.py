"""How a command finds the mesh: as configured, else the one on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from chorus.core.errors import UnavailableError
from chorus.local.connect import client_config
from chorus.local.home import HOME_ENV, MeshHome
from chorus.local.state import MeshState, this_process


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MeshHome:
    monkeypatch.chdir(tmp_path)  # no chorus.toml of somebody else's
    monkeypatch.setenv(HOME_ENV, str(tmp_path / "mesh"))
    found = MeshHome.find()
    found.make()
    return found


def bring_up(home: MeshHome) -> None:
    MeshState(
        this_process(), "ready", True, "attic.example", str(home.certs), "boss@127.0.0.1:9301", "client-cli"
    ).write(home.state_file)


def test_the_mesh_on_this_machine_fills_in_where_it_is(home: MeshHome) -> None:
    bring_up(home)
    config = client_config(home, timeout_s=5)
    assert [str(endpoint) for endpoint in config.client.coordinators] == ["boss@127.0.0.1:9301"]
    assert config.mesh.certs_dir == home.certs
    assert config.mesh.trust_domain == "attic.example"
    assert config.client.timeout_s == 5


def test_what_is_configured_wins(home: MeshHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_up(home)
    file = tmp_path / "elsewhere.toml"
    file.write_text('[client]\ncoordinators = ["cellar@10.0.0.2:7301"]\n[mesh]\ncerts_dir = "certs"\n')
    config = client_config(home, file=file)
    assert [str(endpoint) for endpoint in config.client.coordinators] == ["cellar@10.0.0.2:7301"]
    assert config.mesh.certs_dir == tmp_path / "certs"
    monkeypatch.setenv("CHORUS_CLIENT__COORDINATORS", "10.0.0.3:7301")
    assert [str(endpoint) for endpoint in client_config(home).client.coordinators] == ["coordinator@10.0.0.3:7301"]


def test_a_named_folder_without_a_mesh_is_no_reason_to_look_elsewhere(home: MeshHome) -> None:
    with pytest.raises(UnavailableError, match="no mesh is up in"):
        client_config(home)
    config = client_config(home, must_be_up=False)
    assert [str(endpoint) for endpoint in config.client.coordinators] == ["coordinator@127.0.0.1:7301"]
    home.certs.mkdir()
    assert client_config(home, must_be_up=False).mesh.certs_dir == home.certs
    assert client_config(MeshHome(home.root)).client == config.client  # the user's own folder, not named


def test_the_folder_is_the_named_one_or_that_of_the_environment_or_the_users_own(tmp_path: Path) -> None:
    assert MeshHome.find(tmp_path, {HOME_ENV: "/elsewhere"}) == MeshHome(tmp_path, chosen=True)
    assert MeshHome.find(None, {HOME_ENV: "/elsewhere"}) == MeshHome(Path("/elsewhere"), chosen=True)
    assert not MeshHome.find(None, {}).chosen
