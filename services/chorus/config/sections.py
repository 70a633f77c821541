"""Every key of the configuration: its type, its bounds, its default and, as its description, its documentation.

The README's table, `chorus config` and each command's `--help` are generated from these models, so a key is described
here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import platformdirs
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from chorus.config.address import Endpoint, ListenAddress, is_dns_label
from chorus.config.auditing import AuditSettings
from chorus.config.caching import CacheSettings
from chorus.config.callers import CallersSettings
from chorus.config.costs import CostSettings
from chorus.config.ensembles import EnsembleSettings
from chorus.config.remote import RemoteServer
from chorus.config.section import AbsolutePath, Section
from chorus.config.texts import list_of_text, map_of_text
from chorus.config.valkey import ValkeySettings
from chorus.config.webhooks import ALERTS, checked_kinds, checked_urls
from chorus.core.errors import ConfigError

# The longest name before a trust domain is NAME.coordinator. with a NAME of 63 characters, and DNS ends at 253.
_TRUST_DOMAIN_MAX_LENGTH = 253 - len(".coordinator.") - 63
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?")
_LABEL_VALUE_MAX_LENGTH = 63
MAX_LABELS = 64


def _service_name(text: str) -> str:
    if not is_dns_label(text):
        raise ValueError("should be 1 to 63 lower-case letters, digits and dashes, as it becomes part of a DNS name")
    return text


def _trust_domain(text: str) -> str:
    labels = text.split(".")
    if not all(map(is_dns_label, labels)) or labels[-1].isdigit() or len(text) > _TRUST_DOMAIN_MAX_LENGTH:
        raise ValueError(
            f"should be a DNS name in lower case of at most {_TRUST_DOMAIN_MAX_LENGTH} characters, such as chorus.local"
        )
    return text


def _labels(value: Mapping[str, str]) -> Mapping[str, str]:
    if len(value) > MAX_LABELS:
        raise ValueError(f"should hold at most {MAX_LABELS} labels")
    for key, text in value.items():
        if not _LABEL_KEY.fullmatch(key):
            raise ValueError(f"the label name {key[:40]!r} should be letters, digits, dots, dashes and slashes")
        if len(text) > _LABEL_VALUE_MAX_LENGTH or not text.isprintable():
            raise ValueError(
                f"the value of label {key} should be at most {_LABEL_VALUE_MAX_LENGTH} printable characters"
            )
    return value


def _model_pairs(value: Mapping[str, str]) -> Mapping[str, str]:
    for model, draft in value.items():
        if model == draft:
            raise ValueError(f"lets {model} draft for itself, which gains nothing; name a smaller model")
    return value


def _assignments(value: Mapping[str, str]) -> Mapping[str, str]:
    for model, devices in value.items():
        if not all(device.strip() for device in devices.split("+")):
            raise ValueError(f"should name GPUs for {model} with + between them, such as CUDA0+CUDA1")
    return value


def _endpoints_named(default: str) -> Any:
    def check(value: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        named = tuple(endpoint.named(default) for endpoint in value)
        if not named:
            raise ValueError("should name at least one")
        if len({endpoint.authority for endpoint in named}) < len(named):
            raise ValueError("names the same HOST:PORT twice")
        return named

    return check


ServiceName = Annotated[str, AfterValidator(_service_name)]
ModelName = Annotated[str, Field(min_length=1, max_length=200)]
TextList = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(list_of_text)]
Labels = Annotated[Mapping[str, str], BeforeValidator(map_of_text), AfterValidator(_labels)]
ModelPairs = Annotated[Mapping[ModelName, ModelName], BeforeValidator(map_of_text), AfterValidator(_model_pairs)]
RunnerWeights = Annotated[Mapping[ServiceName, Annotated[float, Field(gt=0, le=1)]], BeforeValidator(map_of_text)]
GpuPolicy = Annotated[Mapping[str, Annotated[str, Field(min_length=1)]], BeforeValidator(map_of_text)]
GpuAssignments = Annotated[Mapping[str, str], BeforeValidator(map_of_text), AfterValidator(_assignments)]
WebhookUrls = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(list_of_text), AfterValidator(checked_urls)
]
EventKinds = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(list_of_text), AfterValidator(checked_kinds)
]
Registries = Annotated[
    tuple[Endpoint, ...], BeforeValidator(list_of_text), AfterValidator(_endpoints_named("registry"))
]
Coordinators = Annotated[
    tuple[Endpoint, ...], BeforeValidator(list_of_text), AfterValidator(_endpoints_named("coordinator"))
]


def _shown(default: str, **extra: str) -> dict[str, Any]:
    """What documentation shows for a default that differs between machines."""
    return {"shown_default": default, **extra}


class MeshSettings(Section):
    """Which mesh this process belongs to, and how it proves so."""

    trust_domain: Annotated[str, AfterValidator(_trust_domain)] = Field(
        default="chorus.local", description="DNS name at the end of every service's name in this mesh."
    )
    certs_dir: AbsolutePath = Field(
        default_factory=lambda: platformdirs.user_data_path("chorus") / "certs",
        description="Folder with the mesh's CA and one folder per identity, as `chorus certs` writes it.",
        json_schema_extra=_shown("certs in the user's data folder"),
    )
    identity_service: Endpoint | None = Field(
        default=None,
        description="Identity service, NAME@HOST:PORT; this process learns there who was revoked.",
        json_schema_extra=_shown("none"),
    )
    renewal: Endpoint | None = Field(
        default=None,
        description="Where this process renews its certificate, NAME@HOST:PORT: identity.join_listen of that service.",
        json_schema_extra=_shown("nowhere: it is replaced by hand"),
    )
    max_calls_per_caller: int = Field(
        default=4096,
        ge=16,
        le=1_000_000,
        description="Calls, streams included, that one caller has open at this service; further ones are refused.",
    )
    slow_reader_s: float = Field(
        default=30.0,
        ge=1,
        le=3600,
        description="Seconds that a stream's next message waits for a caller who doesn't read; the stream ends then.",
    )
    idle_connection_s: float = Field(
        default=900.0,
        ge=10,
        le=86_400,
        description="Seconds after which registries, coordinators and the identity service close a connection on which "
        "no call is open.",
    )
    insecure_loopback: bool = Field(
        default=False,
        description="Talk without TLS. Only loopback addresses are served and dialled; for trying things out.",
    )


class LogSettings(Section):
    """What this process logs, and how."""

    flag_prefix: ClassVar[str] = "log-"

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is logged."
    )
    format: Literal["auto", "console", "json"] = Field(
        default="auto",
        description="Lines for people, or one JSON object a line; auto is console on a terminal, else json.",
    )
    prompts: bool = Field(
        default=False, description="Log the texts of prompts and answers. Otherwise their lengths alone are logged."
    )
    file: AbsolutePath | None = Field(
        default=None, description="Append the log to this file instead of standard error."
    )

    @field_validator("level", "format", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value


class _Listening(Section):
    """A service's address, and the plaintext side doors that it can open; each is off unless it is given an address."""

    listen: ListenAddress  # first, so that the others can be compared with it
    health_listen: ListenAddress | None = Field(
        default=None, description="Address for a plaintext grpc.health.v1 server that serves nothing else (for probes)."
    )
    admin_listen: ListenAddress | None = Field(
        default=None,
        description="Address for the gRPC admin server (channelz), over mutual TLS and for the admin role alone.",
    )
    metrics_listen: ListenAddress | None = Field(
        default=None, description="Address for Prometheus metrics over plain HTTP, at /metrics."
    )

    @field_validator("health_listen", "admin_listen", "metrics_listen")
    @classmethod
    def _each_its_own(cls, value: ListenAddress | None, info: ValidationInfo) -> ListenAddress | None:
        if value is not None and value.port != 0:
            for other in ("listen", "health_listen", "admin_listen", "metrics_listen"):
                if other != info.field_name and info.data.get(other) == value:
                    raise ValueError(f"is the address of {other} too")
        return value


