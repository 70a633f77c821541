"""`chorus k8s doctor` over what kubectl prints: a cluster that is well, and each thing that can be wrong with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chorus.cli.k8s import app
from chorus.core.cluster.diagnosis import diagnose
from chorus.core.findings import Finding, Level
from chorus.identity.ca import now_utc
from chorus.identity.policy import load_policy
from chorus.k8s.documents import cluster_facts
from chorus.k8s.issuing import Issuer
from chorus.k8s.reading import ask_kubectl, questions, read_saved
from tests.deploy.api_server import node, serving
from tests.deploy.conftest import Rendered
from tests.deploy.edges import workloads
from tests.deploy.manifests import containers

Item = dict[str, Any]
NOW = now_utc()
KINDS = frozenset(question.kind for question in questions("chorus"))
NODES = ("desktop", "laptop")


def pod(name: str, template: Item, where: str) -> Item:
    """A Pod that runs, as the API tells it, shortened."""
    spec = template["spec"]
    done = {"terminated": {"exitCode": 0, "reason": "Completed"}}

    def status(container: Item, state: Item) -> Item:
        return {
            "name": container["name"],
            "image": container["image"],
            "ready": True,
            "restartCount": 0,
            "state": state,
        }

    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "chorus", "labels": template["metadata"]["labels"]},
        "spec": {**spec, "nodeName": where},
        "status": {
            "phase": "Running",
            "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
            "initContainerStatuses": [status(each, done) for each in spec.get("initContainers", [])],
            "containerStatuses": [
                status(each, {"running": {"startedAt": "2026-11-26T00:00:00Z"}}) for each in spec["containers"]
            ],
        },
    }


def machine(name: str) -> Item:
    item = node(name)
    item["status"] |= {"nodeInfo": {"architecture": "amd64"}, "allocatable": {"cpu": "8"}}
    return item


@pytest.fixture(scope="module")
def healthy(rendered: Rendered, tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Every object of a mesh that serves on a machine with a GPU and one without."""
    documents = rendered("selfsigned")
    with serving(tmp_path_factory.mktemp("account")) as (api, access):
        for name in NODES:
            api.put(f"/api/v1/nodes/{name}", machine(name))
        Issuer(access, load_policy(), trust_domain="chorus.local", now=NOW).run()
        secrets = [copy.deepcopy(doc) for path, doc in api.objects.items() if "/secrets/" in path]
    for secret in secrets:
        secret |= {"kind": "Secret"}
        secret["metadata"]["namespace"] = "chorus"
    machines = [machine(name) for name in NODES]
    machines[0]["metadata"]["labels"]["chorus.mesh/gpu"] = "nvidia"
    machines[0]["status"]["allocatable"]["nvidia.com/gpu"] = "1"
    items = [*machines, *secrets]
    items += [doc for doc in documents if doc["kind"] in ("Service", "RuntimeClass")]
    items.append({"kind": "StorageClass", "metadata": {"name": "local-path"}})
    for each in workloads(documents):
        if each.service in ("identity", "registry", "coordinator", "runner", "models"):
            where = "laptop" if each.name == "chorus-runner" else "desktop"
            items.append(pod(f"{each.name}-x7k2p", each.template, where))
    for service in ("chorus-identity", "chorus-registry", "chorus-coordinator"):
        metadata = {
            "name": f"{service}-abcde",
            "namespace": "chorus",
            "labels": {"kubernetes.io/service-name": service},
        }
        ready = {"addresses": ["10.42.0.9"], "conditions": {"ready": True}}
        items.append({"kind": "EndpointSlice", "metadata": metadata, "endpoints": [ready]})
    dns = {"metadata": {"labels": {"k8s-app": "kube-dns"}}, "spec": {"containers": [{"name": "coredns", "image": "c"}]}}
    items.append(pod("coredns-1", dns, "desktop") | {})
    items[-1]["metadata"]["namespace"] = "kube-system"
    return items


