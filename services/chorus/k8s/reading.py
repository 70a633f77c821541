"""What kubectl tells of a cluster: asked of it here, or what it printed elsewhere, from a folder or standard input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chorus.core.errors import ConfigError, UnavailableError
from chorus.k8s.cluster import Object
from chorus.k8s.documents import DNS_NAMESPACE, objects

_LIMIT_S = 60.0
_DNS_POD = "DnsPod"


@dataclass(frozen=True, slots=True)
class Question:
    """One `kubectl get`: what, of which kinds, and where."""

    words: tuple[str, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Told:
    """Objects, the kinds that were asked for and told, and why others were not."""

    documents: tuple[Object, ...]
    kinds: frozenset[str]
    refused: tuple[str, ...] = ()


def questions(namespace: str) -> list[Question]:
    """What a diagnosis asks; each by itself, since who may list pods may often list no nodes or Secrets."""
    here = ("-n", namespace)
    return [
        Question(("nodes",), "Node"),
        Question(("runtimeclasses",), "RuntimeClass"),
        Question(("storageclasses",), "StorageClass"),
        Question(("pods", "-n", DNS_NAMESPACE, "-l", "k8s-app=kube-dns"), _DNS_POD),
        Question(("pods", *here), "Pod"),
        Question(("services", *here), "Service"),
        Question(("endpointslices", *here), "EndpointSlice"),
        Question(("persistentvolumeclaims", *here), "PersistentVolumeClaim"),
        Question(("secrets", *here), "Secret"),
        Question(("events", *here), "Event"),
    ]


_WHICH = "KUBECONFIG or --context says which one; where `kubectl get nodes` works, `chorus k8s doctor` does, too"


def _last_line(text: str) -> str:
    """kubectl's log comes before what it has to say."""
    return (text.strip().splitlines() or [""])[-1][-200:]


def ask_kubectl(namespace: str, *, context: str | None = None, program: Sequence[str] = ("kubectl",)) -> Told:
    """Asks the cluster. Raises ConfigError without kubectl, UnavailableError where the cluster tells nothing at all."""
    documents: list[Object] = []
    kinds, refused = set(), []
    options = ["--context", context] if context is not None else []
    for question in questions(namespace):
        try:
            done = subprocess.run(  # noqa: S603 - words of our own
                [*program, *options, "get", *question.words, "-o", "json"],
                capture_output=True,
                text=True,
                timeout=_LIMIT_S,
                check=False,
            )
        except FileNotFoundError:
            raise ConfigError(
                f"there is no {program[0]} here; on a K3s server it is `k3s kubectl`. Or run it elsewhere "
                "and give what it prints to `chorus k8s doctor --from`"
            ) from None
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"the cluster does not answer within {_LIMIT_S:.0f} s; {_WHICH}") from None
        if done.returncode == 0:
            documents.append(_parsed(done.stdout, f"kubectl get {' '.join(question.words)}"))
            kinds.add(question.kind)
        else:
            refused.append(f"{question.words[0]}: {_last_line(done.stderr) or f'exit code {done.returncode}'}")
    if not documents:
        raise UnavailableError(f"kubectl got nothing from a cluster ({refused[0]}). {_WHICH}")
    return Told(tuple(documents), frozenset(kinds), tuple(refused))


def read_saved(source: Path) -> Told:
    """Reads the `*.json` files of a folder, one file, or standard input for `-`. A kind without objects
    counts as not told.

    Raises ConfigError where there is none, or one is no JSON object.
    """
    if str(source) == "-":
        return _told([_parsed(sys.stdin.read(), "standard input")])
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    if not files:
        raise ConfigError(f"{source} has no .json files; `kubectl -n chorus get pods -o json > pods.json` makes one")
    try:
        return _told([_parsed(path.read_text("utf-8"), str(path)) for path in files])
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {source}: {error}") from error


def _told(documents: Iterable[Object]) -> Told:
    documents = tuple(documents)
    found = [item for document in documents for item in objects(document)]
    kinds = {str(item.get("kind", "")) for item in found}
    if any(item.get("kind") == "Pod" and item["metadata"].get("namespace") == DNS_NAMESPACE for item in found):
        kinds.add(_DNS_POD)
    return Told(documents, frozenset(kinds))


def _parsed(text: str, where: str) -> Object:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON ({error}); print it with -o json") from None
    items = found.get("items", []) if isinstance(found, dict) else None
    whole = isinstance(items, list) and all(
        isinstance(each, dict) and isinstance(each.get("metadata"), dict) and "name" in each["metadata"]
        for each in (items if "items" in found else [found])
    )
    if not whole or not isinstance(found, dict):
        raise ConfigError(
            f"{where} is no object of Kubernetes, nor a list of them; print it with `kubectl get ... -o json`"
        )
    return found