class RegistrySettings(_Listening):
    """The registry: who lives in the mesh."""

    name: ServiceName = Field(default="registry", description="This registry's name, as in its certificate.")
    listen: ListenAddress = Field(
        default=ListenAddress("127.0.0.1", 7101), description="Address to serve on, over mutual TLS."
    )
    lease_ttl_s: float = Field(
        default=2.0,
        ge=0.5,
        le=600,
        description="Seconds after its last heartbeat at which a runner leaves the directory.",
    )
    heartbeat_interval_s: float = Field(
        default=0.5,
        ge=0.05,
        description="Seconds between the heartbeats that runners are told to send; under half of lease_ttl_s.",
    )
    watch_flush_interval_s: float = Field(
        default=0.1,
        ge=0.01,
        le=5,
        description="Seconds for which changes are gathered before watchers are told of them.",
    )

    node_claims: Literal["certificate", "first", "any"] = Field(
        default="first",
        description="Which node a runner may be on whose certificate names none: certificate (none), first (one that "
        "no other machine is on, and always the same) or any.",
    )

    @field_validator("heartbeat_interval_s")
    @classmethod
    def _one_loss_is_survived(cls, value: float, info: ValidationInfo) -> float:
        ttl = info.data.get("lease_ttl_s")
        if ttl is not None and value >= ttl / 2:
            raise ValueError(f"should be less than half of registry.lease_ttl_s, which is {ttl:g}")
        return value


