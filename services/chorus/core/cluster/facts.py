"""What is known of a running cluster, as far as a diagnosis asks. Times are seconds since 1970."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Machine:
    """A node. `pressure`: what it says it is short of; `gpus`: how many NVIDIA GPUs pods can be given."""

    name: str
    labels: Mapping[str, str]
    ready: bool
    schedulable: bool
    architecture: str
    pressure: tuple[str, ...] = ()
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Container:
    """A container of a pod. `waiting` and `ended` are reasons, "" for none; `ended` is how it last ended."""

    name: str
    image: str
    ready: bool
    running: bool
    waiting: str = ""
    ended: str = ""
    exit_code: int = 0
    message: str = ""
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod. `unschedulable`: the scheduler's words; `runtime_class`: "" for the default."""

    name: str
    component: str
    node: str
    phase: str
    containers: tuple[Container, ...]
    unschedulable: str = ""
    runtime_class: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Complaint:
    """An event of the type Warning, about the object `kind`/`name`."""

    kind: str
    name: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """A Service of the mesh, and how many ready addresses it leads to; None where that was not told."""

    name: str
    ready: int | None


@dataclass(frozen=True, slots=True)
class Claim:
    """A PersistentVolumeClaim."""

    name: str
    phase: str
    storage_class: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate in a Secret. `names`: its SPIFFE id and DNS names; `problem`: why it can't be read or believed."""

    secret: str
    key: str
    names: tuple[str, ...] = ()
    begins: float = 0.0
    ends: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """All of it. `told`: the kinds that were read at all; what was not can't be said to be missing."""

    namespace: str
    told: frozenset[str]
    machines: tuple[Machine, ...] = ()
    runtime_classes: frozenset[str] = frozenset()
    pods: tuple[Pod, ...] = ()
    dns_pods: tuple[Pod, ...] = ()
    services: tuple[ServiceFacts, ...] = ()
    claims: tuple[Claim, ...] = ()
    storage_classes: frozenset[str] = frozenset()
    leaves: tuple[Leaf, ...] = ()
    secrets: frozenset[str] = frozenset()
    warnings: tuple[Complaint, ...] = ()