def examine(items: list[Item], after: timedelta = timedelta()) -> list[Finding]:
    facts = cluster_facts([{"kind": "List", "items": items}], "chorus", KINDS)
    return list(diagnose(facts, now=(NOW + after).timestamp()))


def broken(items: list[Item], after: timedelta = timedelta()) -> list[Finding]:
    return [finding for finding in examine(items, after) if finding.level is not Level.OK]


def test_a_cluster_that_is_well_has_nothing_wrong(healthy: list[Item]):
    found = examine(healthy, timedelta(hours=1))
    assert {finding.level for finding in found} == {Level.OK}
    assert {finding.check for finding in found} == {"nodes", "gpu", "dns", "certificates", "pods", "services"}


def get(items: list[Item], kind: str, name: str) -> Item:
    """The object of that kind whose name begins so."""
    return next(each for each in items if each["kind"] == kind and each["metadata"]["name"].startswith(name))


def state(items: list[Item], name: str, container: str, **status: Any) -> None:
    """Changes what is told of a container, whose pod is not ready then."""
    item = get(items, "Pod", name)
    told = item["status"]["initContainerStatuses"] + item["status"]["containerStatuses"]
    next(each for each in told if each["name"] == container).update({"ready": False, **status})


def waits(reason: str, message: str = "", /, **ended: Any) -> Item:
    last = {"lastState": {"terminated": ended}} if ended else {}
    return {"state": {"waiting": {"reason": reason, "message": message}}, **last}


def pending(items: list[Item], name: str, **condition: str) -> None:
    """Makes a pod one that has not begun, with an unsatisfied condition."""
    item = get(items, "Pod", name)
    item["status"] = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"} | condition]}


def event(items: list[Item], about: str, reason: str, message: str) -> None:
    whole = get(items, "Pod", about)["metadata"]["name"]
    items.append(
        {
            "kind": "Event",
            "metadata": {"name": f"{whole}.1", "namespace": "chorus"},
            "type": "Warning",
            "reason": reason,
            "message": message,
            "involvedObject": {"kind": "Pod", "name": whole},
        }
    )


def drop(items: list[Item], kind: str, name: str) -> None:
    items.remove(get(items, kind, name))


