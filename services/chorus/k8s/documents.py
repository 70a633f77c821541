"""What `kubectl get ... -o json` prints, read into the facts of a diagnosis.

Kinds that it does not know are passed over. Fields are those of the API's v1 objects; what is absent means what
the API says it does.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterable
from typing import Any

from cryptography import x509

from chorus.core.cluster.facts import (
    Claim,
    ClusterFacts,
    Complaint,
    Container,
    Leaf,
    Machine,
    Pod,
    ServiceFacts,
)
from chorus.core.errors import CertificateError
from chorus.k8s.cluster import Object
from chorus.transport.tls import CA_FILE, check_chain, read_certificates, spiffe_id_of

_PRESSURES = ("MemoryPressure", "DiskPressure", "PIDPressure")
_MESH = "chorus"
DNS_NAMESPACE = "kube-system"
_AUTHORITY = "chorus-ca"  # holds no leaf


def cluster_facts(documents: Iterable[Object], namespace: str, told: Iterable[str]) -> ClusterFacts:
    """The facts in objects, lists of them included. `told`: kinds that were asked for, though there may be none."""
    items = [item for document in documents for item in objects(document)]
    kinds = frozenset(told)

    def of(kind: str, where: str | None = None) -> list[Object]:
        return [item for item in items if item.get("kind") == kind and where in (None, _namespace(item, where))]

    dns = [_pod(item) for item in of("Pod", DNS_NAMESPACE) if _labels(item).get("k8s-app") == "kube-dns"]
    pods = [item for item in of("Pod", namespace) if _labels(item).get("app.kubernetes.io/part-of") == _MESH]
    secrets = [item for item in of("Secret", namespace) if item["metadata"]["name"].startswith("chorus-")]
    holders = [secret for secret in secrets if secret["metadata"]["name"] != _AUTHORITY]
    return ClusterFacts(
        namespace=namespace,
        told=kinds,
        machines=tuple(map(_machine, of("Node"))),
        runtime_classes=frozenset(item["metadata"]["name"] for item in of("RuntimeClass")),
        pods=tuple(map(_pod, pods)),
        dns_pods=tuple(dns),
        services=tuple(_services(of("Service", namespace), of("EndpointSlice", namespace), "EndpointSlice" in kinds)),
        claims=tuple(map(_claim, of("PersistentVolumeClaim", namespace))),
        storage_classes=frozenset(item["metadata"]["name"] for item in of("StorageClass")),
        leaves=tuple(leaf for secret in holders for leaf in _leaves(secret)),
        secrets=frozenset(item["metadata"]["name"] for item in secrets),
        warnings=tuple(_complaint(item) for item in of("Event", namespace) if item.get("type") == "Warning"),
    )


def _namespace(item: Object, default: str | None) -> str | None:
    found: str | None = item["metadata"].get("namespace", default)
    return found


def objects(document: Object) -> list[Object]:
    """The objects of a document; a List of one kind (PodList) need not say each object's kind."""
    kind = str(document.get("kind", ""))
    if not kind.endswith("List"):
        return [document]
    of = kind.removesuffix("List")
    return [{"kind": of, **item} if of else item for item in document.get("items") or ()]


def _labels(item: Object) -> dict[str, str]:
    found: dict[str, str] = item["metadata"].get("labels") or {}
    return found


def _machine(node: Object) -> Machine:
    status = node.get("status", {})
    conditions = {each["type"]: each["status"] for each in status.get("conditions", ())}
    gpus = str(status.get("allocatable", {}).get("nvidia.com/gpu", "0"))
    return Machine(
        name=node["metadata"]["name"],
        labels=_labels(node),
        ready=conditions.get("Ready") == "True",
        schedulable=not node.get("spec", {}).get("unschedulable", False),
        architecture=status.get("nodeInfo", {}).get("architecture", ""),
        pressure=tuple(what for what in _PRESSURES if conditions.get(what) == "True"),
        gpus=int(gpus) if gpus.isdigit() else 0,
    )


def _pod(pod: Object) -> Pod:
    spec, status = pod.get("spec", {}), pod.get("status", {})
    unschedulable = [
        each.get("message") or each.get("reason", "")
        for each in status.get("conditions", ())
        if each["type"] == "PodScheduled" and each["status"] == "False"
    ]
    states = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    return Pod(
        name=pod["metadata"]["name"],
        component=_labels(pod).get("app.kubernetes.io/component", ""),
        node=spec.get("nodeName", ""),
        phase=status.get("phase", ""),
        containers=tuple(map(_container, states)),
        unschedulable=unschedulable[0] if unschedulable else "",
        runtime_class=spec.get("runtimeClassName", ""),
        labels=_labels(pod),
    )


def _container(status: Object) -> Container:
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or (status.get("lastState") or {}).get("terminated") or {}
    code = ended.get("exitCode", 0)
    return Container(
        name=status["name"],
        image=status.get("image", ""),
        ready=bool(status.get("ready")),
        running="running" in state,
        waiting=waiting.get("reason", ""),
        ended=(ended.get("reason") or ("Completed" if code == 0 else "Error")) if ended else "",
        exit_code=code,
        message=_message(waiting, ended),
        restarts=status.get("restartCount", 0),
    )


def _message(waiting: Object, ended: Object) -> str:
    """A back-off's own words only say that there is one; those of the end before it say why."""
    words = str(waiting.get("message", ""))
    return str(ended.get("message") or words) if not words or words.startswith("back-off") else words


def _services(services: list[Object], slices: list[Object], told: bool) -> Iterable[ServiceFacts]:
    ready: Counter[str] = Counter()
    for item in slices:
        # An endpoint that says nothing of being ready is.
        states = [(each.get("conditions") or {}).get("ready", True) for each in item.get("endpoints") or ()]
        ready[_labels(item).get("kubernetes.io/service-name", "")] += sum(state is not False for state in states)
    for item in services:
        name = item["metadata"]["name"]
        yield ServiceFacts(name, ready[name] if told else None)


def _claim(claim: Object) -> Claim:
    return Claim(
        claim["metadata"]["name"], claim.get("status", {}).get("phase", ""), claim["spec"].get("storageClassName", "")
    )


def _complaint(event: Object) -> Complaint:
    about = event.get("involvedObject") or {}
    return Complaint(about.get("kind", ""), about.get("name", ""), event.get("reason", ""), event.get("message") or "")


def _leaves(secret: Object) -> Iterable[Leaf]:
    data: dict[str, Any] = secret.get("data") or {}
    name = secret["metadata"]["name"]
    for key in sorted(data):
        if key.endswith(".crt") and key != CA_FILE:
            yield _leaf(name, key, str(data[key]), str(data.get(CA_FILE, "")))


def _leaf(secret: str, key: str, coded: str, coded_authority: str) -> Leaf:
    """Reads a certificate, and no key."""
    try:
        chain = read_certificates(base64.b64decode(coded, validate=True), f"{key} of the Secret {secret}")
        authorities = read_certificates(base64.b64decode(coded_authority, validate=True), f"{CA_FILE} of {secret}")
        leaf = chain[0]
        names = _names(leaf)
    except (CertificateError, binascii.Error) as error:
        return Leaf(secret, key, problem=str(error))
    try:
        check_chain(chain, authorities)
        problem = ""
    except CertificateError as error:
        problem = str(error)
    begins, ends = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    return Leaf(secret, key, names, begins, ends, problem)


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    """Its SPIFFE id, and the DNS names that it is dialled by. Raises CertificateError."""
    identity = spiffe_id_of(leaf)
    others = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (str(identity), *others.get_values_for_type(x509.DNSName))
