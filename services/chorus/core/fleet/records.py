"""What is known of nodes, runners, models and load: immutable records, in the words of DESIGN.md.

All sizes are bytes, all durations seconds, all wall-clock times seconds since the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Tier(StrEnum):
    """How capable and how costly a model is, by its number of parameters."""

    MICRO = "micro"  # under 1 billion
    SMALL = "small"  # under 8 billion
    FULL = "full"  # under 40 billion
    LARGE = "large"  # from 40 billion

    @classmethod
    def of_parameters(cls, count: int) -> Tier:
        """The tier of a model with `count` parameters."""
        if count < 1_000_000_000:
            return cls.MICRO
        if count < 8_000_000_000:
            return cls.SMALL
        if count < 40_000_000_000:
            return cls.FULL
        return cls.LARGE


class Feature(StrEnum):
    """What a request can ask for beyond plain text from a prompt; an engine declares those it has, per model."""

    CHAT = "chat"
    TOOLS = "tools"
    IMAGES = "images"
    REASONING = "reasoning"
    TOKEN_INPUT = "token_input"  # noqa: S105 - tokens of text, no secret
    TOKEN_IDS = "token_ids"  # noqa: S105
    RESUME = "resume"
    MULTIPLE_CHOICES = "multiple_choices"
    LOGPROBS = "logprobs"
    PROMPT_LOGPROBS = "prompt_logprobs"
    GRAMMAR = "grammar"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LOGIT_BIAS = "logit_bias"
    PENALTIES = "penalties"
    TYPICAL = "typical"
    DRY = "dry"
    XTC = "xtc"
    SEED = "seed"
    IGNORE_EOS = "ignore_eos"
    CONTEXT_SHIFT = "context_shift"
    ADAPTER = "adapter"
    EMBED = "embed"
    RERANK = "rerank"
    TOKENIZE = "tokenize"


class EngineKind(StrEnum):
    """Where an engine's work happens."""

    LOCAL = "local"  # in the runner's own process
    REMOTE = "remote"  # a server of this household behind HTTP
    EXTERNAL = "external"  # a paid API


class RunnerState(StrEnum):
    """What a runner says of itself."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class ModelState(StrEnum):
    """Where a model stands on one runner."""

    AVAILABLE = "available"  # on disk, can be loaded
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Cpu:
    """A machine's processor. `features` are instruction sets that matter to llama.cpp, such as `avx2`."""

    model: str
    physical_cores: int
    logical_cores: int
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics device. Where this build of the engine can't use it, `usable` is false; `problem` says the fix."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    driver_version: str = ""
    utilization: float | None = None  # 0..1
    temperature_celsius: float | None = None
    throttled: bool | None = None
    usable: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine. Its devices and memory are accounted once, by `node_id`, however many runners it hosts."""

    node_id: str
    hostname: str
    os: str
    cpu: Cpu
    memory_total_bytes: int
    memory_available_bytes: int
    gpus: tuple[Gpu, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a model family. `context_length` is what the model was trained for, in tokens."""

    family: str
    name: str  # the file's own name within the family, unique in a mesh by (name, sha256)
    sha256: str  # lower-case hex; empty only where an engine cannot tell (remote ones)
    size_bytes: int
    quantization: str
    parameter_count: int
    context_length: int
    architecture: str
    tier: Tier
    tags: tuple[str, ...] = ()  # capability tags such as "chat", "code", "embedding"
    license: str = ""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One artifact as one engine of one runner has it. `context_length` is what a single request may use there.

    `adapters` are the names of the LoRA adapters that a request may ask for with it.
    """

    artifact: Artifact
    engine: str
    state: ModelState
    features: frozenset[Feature]
    context_length: int
    slot_count: int
    error: str = ""
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine of a runner."""

    name: str  # such as "llama.cpp"
    version: str
    kind: EngineKind
    backends: tuple[str, ...] = ()  # such as "cpu", "cuda", "vulkan"
    plaintext: bool = False  # true where the engine is reached without TLS on another host


@dataclass(frozen=True, slots=True)
class Runner:
    """One ModelRunner service. A restart makes a new `incarnation` (greater than the last)."""

    runner_id: str
    incarnation: int
    node_id: str
    address: str  # host:port at which coordinators dial it
    server_name: str  # the DNS name that its certificate is pinned to
    version: str
    engines: tuple[EngineInfo, ...]
    models: tuple[ModelStatus, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """Load of one model on a runner."""

    model: str  # artifact name
    slots_used: int
    slots_total: int
    queued: int
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    tokens_per_second: float = 0.0  # decode rate per stream measured lately; 0 where nothing ran yet
    kv_cached_tokens: int = 0  # of ended requests, kept to be shared; not among kv_used_tokens
    prompt_tokens_per_second: float = 0.0  # rate of reading prompts measured lately; 0 where none was read yet
    preemptions: int = 0  # since the model was loaded


@dataclass(frozen=True, slots=True)
class Load:
    """What a runner reports in every heartbeat.

    `by_coordinator`: its requests under way, by the SPIFFE id of the coordinator that sent them; None from an older
    runner, which does not tell.
    """

    models: tuple[ModelLoad, ...] = ()
    memory_available_bytes: int = 0
    cpu_utilization: float = 0.0  # 0..1 over all cores
    gpus: tuple[Gpu, ...] = ()
    by_coordinator: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class RunnerRecord:
    """A runner as a registry holds it: who, on what machine, how it fares. Ordered by (incarnation, sequence)."""

    runner: Runner
    node: Node  # as registered
    state: RunnerState
    load: Load
    sequence: int

    @property
    def machine(self) -> Node:
        """The node as it is now: what a heartbeat says of it is newer than what the registration said."""
        return replace(
            self.node,
            memory_available_bytes=self.load.memory_available_bytes or self.node.memory_available_bytes,
            gpus=self.load.gpus or self.node.gpus,
        )

    @property
    def version(self) -> tuple[int, int]:
        """What makes one record of a runner newer than another."""
        return (self.runner.incarnation, self.sequence)