Break = Callable[[list[Item]], object]
CRASH = "back-off 5m0s restarting failed container"
# What is done to the cluster; the check that finds it, a word of what it says, and a word of what it advises.
WRONG: dict[str, tuple[Break, str, str, str]] = {
    "no label": (
        lambda i: [each["metadata"]["labels"].clear() for each in i if each["kind"] == "Node"],
        "nodes", "no node has the label", "kubectl label",
    ),
    "label of another value": (
        lambda i: [get(i, "Node", name)["metadata"]["labels"].update({"chorus.mesh/runner": "yes"}) for name in NODES],
        "nodes", "'yes'", "kubectl label",
    ),
    "a node is lost": (
        lambda i: get(i, "Node", "laptop")["status"]["conditions"][1].update(status="Unknown"),
        "nodes", "laptop is not ready", "k3s-agent",
    ),
    "cordoned": (
        lambda i: get(i, "Node", "laptop")["spec"].update(unschedulable=True), "nodes", "cordoned", "uncordon"
    ),
    "a mark stays": (
        lambda i: get(i, "Node", "laptop")["metadata"]["labels"].update({"chorus.mesh/drain": "not-ready"}),
        "nodes", "still marked", "chorus.mesh/drain-",
    ),
    "a full disk": (
        lambda i: get(i, "Node", "laptop")["status"]["conditions"].append({"type": "DiskPressure", "status": "True"}),
        "nodes", "DiskPressure", "free",
    ),
    "another processor": (
        lambda i: get(i, "Node", "laptop")["status"].update(nodeInfo={"architecture": "arm64"}),
        "nodes", "arm64", "chorus.mesh/runner-",
    ),
    "no device plugin": (
        lambda i: get(i, "Node", "desktop")["status"]["allocatable"].pop("nvidia.com/gpu"),
        "gpu", "offers no nvidia.com/gpu", "device plugin",
    ),
    "no RuntimeClass": (lambda i: drop(i, "RuntimeClass", "nvidia"), "gpu", "no RuntimeClass nvidia", "gpu-nvidia"),
    "no runner with CUDA": (
        lambda i: drop(i, "Pod", "chorus-runner-nvidia"), "gpu", "no runner with CUDA", "gpu-nvidia"
    ),
    "no container toolkit": (
        lambda i: (
            pending(i, "chorus-runner-nvidia"),
            event(i, "chorus-runner-nvidia", "FailedCreatePodSandBox", 'no runtime for "nvidia" is configured'),
        ),
        "gpu", "no container runtime nvidia", "restart k3s",
    ),
    "no DNS": (lambda i: state_dns(i), "dns", "kube-dns", "kube-system"),
    "no image": (
        lambda i: state(
            i, "chorus-coordinator", "coordinator",
            **waits("ImagePullBackOff", 'Back-off pulling image "localhost/chorus:0.1.0"'),
        ),
        "image", "localhost/chorus:0.1.0", "ctr images import",
    ),
    "an image for another processor": (
        lambda i: state(
            i, "chorus-registry", "registry",
            **waits("CrashLoopBackOff", CRASH, exitCode=255, reason="Error", message="exec chorus: exec format error"),
        ),
        "image", "another processor", "build",
    ),
    "a Secret is gone, says the kubelet": (
        lambda i: (
            pending(i, "chorus-registry"),
            event(i, "chorus-registry", "FailedMount", 'SetUp failed: secret "chorus-registry-tls" not found'),
        ),
        "certificates", "waits for a Secret", "certificates",
    ),
    "no Secret": (lambda i: drop(i, "Secret", "chorus-registry-tls"), "certificates", "no Secret", "issue-now"),
    "a node without a leaf": (
        lambda i: get(i, "Secret", "chorus-runner-leaves")["data"].pop("laptop.crt"),
        "certificates", "the runner of laptop", "issue-now",
    ),
    "damaged": (
        lambda i: get(i, "Secret", "chorus-registry-tls")["data"].update({"tls.crt": "AAAA"}),
        "certificates", "chorus-registry-tls", "delete the Secret",
    ),
    "not base64": (
        lambda i: get(i, "Secret", "chorus-registry-tls")["data"].update({"tls.crt": "%"}),
        "certificates", "chorus-registry-tls", "delete the Secret",
    ),
    "another's certificate": (
        lambda i: get(i, "Secret", "chorus-registry-tls")["data"].update(
            get(i, "Secret", "chorus-coordinator-tls")["data"]
        ),
        "certificates", "others dial registry.registry", "delete the Secret",
    ),
    "the leaf's init container": (
        lambda i: state(i, "chorus-runner-x", "leaf", **waits("CrashLoopBackOff", CRASH, exitCode=1, reason="Error")),
        "certificates", "laptop has no certificate", "logs",
    ),
    "models can't be fetched": (
        lambda i: state(i, "chorus-models", "pull", **waits("CrashLoopBackOff", CRASH, exitCode=1, reason="Error")),
        "models", "can't fetch models", "HTTPS",
    ),
    "configuration": (
        lambda i: state(
            i, "chorus-coordinator", "coordinator", **waits("CrashLoopBackOff", CRASH, exitCode=2, reason="Error")
        ),
        "pods", "does not like its configuration", "--previous",
    ),
    "out of memory": (
        lambda i: state(
            i, "chorus-runner-x", "runner", **waits("CrashLoopBackOff", CRASH, exitCode=137, reason="OOMKilled")
        ),
        "pods", "more memory", "limit",
    ),
    "killed": (
        lambda i: state(
            i, "chorus-runner-x", "runner", **waits("CrashLoopBackOff", CRASH, exitCode=137, reason="Error")
        ),
        "pods", "was killed", "describe",
    ),
    "crashes": (
        lambda i: state(i, "chorus-runner-x", "runner", **waits("CrashLoopBackOff", CRASH, exitCode=3, reason="Error")),
        "pods", "exit code 3", "--previous",
    ),
    "a variable's Secret": (
        lambda i: state(
            i, "chorus-runner-x", "runner", **waits("CreateContainerConfigError", 'secret "token" not found')
        ),
        "pods", "can't be started", "get secrets",
    ),
    "nowhere to go": (
        lambda i: pending(
            i, "chorus-coordinator", status="False", reason="Unschedulable",
            message="0/2 nodes are available: 2 node(s) didn't match pod topology spread constraints.",
        ),
        "pods", "topology spread", "fewer machines",
    ),
    "the GPU is taken": (
        lambda i: pending(
            i, "chorus-runner-nvidia", status="False", reason="Unschedulable",
            message="0/2 nodes are available: 1 Insufficient nvidia.com/gpu.",
        ),
        "pods", "Insufficient nvidia.com/gpu", "another pod has the GPU",
    ),
    "the models' folder": (
        lambda i: (
            pending(i, "chorus-runner-x"),
            event(i, "chorus-runner-x", "FailedMount", "hostPath type check failed: /var/lib/chorus/models"),
        ),
        "volumes", "hostPath", "chorus-models",
    ),
    "a probe fails": (
        lambda i: (
            state(i, "chorus-coordinator", "coordinator"),
            event(i, "chorus-coordinator", "Unhealthy", "Readiness probe failed: service unhealthy (NOT_SERVING)"),
        ),
        "probes", "NOT_SERVING", "registry",
    ),
    "no registry": (lambda i: drop(i, "Pod", "chorus-registry"), "pods", "no registry is there", "apply"),
    "no Service": (lambda i: drop(i, "Service", "chorus-registry"), "services", "no Service chorus-registry", "apply"),
    "nobody behind a Service": (
        lambda i: get(i, "EndpointSlice", "chorus-registry")["endpoints"][0]["conditions"].update(ready=False),
        "services", "chorus-registry leads to no ready pod", "get pods",
    ),
    "a volume of no class": (
        lambda i: i.append(claim("fast")), "volumes", "'fast'", "local-path"
    ),
    "a volume that waits": (lambda i: i.append(claim("local-path")), "volumes", "is Pending", "describe pvc"),
}  # fmt: skip


