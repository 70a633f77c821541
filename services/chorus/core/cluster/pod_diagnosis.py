"""What keeps the pods of a mesh from serving, by what the kubelet, the scheduler and events say of them."""

from __future__ import annotations

import re

from chorus.core.cluster.facts import ClusterFacts, Complaint, Container, Pod
from chorus.core.findings import Finding, Findings, fail, ok, warn

_COMPONENTS = ("identity", "registry", "coordinator", "runner")
_PULLS = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError")
_CONFIGURATION = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_WORDS_MAX = 300


def of_pods(facts: ClusterFacts) -> Findings:
    """Yields what is wrong with each pod, the cause alone where one explains the other, and which service has none."""
    if "Pod" not in facts.told:
        yield warn("pods", "not looked at: pods were not told", f"kubectl -n {facts.namespace} get pods -o json")
        return
    for component in _COMPONENTS:
        if not any(pod.component == component for pod in facts.pods):
            advice = "kubectl apply -k OVERLAY; `chorus k8s render` writes one for your nodes"
            if component == "runner":
                advice = "label the nodes that are to run models, or " + advice
            yield fail("pods", f"no {component} is there in the namespace {facts.namespace}", advice)
    good = 0
    for pod in facts.pods:
        finding = _of_pod(facts, pod)
        if finding is not None:
            yield finding
        else:
            good += 1
    if good:
        yield ok("pods", f"{good} of {len(facts.pods)} are well")


def _of_pod(facts: ClusterFacts, pod: Pod) -> Finding | None:
    if pod.phase == "Succeeded":
        return None
    about = [event for event in facts.warnings if event.kind == "Pod" and event.name == pod.name]
    if pod.unschedulable:
        return _unschedulable(pod)
    for container in pod.containers:
        if (finding := _of_container(facts, pod, container)) is not None:
            return finding
    if pod.phase == "Pending" and (finding := _not_started(facts, pod, about)) is not None:
        return finding
    if pod.phase == "Failed":
        return fail("pods", f"{pod.name} has failed", _describe(facts, pod))
    return _unready(facts, pod, about)


def _unschedulable(pod: Pod) -> Finding:
    words = pod.unschedulable[:_WORDS_MAX]
    advice = "free some of what is short, or ask for less in an overlay"
    if "nvidia.com/gpu" in words:
        advice = "another pod has the GPU, or NVIDIA's device plugin is not there"
    elif "PersistentVolumeClaim" in words or "persistentvolumeclaim" in words:
        advice = "see the findings about volumes"
    elif "untolerated taint" in words:
        advice = "take the taint off, or add a toleration in an overlay"
    elif "topology spread" in words:
        advice = "fewer machines are there than the overlay is for; take one with fewer copies"
    elif "affinity" in words or "selector" in words:
        advice = "see the findings about nodes: labels say where runners go"
    return fail("pods", f"{pod.name} has no node: {words}", advice)


def _of_container(facts: ClusterFacts, pod: Pod, container: Container) -> Finding | None:
    where, node = f"{pod.name} ({container.name})", pod.node or "its node"
    said = container.message[:_WORDS_MAX]
    if container.waiting in _PULLS:
        return fail(
            "image",
            f"{where}: the image {container.image} can't be had on {node}: {said or container.waiting}",
            f"on {node}: sudo k3s ctr images import chorus.tar; the overlay's newTag is that of `k3s ctr images ls`",
        )
    if "exec format error" in said:
        return fail("image", f"{where}: the image is for another processor than {pod.node} has", "build one for it")
    if container.waiting in _CONFIGURATION:
        return fail("pods", f"{where} can't be started: {said or container.waiting}", _for_creation(facts, pod, said))
    if container.waiting == "CrashLoopBackOff" or (container.ended not in ("", "Completed") and not container.running):
        return _crashing(facts, pod, container)
    return None


def _for_creation(facts: ClusterFacts, pod: Pod, said: str) -> str:
    if re.search(r"secret .*not found", said, re.IGNORECASE):
        return f"see the findings about certificates; kubectl -n {facts.namespace} get secrets"
    if "runAsNonRoot" in said:
        return "the image has to name its user by number, as deploy/image/Containerfile does"
    return _describe(facts, pod)


def _crashing(facts: ClusterFacts, pod: Pod, container: Container) -> Finding:
    where = f"{pod.name} ({container.name})"
    logs = f"kubectl -n {facts.namespace} logs {pod.name} -c {container.name} --previous"
    if container.ended == "OOMKilled":
        return fail(
            "pods", f"{where} took more memory than it may", "raise its limit in an overlay, or use a smaller model"
        )
    if container.exit_code == 2:
        return fail("pods", f"{where} does not like its configuration", f"{logs} says which key, and what it may be")
    if container.name in ("leaf", "join"):
        return fail(
            "certificates", f"{where}: {pod.node} has no certificate for its runner yet", f"{logs} says how to get one"
        )
    if container.name == "pull":
        return fail(
            "models",
            f"{where} can't fetch models: {container.message[:_WORDS_MAX] or f'exit code {container.exit_code}'}",
            f"{logs}; it needs HTTPS to the Internet (policy chorus-models), or put files into /var/lib/chorus/models",
        )
    if container.exit_code == 137:
        return fail("pods", f"{where} was killed: out of memory, or its liveness probe failed", _describe(facts, pod))
    return fail("pods", f"{where} ends again and again, with exit code {container.exit_code}", f"{logs} says why")


def _not_started(facts: ClusterFacts, pod: Pod, about: list[Complaint]) -> Finding | None:
    for event in about:
        said = event.message[:_WORDS_MAX]
        if event.reason == "FailedCreatePodSandBox" and (
            "runtime" in said and (pod.runtime_class or "handler") in said
        ):
            return fail(
                "gpu",
                f"{pod.name}: {pod.node} has no container runtime {pod.runtime_class}: {said}",
                "install NVIDIA's container toolkit on it and restart k3s, which finds it at its start",
            )
        if event.reason == "FailedMount" and re.search(r'secret "?[\w.-]+"? not found', said):
            return fail("certificates", f"{pod.name} waits for a Secret: {said}", "see the findings about certificates")
        if event.reason == "FailedMount" and "csi" in said.lower():
            return fail(
                "volumes", f"{pod.name}: {said}", "mtls-cert-manager needs cert-manager's csi-driver on each node"
            )
        if event.reason == "FailedMount" and "hostPath type check failed" in said:
            return fail(
                "volumes", f"{pod.name}: {said}", "chorus-models makes that folder; see what keeps its pod there"
            )
        if event.reason in ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"):
            return fail(
                "volumes" if "Sand" not in event.reason else "pods", f"{pod.name}: {said}", _describe(facts, pod)
            )
    return None


def _unready(facts: ClusterFacts, pod: Pod, about: list[Complaint]) -> Finding | None:
    waiting = [one for one in pod.containers if not one.ready and one.running]
    if pod.phase != "Running" or not waiting:
        return None
    probes = [event.message for event in about if event.reason == "Unhealthy"]
    said = f": {probes[-1][:_WORDS_MAX]}" if probes else ""
    advice = f"kubectl -n {facts.namespace} logs {pod.name}"
    if pod.component == "coordinator":
        advice += "; a coordinator is ready once a registry has told it of the mesh"
    elif pod.component == "runner":
        advice += "; a runner that loads a large model at its start takes its time"
    return fail("probes", f"{pod.name} runs and is not ready{said}", advice)


def _describe(facts: ClusterFacts, pod: Pod) -> str:
    return f"kubectl -n {facts.namespace} describe pod {pod.name}"