class RunnerSettings(_Listening):
    """A runner: one machine's models."""

    name: ServiceName | None = Field(
        default=None,
        description="This runner's name, as in its certificate.",
        json_schema_extra=_shown("from the host name"),
    )
    listen: ListenAddress = Field(
        default=ListenAddress("127.0.0.1", 7201), description="Address to serve on, over mutual TLS."
    )
    advertise: Endpoint | None = Field(
        default=None,
        description="HOST:PORT at which other machines dial this runner; must be set where listen is 0.0.0.0 or [::].",
        json_schema_extra=_shown("the address of listen", shown_kind="HOST:PORT"),
    )
    registries: Registries = Field(
        default=(Endpoint("127.0.0.1", 7101, "registry"),),
        description="Registries to register at, each NAME@HOST:PORT; NAME is registry unless it is given.",
    )
    models_dir: AbsolutePath = Field(
        default_factory=lambda: platformdirs.user_data_path("chorus") / "models",
        description="Folder in which models are kept.",
        json_schema_extra=_shown("models in the user's data folder"),
    )
    models: TextList | None = Field(
        default=None,
        description="Models to load at the start; [] loads none.",
        json_schema_extra=_shown("the catalog's default model"),
    )
    draft_models: ModelPairs = Field(
        default={},
        description="Small models that guess tokens ahead for large ones of the same vocabulary, as large=small by "
        "family or artifact name; used only while that makes answers faster.",
    )
    catalogs: TextList = Field(
        default=(), description="Files that describe models of your own, on top of the shipped catalog."
    )
    engine: Literal["llama", "fake", "faulty"] = Field(
        default="llama",
        description="What generates tokens; fake and faulty are for tests.",
        json_schema_extra={"hidden": True},
    )
    remote: RemoteServer | None = Field(
        default=None,
        description="Model server that answers in place of llama.cpp in this process, as KIND=URL: "
        "ollama=http://127.0.0.1:11434, or openai=http://HOST:8000 for vLLM, llama-server and their like.",
    )
    remote_api_key_file: AbsolutePath | None = Field(
        default=None, description="File that holds nothing but the API key of the server under remote."
    )
    remote_prompt_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="Seconds that the server under remote may say nothing before an answer's first token, while it "
        "loads a model or reads a long prompt. Then the request goes elsewhere, or fails.",
    )
    remote_token_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="Seconds that the server under remote may say nothing in the middle of an answer.",
    )
    context_length: int = Field(
        default=0,
        ge=0,
        le=1 << 24,
        description="Tokens, prompt and answer together, that one request may use; 0 is the model's own, up to 4096.",
    )
    slots: int = Field(default=4, ge=1, le=256, description="Requests that one model decodes at the same time.")
    threads: int = Field(default=0, ge=0, le=1024, description="Threads that decode; 0 is one per physical core.")
    gpu_layers: int = Field(
        default=-1,
        ge=-1,
        le=10_000,
        description="Layers of a model kept on the GPU; -1 is as many as fit, 0 uses no GPU.",
    )
    speculation: bool = Field(
        default=True, description="Whether tokens are guessed ahead where that pays; answers are the same either way."
    )
    max_queue: int = Field(
        default=64, ge=0, le=100_000, description="Requests that may wait for a slot; more are refused."
    )
    step_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=86_400,
        description="Seconds that one step of llama.cpp has at least, or 20 times what such steps took lately. "
        "Then it is held to hang, and the process ends, to be started again.",
    )
    kv_tokens: int = Field(
        default=0,
        ge=0,
        le=1 << 30,
        description="Tokens that all requests of one model keep in memory together; 0 is slots times context_length.",
    )
    cache_type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = Field(
        default=None,
        description="How the keys and values of past tokens are stored; q8_0 takes half of f16's memory.",
        json_schema_extra=_shown("what `chorus tune` found, else f16"),
    )
    memory_reserve_gib: float = Field(
        default=1.0,
        ge=0,
        le=1 << 16,
        description="Memory, in GiB, that models leave free for other programs, on the machine and on each GPU.",
    )
    memory_limit_gib: float | None = Field(
        default=None,
        gt=0,
        le=1 << 16,
        description="Memory of the machine, in GiB, that all models together may take.",
        json_schema_extra=_shown("all but the reserve"),
    )
    max_loaded_models: int = Field(
        default=0, ge=0, le=1000, description="Models in memory at the same time; 0 is as many as fit."
    )
    max_decoding_models: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Models that compute at the same time, the others taking turns with them; 0 is all.",
    )
    keep_alive_s: float = Field(
        default=0.0, ge=0, description="Seconds after which a model that nobody uses is unloaded; 0 is never."
    )
    pinned: TextList = Field(default=(), description="Models that are never unloaded to make room for others.")
    gpu_policy: GpuPolicy = Field(
        default={},
        description="What GPUs are for, such as CUDA0=dynamic,CUDA1=reserved: dynamic is any model, reserved none "
        "(for other programs), and the name of a model that one alone.",
    )
    gpu_assignments: GpuAssignments = Field(
        default={}, description="The GPUs that a model may use, such as qwen3-8b=CUDA0+CUDA1; others use any."
    )
    node_id: ServiceName | None = Field(
        default=None,
        description="Id of this machine, the same for every runner on it.",
        json_schema_extra=_shown("from the machine's id"),
    )
    labels: Labels = Field(default={}, description="Labels that requests can ask for, such as room=attic.")
    drain_grace_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Seconds that running generations get to finish when the runner shuts down.",
    )
    allow_load: bool = Field(default=True, description="Whether models may be loaded and unloaded over the network.")

    @field_validator("remote_api_key_file")
    @classmethod
    def _for_a_server(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        server = info.data.get("remote")
        if value is not None and server is not None and server.is_plaintext and not server.is_household:
            raise ValueError("would send the key unencrypted over the Internet; give runner.remote an https:// URL")
        return value

    @field_validator("advertise")
    @classmethod
    def _can_be_dialled(cls, value: Endpoint | None) -> Endpoint | None:
        if value is not None and value.is_wildcard:
            raise ValueError("cannot be dialled; give an address or name of this machine that others reach")
        if value is not None and value.name is not None:
            raise ValueError("should be HOST:PORT alone; the name is runner.name")
        return value

    def dial_address(self, bound_port: int) -> Endpoint:
        """Returns where other machines dial this runner, which listens on `bound_port`.

        Raises ConfigError where `listen` is every interface and `advertise` is not set, since nobody can guess then.
        """
        if self.advertise is not None:
            return self.advertise
        if self.listen.is_wildcard:
            raise ConfigError(
                f"runner.advertise: should be set, because runner.listen is {self.listen}, which nobody can dial; "
                "give HOST:PORT by which other machines reach this one",
                metadata={"keys": "runner.advertise"},
            )
        return Endpoint(self.listen.host, bound_port)


class CoordinatorSettings(_Listening):
    """The coordinator: who answers which request."""

    name: ServiceName = Field(default="coordinator", description="This coordinator's name, as in its certificate.")
    listen: ListenAddress = Field(
        default=ListenAddress("127.0.0.1", 7301), description="Address to serve on, over mutual TLS."
    )
    registries: Registries = Field(
        default=(Endpoint("127.0.0.1", 7101, "registry"),),
        description="Registries to watch, each NAME@HOST:PORT; NAME is registry unless it is given.",
    )
    default_model: str | None = Field(
        default=None,
        description="Model that answers requests which name none.",
        json_schema_extra=_shown("any that can serve the request"),
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=10,
        description="Runners that one request is tried on before its first token; 1 never retries.",
    )
    resume_wait_s: float = Field(
        default=10.0,
        ge=0,
        le=600,
        description="Seconds that a stream whose runner is lost waits for another one to go on with it.",
    )
    connect_timeout_s: float = Field(
        default=3.0,
        gt=0,
        le=60,
        description="Seconds to wait for a connection to a runner before another one is tried.",
    )
    runner_weights: RunnerWeights = Field(
        default={},
        description="Runners to ask less, each RUNNER=WEIGHT above 0 and at most 1; 0.5 counts as twice as slow.",
    )
    breaker_failures: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="Failures of a runner with one model, within breaker_window_s, after which it is left alone.",
    )
    breaker_window_s: float = Field(
        default=60.0, gt=0, le=3600, description="Seconds over which a runner's failures are counted."
    )
    breaker_open_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Seconds for which a runner that failed too often is left alone, before one request probes it.",
    )
    replicate_busy_s: float = Field(
        default=20.0,
        ge=0,
        le=86_400,
        description="Seconds for which a model's slots must all be taken before another runner that has room is asked "
        "to load it, too; 0 is never.",
    )
    preload_likelihood: float = Field(
        default=0.6,
        ge=0.1,
        le=1.0,
        description="How likely it must be, by the times of day and week and the models after which it was asked for, "
        "that a model will be needed for it to be loaded beforehand where there is room; 1 is never.",
    )
    memory_file: AbsolutePath | None = Field(
        default=None,
        description="SQLite file that keeps over restarts when models are usually asked for, and what models were like "
        "that are gone; one for each coordinator.",
        json_schema_extra={"shown_default": "in memory"},
    )
    max_requests: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="Requests under way at the same time; more wait.",
    )
    max_queued: int = Field(
        default=1024,
        ge=0,
        le=1_000_000,
        description="Requests of each class (interactive, batch, background) that may wait; more are refused.",
    )
    hedging: Literal["never", "asked", "always"] = Field(
        default="asked",
        description="When a second runner is asked beside one whose first token is late: never, asked (where the "
        "request allows it) or always. It shortens the longest waits, and takes a slot twice.",
    )
    ticket_ttl_s: float = Field(
        default=10.0,
        gt=0,
        le=300,
        description="Seconds in which a client must come to its runner with a ticket; its place is kept for 3 of them.",
    )
    drain_grace_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Seconds that running requests get to finish when the coordinator shuts down.",
    )
    webhooks: WebhookUrls = Field(
        default=(), description="URLs to which alerts are posted as JSON, such as https://alerts.example/chorus."
    )
    webhook_kinds: EventKinds = Field(
        default=tuple(map(str, ALERTS)),
        description="Kinds of events that are posted; `chorus events --help` tells of them.",
    )
    webhook_secret_file: AbsolutePath | None = Field(
        default=None,
        description="File with a secret; with it every post is signed by HMAC-SHA256 (header Chorus-Signature).",
    )