def state_dns(items: list[Item]) -> None:
    get(items, "Pod", "coredns")["status"]["containerStatuses"][0]["ready"] = False


def claim(storage_class: str) -> Item:
    metadata = {"name": "models-chorus-runner-0", "namespace": "chorus"}
    return {
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": {"storageClassName": storage_class},
        "status": {"phase": "Pending"},
    }


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_what_to_do(healthy: list[Item], what: str):
    items = copy.deepcopy(healthy)
    break_it, check, message, advice = WRONG[what]
    break_it(items)
    found = broken(items)
    assert any((f.check, message in f.message, advice in f.advice) == (check, True, True) for f in found), found
    assert all(finding.advice for finding in found)
    # A cause is said once or twice, not by everything that follows from it.
    assert len(found) <= 2, found


def test_certificates_are_told_to_end_before_they_do(healthy: list[Item]):
    lifetime = load_policy().lifetimes
    assert broken(healthy, timedelta(minutes=5)) == []
    shortest = min(lifetime.values())
    late = [f for f in broken(healthy, shortest * 0.8) if f.check == "certificates"]
    assert {f.level for f in late} == {Level.WARN}
    over = [f for f in broken(healthy, shortest * 1.01) if f.level is Level.FAIL]
    assert over
    assert all("ended on" in f.message for f in over)
    early = broken(healthy, timedelta(days=-2))
    assert any("begins on" in f.message for f in early)


