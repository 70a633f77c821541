"""What is wrong in a cluster, and what to do: from causes to symptoms, so that the first line is the one to act on."""

from __future__ import annotations

from datetime import UTC, datetime

from chorus.core.cluster.facts import ClusterFacts, Leaf, Machine
from chorus.core.cluster.labels import DRAIN_LABEL, GPU_LABEL, RUNNER_LABEL
from chorus.core.cluster.pod_diagnosis import of_pods
from chorus.core.findings import Findings, fail, ok, warn

ARCHITECTURE = "amd64"
"""Of the image: its Containerfile builds for x86-64."""

_LEAVES = "chorus-runner-leaves"
_SINGLES = {"chorus-registry-tls": "registry", "chorus-coordinator-tls": "coordinator"}
# The Job renews after two thirds, and looks every quarter of an hour: a leaf this old was due for long.
_LATE = 0.75
_APPLY = "kubectl apply -k OVERLAY; `chorus k8s render` writes one for your nodes"
_ISSUE = "kubectl -n {0} create job --from=cronjob/chorus-issue issue-now; then kubectl -n {0} logs job/issue-now"


def diagnose(facts: ClusterFacts, *, now: float) -> Findings:
    """Yields every finding: nodes, GPUs, DNS, certificates, volumes, pods, Services. Kinds that were not told of are
    said to be so, and otherwise passed over."""
    yield from _of_machines(facts)
    yield from _of_gpus(facts)
    yield from _of_dns(facts)
    yield from _of_certificates(facts, now)
    yield from _of_claims(facts)
    yield from of_pods(facts)
    yield from _of_services(facts)


def _of_machines(facts: ClusterFacts) -> Findings:
    if "Node" not in facts.told:
        yield warn(
            "nodes", "not looked at: nodes were not told", "kubectl get nodes -o json, with the right to list them"
        )
        return
    runners = [one for one in facts.machines if one.labels.get(RUNNER_LABEL) == "true"]
    if not runners:
        near = [one for one in facts.machines if RUNNER_LABEL in one.labels]
        said = f"; {near[0].name} has it with another value, {near[0].labels[RUNNER_LABEL]!r}" if near else ""
        names = ", ".join(one.name for one in facts.machines) or "none"
        yield fail(
            "nodes",
            f"no node has the label {RUNNER_LABEL}=true, so there are no runners{said} (nodes: {names})",
            f"kubectl label --overwrite node NAME {RUNNER_LABEL}=true",
        )
    troubled = False
    for one in runners:
        for finding in _of_machine(one):
            troubled = True
            yield finding
    if runners and not troubled:
        yield ok("nodes", f"{len(runners)} of {len(facts.machines)} run models")


def _of_machine(one: Machine) -> Findings:
    if not one.ready:
        yield fail(
            "nodes",
            f"{one.name} is not ready: its kubelet has not been heard of",
            "see whether it is up and reaches the server; on it: systemctl status k3s-agent (or k3s)",
        )
    if not one.schedulable:
        yield warn("nodes", f"{one.name} is cordoned, and its runner drained", f"kubectl uncordon {one.name} when done")
    elif one.ready and (mark := one.labels.get(DRAIN_LABEL)):
        yield fail(
            "nodes",
            f"{one.name} is still marked {DRAIN_LABEL}={mark}, which keeps its runner away",
            f"chorus-node-drain should take it off; if it is not running: kubectl label node {one.name} {DRAIN_LABEL}-",
        )
    for what in one.pressure:
        yield fail(
            "nodes", f"{one.name} says {what}: pods are put off it", f"free some; kubectl describe node {one.name}"
        )
    if one.architecture not in ("", ARCHITECTURE):
        yield fail(
            "nodes",
            f"{one.name} is {one.architecture}, and the image is built for {ARCHITECTURE}",
            f"take it out: kubectl label node {one.name} {RUNNER_LABEL}-; or build an image for it",
        )


def _of_gpus(facts: ClusterFacts) -> Findings:
    wanted = [one for one in facts.machines if one.labels.get(GPU_LABEL) == "nvidia"]
    uses = [pod for pod in facts.pods if pod.runtime_class]
    for name in (
        sorted({pod.runtime_class for pod in uses} - facts.runtime_classes) if "RuntimeClass" in facts.told else ()
    ):
        yield fail("gpu", f"there is no RuntimeClass {name}", "components/gpu-nvidia makes it: list it in the overlay")
    broken = [one.name for one in wanted if one.gpus == 0]
    for name in broken:
        yield fail(
            "gpu",
            f"{name} is labelled {GPU_LABEL}=nvidia and offers no nvidia.com/gpu",
            "install NVIDIA's driver and container toolkit on it, restart k3s, and have its device plugin run; "
            f"or go without: kubectl label node {name} {GPU_LABEL}-",
        )
    on_nvidia = any(pod.labels.get("app.kubernetes.io/instance") == "runner-nvidia" for pod in facts.pods)
    if wanted and not broken and "Pod" in facts.told and facts.pods and not on_nvidia:
        yield fail(
            "gpu",
            f"{wanted[0].name} is labelled {GPU_LABEL}=nvidia and no runner with CUDA is there",
            "list components/gpu-nvidia in the overlay and apply it",
        )
    elif wanted and not broken:
        yield ok("gpu", f"{', '.join(one.name for one in wanted)} offer NVIDIA GPUs")