class IdentitySettings(_Listening):
    """The identity service: who may join the mesh, and who is out."""

    name: ServiceName = Field(default="identity", description="This service's name, as in its certificate.")
    listen: ListenAddress = Field(
        default=ListenAddress("127.0.0.1", 7311),
        description="Address for admins and services, over mutual TLS.",
    )
    join_listen: ListenAddress = Field(
        default=ListenAddress("127.0.0.1", 7312),
        description="Address where machines join and renew, which have no valid certificate to show.",
    )
    advertise_join: Endpoint | None = Field(
        default=None,
        description="HOST:PORT at which other machines reach join_listen; it is part of what they are told.",
        json_schema_extra=_shown("the address of join_listen", shown_kind="HOST:PORT"),
    )
    advertise: Endpoint | None = Field(
        default=None,
        description="HOST:PORT at which other machines reach listen.",
        json_schema_extra=_shown("the address of listen", shown_kind="HOST:PORT"),
    )
    ledger: AbsolutePath | None = Field(
        default=None,
        description="File in which tokens, members and revocations are kept.",
        json_schema_extra=_shown("identity.json beside the authority's key"),
    )
    leaf_lifetime_s: float = Field(
        default=86_400.0,
        ge=5,
        le=366 * 86_400,
        description="Seconds that certificates live which machines get when they join or renew.",
    )
    joins_per_minute: float = Field(
        default=12.0,
        gt=0,
        le=1e6,
        description="Tries to join or renew that one address has in a minute, and twice that at once; ten times as "
        "many are shared by all.",
    )
    registries: Registries = Field(
        default=(Endpoint("127.0.0.1", 7101, "registry"),),
        description="Registries that machines which join are told of, each NAME@HOST:PORT.",
    )
    coordinators: Coordinators = Field(
        default=(Endpoint("127.0.0.1", 7301, "coordinator"),),
        description="Coordinators that machines which join are told of, each NAME@HOST:PORT.",
    )