def test_an_empty_namespace_is_told_what_to_apply(healthy: list[Item]):
    only_nodes = [each for each in healthy if each["kind"] in ("Node", "RuntimeClass", "StorageClass")]
    found = broken(only_nodes)
    assert {f.check for f in found} <= {"pods", "services", "dns"}
    assert any("kubectl apply -k" in f.advice for f in found)


def test_what_was_not_told_is_not_said_to_be_missing(healthy: list[Item]):
    pods = [each for each in healthy if each["kind"] == "Pod"]
    found = list(diagnose(cluster_facts([{"kind": "PodList", "items": pods}], "chorus", {"Pod"}), now=NOW.timestamp()))
    assert [f.level for f in found if f.check in ("services", "gpu", "volumes", "dns")] == []
    assert sorted(f.check for f in found if f.level is Level.WARN) == ["certificates", "nodes"]


def test_keys_are_not_among_the_facts(healthy: list[Item]):
    keys = [text for item in healthy if item["kind"] == "Secret" for k, text in item["data"].items() if "key" in k]
    told = repr(cluster_facts(healthy, "chorus", KINDS))
    assert keys
    assert not any(key in told for key in keys)


def test_it_reads_what_kubectl_printed(healthy: list[Item], tmp_path: Path):
    by_kind: dict[str, list[Item]] = {}
    for item in healthy:
        by_kind.setdefault(item["kind"], []).append(item)
    for kind, items in by_kind.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": items}))
    result = CliRunner().invoke(app, ["doctor", "--from", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    folder = json.loads(result.stdout)
    assert folder["fail"] == 0
    whole = json.dumps({"kind": "List", "items": healthy})
    assert json.loads(CliRunner().invoke(app, ["doctor", "--from", "-", "--json"], input=whole).stdout) == folder
    (tmp_path / "Pod.json").unlink()
    (tmp_path / "more.json").write_text(json.dumps(by_kind["Node"][0] | {"status": {}}))
    result = CliRunner().invoke(app, ["doctor", "--from", str(tmp_path)])
    assert result.exit_code == 1
    assert "desktop is not ready" in result.stdout


@pytest.mark.parametrize("text", ["", "pods", "[]", "{}", '{"items": 3}', '{"items": [{"metadata": {}}]}', "null"])
def test_what_is_no_answer_of_kubectl_is_refused(tmp_path: Path, text: str):
    (tmp_path / "pods.json").write_text(text)
    result = CliRunner().invoke(app, ["doctor", "--from", str(tmp_path)])
    assert result.exit_code == 2
    assert "-o json" in result.output


def test_it_asks_kubectl_and_says_what_that_was_not_told(healthy: list[Item], tmp_path: Path):
    (tmp_path / "pods.json").write_text(json.dumps({"kind": "List", "items": healthy}))
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\n[ "$1" = get ] || shift 2\n'
        f'case "$2" in nodes) echo "nodes is forbidden" >&2; exit 1;; pods) cat {tmp_path}/pods.json;; '
        """*) echo '{"kind": "List", "items": []}';; esac\n"""
    )
    kubectl.chmod(0o755)
    told = ask_kubectl("chorus", context="house", program=[str(kubectl)])
    assert told.kinds == KINDS - {"Node"}
    assert told.refused == ("nodes: nodes is forbidden",)
    assert read_saved(tmp_path / "pods.json").documents[0] in told.documents
    kubectl.write_text("#!/bin/sh\necho refused >&2; exit 1\n")
    with pytest.raises(Exception, match=r"got nothing.*refused"):
        ask_kubectl("chorus", program=[str(kubectl)])
    with pytest.raises(Exception, match="k3s kubectl"):
        ask_kubectl("chorus", program=[str(tmp_path / "none")])


def test_names_in_the_table_are_those_of_the_manifests(rendered: Rendered):
    """What the diagnosis knows by name is there in what it diagnoses."""
    pods = [*workloads(rendered("home")), *workloads(rendered("selfsigned"))]
    assert {"join", "leaf", "pull", "runner"} <= {c["name"] for each in pods for c in containers(each.template)}