def _of_dns(facts: ClusterFacts) -> Findings:
    if "DnsPod" not in facts.told:
        return
    ready = [pod for pod in facts.dns_pods if pod.phase == "Running" and all(one.ready for one in pod.containers)]
    if ready:
        yield ok("dns", f"{len(ready)} CoreDNS pods are ready")
        return
    yield fail(
        "dns",
        "no pod labelled k8s-app=kube-dns is ready in kube-system: no service finds another by its name",
        "kubectl -n kube-system describe pod -l k8s-app=kube-dns; with another DNS, change the policy chorus-dns",
    )


def _of_certificates(facts: ClusterFacts, now: float) -> Findings:
    if "Secret" not in facts.told:
        yield warn("certificates", "not looked at: Secrets were not told", "run this with the right to read them")
        return
    if not facts.pods and not facts.secrets:
        return  # nothing is installed; said elsewhere
    found = [*_missing(facts), *(one for leaf in facts.leaves for one in _of_leaf(facts, leaf, now))]
    yield from found
    if not found and facts.leaves:
        first = min(facts.leaves, key=lambda leaf: leaf.ends)
        yield ok("certificates", f"{len(facts.leaves)}, the first to end is that of {_who(first)}, {_day(first.ends)}")


def _missing(facts: ClusterFacts) -> Findings:
    issue = _ISSUE.format(facts.namespace)
    for secret in sorted(_SINGLES.keys() - facts.secrets):
        yield fail(
            "certificates", f"there is no Secret {secret}; its pods wait for it", f"list a component mtls-*; {issue}"
        )
    if _LEAVES in facts.secrets:
        have = {leaf.key.removesuffix(".crt") for leaf in facts.leaves if leaf.secret == _LEAVES}
        for one in facts.machines:
            if one.labels.get(RUNNER_LABEL) == "true" and one.name not in have:
                yield fail("certificates", f"the runner of {one.name} has none", issue)


def _of_leaf(facts: ClusterFacts, leaf: Leaf, now: float) -> Findings:
    issue = _ISSUE.format(facts.namespace)
    if leaf.problem:
        yield fail("certificates", f"that of {_who(leaf)}: {leaf.problem}", f"delete the Secret {leaf.secret}; {issue}")
        return
    if now < leaf.begins:
        yield fail(
            "certificates",
            f"that of {_who(leaf)} begins on {_day(leaf.begins)}",
            "set this machine's clock, or the nodes'",
        )
    elif now >= leaf.ends:
        yield fail("certificates", f"that of {_who(leaf)} ended on {_day(leaf.ends)}", issue)
    elif now > leaf.begins + (leaf.ends - leaf.begins) * _LATE:
        yield warn(
            "certificates", f"that of {_who(leaf)} ends on {_day(leaf.ends)} and should be renewed by now", issue
        )
    for role in filter(None, [_SINGLES.get(leaf.secret)]):
        if not any(name.startswith(f"{role}.{role}.") for name in leaf.names):
            yield fail(
                "certificates",
                f"that of {_who(leaf)} is for {', '.join(leaf.names) or 'nobody'}; others dial {role}.{role}.…",
                f"delete the Secret {leaf.secret}; {issue}",
            )


def _who(leaf: Leaf) -> str:
    return leaf.secret if leaf.key == "tls.crt" else f"the runner {leaf.key.removesuffix('.crt')}"


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _of_claims(facts: ClusterFacts) -> Findings:
    for claim in facts.claims:
        if claim.phase == "Bound":
            continue
        if "StorageClass" in facts.told and claim.storage_class not in facts.storage_classes:
            advice = "K3s' own is local-path; name one of: " + (
                ", ".join(sorted(facts.storage_classes)) or "none is there"
            )
            yield fail(
                "volumes", f"{claim.name} wants the StorageClass {claim.storage_class!r}, which is not there", advice
            )
        else:
            advice = f"kubectl -n {facts.namespace} describe pvc {claim.name}"
            yield warn("volumes", f"{claim.name} is {claim.phase}; it is bound once its pod has a node", advice)


def _of_services(facts: ClusterFacts) -> Findings:
    if "Service" not in facts.told:
        return
    names = {service.name for service in facts.services}
    for service in ("chorus-identity", "chorus-registry", "chorus-coordinator"):
        if service not in names:
            yield fail("services", f"there is no Service {service} in the namespace {facts.namespace}", _APPLY)
    for each in facts.services:
        if each.ready == 0:
            yield fail(
                "services",
                f"{each.name} leads to no ready pod: its name resolves to nobody",
                f"kubectl -n {facts.namespace} get pods; the findings about pods say why none is ready",
            )
    if names and all(each.ready for each in facts.services):
        yield ok("services", f"{', '.join(sorted(names))} lead to ready pods")