class ClientSettings(Section):
    """How the command line and the Python client reach the mesh."""

    coordinators: Coordinators = Field(
        default=(Endpoint("127.0.0.1", 7301, "coordinator"),),
        description="Coordinators to ask, each NAME@HOST:PORT; NAME is coordinator unless it is given.",
    )
    identity: ServiceName = Field(
        default="client-cli", description="Folder under mesh.certs_dir whose certificate and key the client shows."
    )
    api_key_file: AbsolutePath | None = Field(
        default=None,
        description="File with an API key, or an identity provider's token, to show in place of a certificate; "
        "coordinators are then those of callers.listen. CHORUS_API_KEY_FILE says it, too.",
    )
    ca: str | None = Field(
        default=None,
        description="With a key: a file with the mesh's authority (ca.crt), or its SHA-256 fingerprint.",
        json_schema_extra=_shown("ca.crt of the certificates on this machine"),
    )
    timeout_s: float = Field(default=300.0, gt=0, le=86_400, description="Seconds after which a request is given up.")
    direct: Literal["auto", "never", "always"] = Field(
        default="auto",
        description="Whether answers come from runners themselves, with no hop between: auto (from a client's second "
        "generation on, and relayed where a runner can't be reached), never or always.",
    )


class ChorusConfig(BaseModel):
    """The whole configuration: what a process needs from it are `mesh`, `log` and its own section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mesh: MeshSettings = Field(default_factory=MeshSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    audit: AuditSettings = Field(default_factory=AuditSettings)
    registry: RegistrySettings = Field(default_factory=RegistrySettings)
    runner: RunnerSettings = Field(default_factory=RunnerSettings)
    coordinator: CoordinatorSettings = Field(default_factory=CoordinatorSettings)
    identity: IdentitySettings = Field(default_factory=IdentitySettings)
    client: ClientSettings = Field(default_factory=ClientSettings)
    ensemble: EnsembleSettings = Field(default_factory=EnsembleSettings)
    cache: CacheSettings = Field(default_factory=CacheSettings)
    callers: CallersSettings = Field(default_factory=CallersSettings)
    valkey: ValkeySettings = Field(default_factory=ValkeySettings)
    costs: CostSettings = Field(default_factory=CostSettings)


SECTIONS: Mapping[str, type[Section]] = {
    name: field.annotation
    for name, field in ChorusConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
"""Every section by its name, in the order of the documentation."""
