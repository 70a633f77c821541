"""What a local mesh consists of: which processes, each with its whole configuration. Decided before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from chorus.config import ChorusConfig, Endpoint, ListenAddress, LoadedConfig, to_toml
from chorus.core.errors import ConfigError
from chorus.core.identity import Role
from chorus.core.resilience.silence import SILENT_S
from chorus.local.certificates import CLIENT_NAME, LOOPBACK_NAMES
from chorus.local.home import MeshHome
from chorus.local.ports import DEFAULT_BASE, HIGHEST_BASE, RUNNERS_MAX, RUNNERS_USUAL, Ports

LOOPBACK = "127.0.0.1"
_REGISTRY, _COORDINATOR, _IDENTITY = "registry", "coordinator", "identity"
# Sections that coordinators read beside their own.
_OF_COORDINATORS = ("ensemble", "cache", "callers", "valkey", "costs")


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the person at the keyboard asked for. `lan_ip` None: this machine alone; `port_base` None: the usual one.

    `silent_s`: how long a process that lives may answer nothing before it is killed and started again; 0 is for ever.
    """

    home: MeshHome
    runners: int = RUNNERS_USUAL
    supervised: bool = True
    lan_ip: str | None = None
    models: tuple[str, ...] = ()
    port_base: int | None = None
    silent_s: float = SILENT_S

    def __post_init__(self) -> None:
        if not 1 <= self.runners <= RUNNERS_MAX:
            raise ConfigError(f"--runners: should be from 1 to {RUNNERS_MAX}, not {self.runners}")
        if self.port_base is not None and not 1024 <= self.port_base <= HIGHEST_BASE:
            raise ConfigError(f"--port-base: should be from 1024 to {HIGHEST_BASE}, not {self.port_base}")
        if not (self.silent_s == 0 or 3 <= self.silent_s <= 3600):
            raise ConfigError(
                f"--silent-after: should be from 3 to 3600 seconds, or 0 for never, not {self.silent_s:g}"
            )


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process: its name, what it is, where it serves, and its configuration with the files it is kept in."""

    name: str
    role: Role
    address: Endpoint
    metrics: ListenAddress
    config: ChorusConfig
    config_file: Path
    log_file: Path

    def write_config(self) -> None:
        """Writes the configuration for the process to read; readable by its owner alone."""
        self.config_file.touch(mode=0o600)
        own = (self.role.value, *(_OF_COORDINATORS if self.role is Role.COORDINATOR else ()))
        self.config_file.write_text(to_toml(self.config, "mesh", "log", "audit", *own), "utf-8")

    @property
    def drain_grace_s(self) -> float:
        """How long it may take to end once asked."""
        section = getattr(self.config, self.role.value)
        return float(getattr(section, "drain_grace_s", 0.0))


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """The whole mesh. `client` is the configuration by which this machine's user reaches it."""

    options: UpOptions
    trust_domain: str | None  # None: that of the authority, or a new one's default
    processes: tuple[ProcessPlan, ...]
    client: ChorusConfig

    @property
    def certs_dir(self) -> Path:
        """Where the certificates are."""
        return self.client.mesh.certs_dir

    @property
    def insecure(self) -> bool:
        """Whether it was asked for a mesh without TLS."""
        return self.client.mesh.insecure_loopback

    @property
    def listen_host(self) -> str:
        """The address that all of them listen on."""
        return self.options.lan_ip or LOOPBACK

    @property
    def ports(self) -> Mapping[str, int]:
        """The port of every process by its name."""
        opening = [process for process in self.processes if process.role is Role.IDENTITY]
        joining = {f"{process.name}, to join at": process.config.identity.join_listen.port for process in opening}
        return {process.name: process.address.port for process in self.processes} | joining

    @property
    def metrics_ports(self) -> Mapping[str, int]:
        """The port of every process's metrics, on loopback."""
        return {f"metrics of {process.name}": process.metrics.port for process in self.processes}

    @property
    def models(self) -> tuple[str, ...] | None:
        """The models that its runners load; None is the catalog's default."""
        return next(process.config.runner.models for process in self.processes if process.role is Role.RUNNER)

    @property
    def needs_model_files(self) -> bool:
        """Whether an engine here reads model files."""
        runners = (process.config.runner for process in self.processes if process.role is Role.RUNNER)
        return any(runner.engine != "fake" and runner.remote is None for runner in runners)

    def certificates(self) -> Mapping[tuple[Role, str], tuple[str, ...]]:
        """Every certificate that the mesh needs, with the addresses it must name: (role, name) -> addresses."""
        addresses = LOOPBACK_NAMES if self.options.lan_ip is None else (*LOOPBACK_NAMES, self.options.lan_ip)
        # The identity service, which has the authority's key, makes its own.
        served = [process for process in self.processes if process.role is not Role.IDENTITY]
        wanted: dict[tuple[Role, str], tuple[str, ...]] = {(p.role, p.name): addresses for p in served}
        administered = self.others_join or self.client.callers.listen is not None
        people = {(Role.CLIENT, CLIENT_NAME): ()} | ({(Role.ADMIN, CLIENT_NAME): ()} if administered else {})
        return wanted | people

    @property
    def leaf_lifetime(self) -> timedelta | None:
        """How long a service's certificate lives, which it renews by itself; None where there is nobody to renew it."""
        found = (process.config.identity for process in self.processes if process.role is Role.IDENTITY)
        return next((timedelta(seconds=identity.leaf_lifetime_s) for identity in found), None)

    @property
    def others_join(self) -> bool:
        """Whether other machines may join: the mesh has an identity service then."""
        return any(process.role is Role.IDENTITY for process in self.processes)

    def with_trust_domain(self, trust_domain: str) -> MeshPlan:
        """Returns the plan for the authority that there turned out to be."""
        return replace(
            self,
            trust_domain=trust_domain,
            processes=tuple(
                replace(process, config=_changed(process.config, "mesh", trust_domain=trust_domain))
                for process in self.processes
            ),
            client=_changed(self.client, "mesh", trust_domain=trust_domain),
        )

    def with_models(self, names: Sequence[str]) -> MeshPlan:
        """Returns the plan with these models in every runner; the first answers requests that name none."""

        def changed(process: ProcessPlan) -> ProcessPlan:
            if process.role is Role.RUNNER:
                return replace(process, config=_changed(process.config, "runner", models=tuple(names)))
            if process.role is Role.COORDINATOR and process.config.coordinator.default_model is None and names:
                return replace(process, config=_changed(process.config, "coordinator", default_model=names[0]))
            return process

        return replace(self, processes=tuple(map(changed, self.processes)))


