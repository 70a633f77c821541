"""What `chorus up` would start, decided before anything is."""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.config import load_config, load_with_origins
from chorus.core.costs import Limits, Price
from chorus.core.errors import ConfigError
from chorus.core.identity import Role
from chorus.local.home import MeshHome
from chorus.local.plan import MeshPlan, UpOptions, make_plan
from chorus.local.ports import Ports, check_free, find_base


def plan(home: Path, environ: dict[str, str] | None = None, *, cores: int = 8, **options: object) -> MeshPlan:
    return make_plan(
        UpOptions(MeshHome(home, chosen=True), **options),  # type: ignore[arg-type]
        load_with_origins(environ=environ or {}),
        physical_cores=cores,
        host_label="attic",
    )


@given(runners=st.integers(1, 48), base=st.integers(1024, 65535 - 300))
def test_no_two_services_share_a_port(runners: int, base: int) -> None:
    ports = Ports(base)
    serving = [ports.registry, ports.coordinator, *map(ports.runner, range(runners))]
    every = serving + [ports.metrics(port) for port in serving]
    assert len(set(every)) == len(every)
    assert all(base < port <= 65535 for port in every)


def test_the_usual_ports_are_those_of_the_configuration() -> None:
    config, ports = load_config(environ={}), Ports()
    assert config.registry.listen.port == ports.registry
    assert config.runner.listen.port == ports.runner(0)
    assert config.coordinator.listen.port == ports.coordinator
    assert config.client.coordinators[0].port == ports.coordinator


def test_every_process_reads_back_the_configuration_that_was_planned(tmp_path: Path) -> None:
    mesh = plan(tmp_path, {"CHORUS_RUNNER__SLOTS": "7", "CHORUS_RUNNER__LABELS": "room=attic"}, models=("a", "b"))
    mesh.options.home.make()
    assert [process.name for process in mesh.processes] == ["registry", "runner-1", "runner-2", "coordinator"]
    for process in mesh.processes:
        process.write_config()
        read = load_config(file=process.config_file, environ={})
        assert getattr(read, process.role.value) == getattr(process.config, process.role.value)
        assert read.mesh == process.config.mesh
        assert process.config_file.stat().st_mode & 0o077 == 0
    runner = mesh.processes[1].config.runner
    assert (runner.slots, runner.labels, runner.models) == (7, {"room": "attic"}, ("a", "b"))


def test_the_coordinator_gets_what_is_configured_of_answers_and_costs(tmp_path: Path) -> None:
    asked = {
        "CHORUS_CACHE__MODE": "exact",
        "CHORUS_ENSEMBLE__LEARNING": "watch",
        "CHORUS_COSTS__PRICES": "gpt=150000/600000,*=1/2/3",
        "CHORUS_COSTS__DAILY_BUDGET_USD": "1.5",
    }
    mesh = plan(tmp_path, asked)
    mesh.options.home.make()
    (coordinator,) = (process for process in mesh.processes if process.role is Role.COORDINATOR)
    coordinator.write_config()
    read = load_config(file=coordinator.config_file, environ={})
    assert (read.cache.mode, read.ensemble.learning) == ("exact", "watch")
    assert read.costs.price_list.of(("claude",)) == Price(1, 2, 3)
    assert read.costs.limits == Limits(1_500_000)
    assert read.costs.file == mesh.options.home.costs


def test_the_cores_are_shared_among_the_runners_unless_configured(tmp_path: Path) -> None:
    def threads(mesh: MeshPlan) -> list[int]:
        return [process.config.runner.threads for process in mesh.processes if process.role is Role.RUNNER]

    assert threads(plan(tmp_path, cores=8)) == [4, 4]
    assert threads(plan(tmp_path, cores=8, runners=3)) == [2, 2, 2]
    assert threads(plan(tmp_path, cores=1)) == [1, 1]
    assert threads(plan(tmp_path, {"CHORUS_RUNNER__THREADS": "5"}, cores=8)) == [5, 5]


def test_certificates_are_kept_with_the_mesh_unless_configured(tmp_path: Path) -> None:
    assert plan(tmp_path).certs_dir == tmp_path / "certs"
    elsewhere = plan(tmp_path, {"CHORUS_MESH__CERTS_DIR": "/srv/household/certs"})
    assert elsewhere.certs_dir == Path("/srv/household/certs")
    assert {process.config.mesh.certs_dir for process in elsewhere.processes} == {elsewhere.certs_dir}


def test_on_a_lan_the_address_is_in_every_certificate_and_the_names_are_of_this_machine(tmp_path: Path) -> None:
    mesh = plan(tmp_path, lan_ip="192.168.7.20")
    assert {process.config.registry.listen.host for process in mesh.processes if process.role is Role.REGISTRY} == {
        "192.168.7.20"
    }
    assert [process.name for process in mesh.processes if process.role is Role.RUNNER] == ["attic-1", "attic-2"]
    assert all("192.168.7.20" in addresses for (role, _), addresses in mesh.certificates().items() if role.serves)
    assert {process.metrics.host for process in mesh.processes} == {"127.0.0.1"}
    identity = next(process.config.identity for process in mesh.processes if process.role is Role.IDENTITY)
    assert {str(process.config.mesh.renewal) for process in mesh.processes} == {f"identity@{identity.join_listen}"}
    assert mesh.client.mesh.renewal is None
    assert mesh.leaf_lifetime == timedelta(days=1)
    assert plan(tmp_path).leaf_lifetime is None


def test_plaintext_is_never_offered_to_a_lan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lan"):
        plan(tmp_path, {"CHORUS_MESH__INSECURE_LOOPBACK": "true"}, lan_ip="192.168.7.20")


@pytest.mark.parametrize("options", [{"runners": 0}, {"runners": 49}, {"port_base": 80}, {"port_base": 65400}])
def test_impossible_options_are_refused_by_their_names(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=re.escape("--" + next(iter(options)).replace("_", "-"))):
        plan(tmp_path, **options)  # type: ignore[arg-type]


def test_a_taken_port_is_named_with_whoever_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} \(registry\) is taken by process \d+ .*--port-base"):
            check_free("127.0.0.1", {"registry": port})
        assert find_base("127.0.0.1", 2, [port - 1, *range(21000, 60000, 400)]) != port - 1
    check_free("127.0.0.1", {"registry": port})
