"""How a mesh is laid out over the nodes of a cluster: which parts of the manifests, and how many of each service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from chorus.core.errors import InvalidRequestError
from chorus.core.identity.spiffe import check_label

# Each does without all others: three outlive the loss of two machines.
_COPIES_MAX = 3


class Certificates(StrEnum):
    """Who makes them; the name of a component is `mtls-` and the value."""

    IDENTITY = "identity"
    SELFSIGNED = "selfsigned"
    CERT_MANAGER = "cert-manager"


class Extra(StrEnum):
    """Components that need something beside Chorus in the cluster, or run it."""

    CALLERS = "callers"
    OBSERVABILITY = "observability"
    INGRESS = "ingress"
    VALKEY = "valkey"


@dataclass(frozen=True, slots=True)
class Layout:
    """What an overlay says. `components` in the order in which they are to be applied; `gpu_nodes` are among `nodes`.

    `registries`: how many; `coordinators`: how many at least. `spread`: no two of a kind on one machine while another
    machine has none.
    """

    nodes: tuple[str, ...]
    gpu_nodes: tuple[str, ...]
    models: tuple[str, ...]
    components: tuple[str, ...]
    registries: int
    coordinators: int
    spread: bool


def lay_out(
    nodes: Sequence[str],
    gpu_nodes: Sequence[str],
    models: Sequence[str],
    *,
    certificates: Certificates = Certificates.IDENTITY,
    extras: Sequence[Extra] = (),
) -> Layout:
    """Decides it. Nodes with GPUs need not be named twice; the order of names, and one said twice, change nothing.

    Raises InvalidRequestError where there is no node or no model, and for a node whose name can be no runner's.
    """
    every = tuple(sorted({*nodes, *gpu_nodes}))
    if not every:
        raise InvalidRequestError("--node", "is missing: name the nodes that are to run models (`kubectl get nodes`)")
    for name in every:
        check_label("--node", name)
    if not models:
        raise InvalidRequestError("--model", "is missing: without a model nobody can answer")
    for model in models:
        if not model or any(sign.isspace() or not sign.isprintable() for sign in model) or model.startswith("-"):
            raise InvalidRequestError("--model", f"{model[:80]!r} names no model; `chorus models suggest` lists some")
    components = ["gpu-nvidia"] if gpu_nodes else []
    # It changes runners, those of gpu-nvidia included, and brings the Job that extras change.
    components += [f"mtls-{certificates}"]
    components += ["node-drain"] if len(every) > 1 else []
    components += sorted({*extras} - ({Extra.VALKEY} if Extra.CALLERS in extras else set()))  # which is in it
    copies = min(len(every), _COPIES_MAX)
    return Layout(
        nodes=every,
        gpu_nodes=tuple(sorted(set(gpu_nodes))),
        models=tuple(dict.fromkeys(models)),
        components=tuple(components),
        registries=copies,
        coordinators=copies,
        spread=len(every) >= _COPIES_MAX,
    )