def make_plan(options: UpOptions, base: LoadedConfig, *, physical_cores: int, host_label: str) -> MeshPlan:
    """Returns the plan: what the user configured, with names, addresses and paths that `up` owns put in.

    `host_label` is this machine's name as a DNS label; runners that other machines see carry it in theirs.
    Raises ConfigError where the configuration contradicts what was asked for.
    """
    config = base.config
    if config.mesh.insecure_loopback and options.lan_ip is not None:
        raise ConfigError("mesh.insecure_loopback serves this machine alone, and --lan other machines: choose one")
    ports = Ports(options.port_base if options.port_base is not None else DEFAULT_BASE)
    host = options.lan_ip or LOOPBACK
    keep_certs = "mesh.certs_dir" in base.origins or not options.home.chosen
    shared = _changed(config, "mesh", certs_dir=config.mesh.certs_dir if keep_certs else options.home.certs)
    # Logs are files that people read; colours and JSON are for whoever configures them.
    shared = _changed(shared, "log", format="console" if config.log.format == "auto" else config.log.format, file=None)
    shared = _changed(shared, "audit", dir=config.audit.dir or options.home.audit)
    shared = _changed(shared, "costs", file=config.costs.file or options.home.costs)
    if "callers.dir" not in base.origins:
        shared = _changed(shared, "callers", dir=options.home.root / "callers")
    registry = Endpoint(host, ports.registry, _REGISTRY)
    coordinator = Endpoint(host, ports.coordinator, _COORDINATOR)
    identity = Endpoint(host, ports.identity, _IDENTITY)
    if options.lan_ip is not None:
        renewal = Endpoint(host, ports.join, _IDENTITY)
        shared = _changed(shared, "mesh", identity_service=identity, renewal=renewal)
    # A mesh that is to answer needs a model, even where runners are configured to load none.
    models = options.models or config.runner.models or None
    runner_common: dict[str, Any] = {
        "advertise": None,
        "registries": (registry,),
        "models": models,
        "threads": config.runner.threads or max(1, physical_cores // options.runners),
    }

    def process(name: str, role: Role, port: int, **changes: Any) -> ProcessPlan:
        metrics = ListenAddress(LOOPBACK, ports.metrics(port))
        return ProcessPlan(
            name=name,
            role=role,
            address=Endpoint(host, port, name),
            metrics=metrics,
            config=_changed(
                shared,
                role.value,
                name=name,
                listen=ListenAddress(host, port),
                health_listen=None,
                admin_listen=None,
                metrics_listen=metrics,
                **changes,
            ),
            config_file=options.home.config_file(name),
            log_file=options.home.log_file(name),
        )

    prefix = f"{host_label}-" if options.lan_ip is not None else "runner-"
    runners = [
        process(f"{prefix}{index + 1}", Role.RUNNER, ports.runner(index), **runner_common)
        for index in range(options.runners)
    ]
    opening: list[ProcessPlan] = []
    if options.lan_ip is not None:
        join_listen = ListenAddress(host, ports.join)
        told = {"registries": (registry,), "coordinators": (coordinator,)}
        opening.append(process(_IDENTITY, Role.IDENTITY, ports.identity, join_listen=join_listen, **told))
    return MeshPlan(
        options=options,
        trust_domain=config.mesh.trust_domain if "mesh.trust_domain" in base.origins else None,
        processes=(
            *opening,
            process(_REGISTRY, Role.REGISTRY, ports.registry),
            *runners,
            process(
                _COORDINATOR,
                Role.COORDINATOR,
                ports.coordinator,
                registries=(registry,),
                memory_file=config.coordinator.memory_file or options.home.memory,
            ),
        ),
        # Commands come and go: what they show lives for a year, and is made anew at a start.
        client=_changed(
            _changed(shared, "mesh", renewal=None),
            "client",
            coordinators=(coordinator,),
            identity=f"{Role.CLIENT}-{CLIENT_NAME}",
        ),
    )


def _changed(config: ChorusConfig, section: str, **changes: Any) -> ChorusConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
