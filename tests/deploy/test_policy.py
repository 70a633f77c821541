"""What every pod keeps to. Rules have kube-linter's names where it has one; an exception is the annotation that
kube-linter reads, `ignore-check.kube-linter.io/RULE`, with the reason, and one that is not needed any more is an error.

CHECKOV says which of checkov's checks of pods are covered by each; checkov itself is run by `make policy`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import pytest

from tests.deploy.conftest import SETS, Rendered
from tests.deploy.manifests import Document, containers, pod_template

IGNORE = "ignore-check.kube-linter.io/"
SKIP = "checkov.io/skip"
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMG]i?)?")

Rule = Callable[[Document, Document], Iterator[str]]


def _security(container: Document, template: Document, key: str) -> object:
    """A container's own word, or else its pod's."""
    return container.get("securityContext", {}).get(key, template["spec"].get("securityContext", {}).get(key))


def _each(wrong: Callable[[Document, Document], bool]) -> Rule:
    def rule(_: Document, template: Document) -> Iterator[str]:
        yield from (container["name"] for container in containers(template) if wrong(container, template))

    return rule


def _serving(wrong: Callable[[Document], bool]) -> Rule:
    """Of pods that go on for ever, the containers that are not over before the pod is ready."""

    def rule(document: Document, template: Document) -> Iterator[str]:
        if document["kind"] not in ("Job", "CronJob"):
            yield from (container["name"] for container in template["spec"]["containers"] if wrong(container))

    return rule


def _lacks_limit(resource: str) -> Callable[[Document, Document], bool]:
    def wrong(container: Document, _: Document) -> bool:
        resources = container.get("resources", {})
        return any(not QUANTITY.fullmatch(str(resources.get(k, {}).get(resource))) for k in ("requests", "limits"))

    return wrong


def _host_path(_: Document, template: Document) -> Iterator[str]:
    yield from (volume["name"] for volume in template["spec"].get("volumes", []) if "hostPath" in volume)


def _host_namespaces(_: Document, template: Document) -> Iterator[str]:
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC") if template["spec"].get(key))


def _token(_: Document, template: Document) -> Iterator[str]:
    """A token is there where the pod says so, and the pods that say so talk to the API server."""
    said = template["spec"].get("automountServiceAccountToken")
    needs = any(container.get("args", [])[:1] == ["k8s"] for container in template["spec"]["containers"])
    if said is not needs:
        yield f"automountServiceAccountToken is {said}"


def _own_account(_: Document, template: Document) -> Iterator[str]:
    if template["spec"].get("serviceAccountName", "default") == "default":
        yield "serviceAccountName"


def _secret_environment(_: Document, template: Document) -> Iterator[str]:
    for container in containers(template):
        entries = container.get("env", [])
        yield from (entry["name"] for entry in entries if "secretKeyRef" in entry.get("valueFrom", {}))


def _service_links(_: Document, template: Document) -> Iterator[str]:
    """CHORUS_REGISTRY_PORT and its like, made of the Services, would look like configuration."""
    if template["spec"].get("enableServiceLinks") is not False:
        yield "enableServiceLinks"


def _host_port(container: Document, _: Document) -> bool:
    return any("hostPort" in port for port in container.get("ports", []))


def _low_user(container: Document, template: Document) -> bool:
    user = _security(container, template, "runAsUser")
    return not isinstance(user, int) or user < 10_000  # those below may be somebody on the node


RULES: dict[str, Rule] = {
    "run-as-non-root": _each(lambda c, t: _security(c, t, "runAsNonRoot") is not True),
    "privilege-escalation-container": _each(lambda c, t: _security(c, t, "allowPrivilegeEscalation") is not False),
    "privileged-container": _each(lambda c, t: bool(_security(c, t, "privileged"))),
    "no-read-only-root-fs": _each(lambda c, t: _security(c, t, "readOnlyRootFilesystem") is not True),
    "drop-all-capabilities": _each(lambda c, t: c.get("securityContext", {}).get("capabilities") != {"drop": ["ALL"]}),
    "seccomp-profile": _each(lambda c, t: _security(c, t, "seccompProfile") != {"type": "RuntimeDefault"}),
    "latest-tag": _each(lambda c, t: not re.fullmatch(r"(?:[^@]+/)?[^:@/]+:(?!latest$)[\w.-]+", c["image"])),
    "unset-cpu-requirements": _each(_lacks_limit("cpu")),
    "unset-memory-requirements": _each(_lacks_limit("memory")),
    "no-liveness-probe": _serving(lambda c: "livenessProbe" not in c),
    "no-readiness-probe": _serving(lambda c: "readinessProbe" not in c),
    "host-path": _host_path,
    "host-network": _host_namespaces,
    "host-port": _each(_host_port),
    "low-user": _each(_low_user),
    "service-account-token": _token,
    "default-service-account": _own_account,
    "env-var-secret": _secret_environment,
    "service-links": _service_links,
}

# The others that are about more than the control plane's own flags: CKV_K8S_21 and CKV2_K8S_6 are held by
# test_schemas.py and test_edges.py (one namespace, everything denied), CKV_K8S_41, 42, 49, 155 to 158 and CKV2_K8S_1
# to 5 by the tests of accounts and rights below.
CHECKOV = {
    "run-as-non-root": {"CKV_K8S_23"},
    "privilege-escalation-container": {"CKV_K8S_20"},
    "privileged-container": {"CKV_K8S_16"},
    "no-read-only-root-fs": {"CKV_K8S_22"},
    "drop-all-capabilities": {"CKV_K8S_25", "CKV_K8S_28", "CKV_K8S_37", "CKV_K8S_39"},
    "seccomp-profile": {"CKV_K8S_29", "CKV_K8S_30", "CKV_K8S_31"},
    "latest-tag": {"CKV_K8S_14"},
    "unset-cpu-requirements": {"CKV_K8S_10", "CKV_K8S_11"},
    "unset-memory-requirements": {"CKV_K8S_12", "CKV_K8S_13"},
    "no-liveness-probe": {"CKV_K8S_8"},
    "no-readiness-probe": {"CKV_K8S_9"},
    "host-path": {"CKV_K8S_27"},
    "host-network": {"CKV_K8S_17", "CKV_K8S_18", "CKV_K8S_19"},
    "host-port": {"CKV_K8S_26"},
    "low-user": {"CKV_K8S_40"},
    "service-account-token": {"CKV_K8S_38"},
    "env-var-secret": {"CKV_K8S_35"},
}


def violations(document: Document) -> dict[str, list[str]]:
    """The rules that a document's pods break, and where."""
    template = pod_template(document)
    if template is None:
        return {}
    found = {name: list(rule(document, template)) for name, rule in RULES.items()}
    return {name: where for name, where in found.items() if where}


def exceptions(document: Document) -> dict[str, str]:
    """The rules that a document says it breaks, and why."""
    notes = document["metadata"].get("annotations", {})
    return {key.removeprefix(IGNORE): why for key, why in notes.items() if key.startswith(IGNORE)}


def skips(document: Document) -> dict[str, str]:
    """The checks of checkov's that a document says it fails, and why."""
    notes = document["metadata"].get("annotations", {})
    return dict(text.split("=", 1) for key, text in notes.items() if key.startswith(SKIP))


@pytest.mark.parametrize("name", SETS)
def test_rules_are_kept_or_the_exception_is_explained(rendered: Rendered, name: str):
    looked_at = 0
    for document in rendered(name):
        if pod_template(document) is None:
            continue
        looked_at += 1
        broken, excused = violations(document), exceptions(document)
        what = f"{document['kind']} {document['metadata']['name']}"
        assert broken.keys() <= excused.keys(), f"{what}: {broken}"
        assert excused.keys() <= broken.keys(), f"{what}: an exception that nothing needs"
        assert all(len(why.split()) > 3 for why in (excused | skips(document)).values()), f"{what}: say why"
    assert looked_at >= 5


def test_rules_notice_what_they_are_for(rendered: Rendered):
    """Each rule, broken on purpose in a pod that keeps to it, is the one that is noticed."""
    sound = next(doc for doc in rendered("ha") if doc["metadata"]["name"] == "chorus-registry" and pod_template(doc))
    assert violations(sound) == {}
    spoil: dict[str, Callable[[Document, Document], object]] = {
        "run-as-non-root": lambda pod, c: pod["securityContext"].update(runAsNonRoot=False),
        "privilege-escalation-container": lambda pod, c: c["securityContext"].pop("allowPrivilegeEscalation"),
        "privileged-container": lambda pod, c: c["securityContext"].update(privileged=True),
        "no-read-only-root-fs": lambda pod, c: c["securityContext"].pop("readOnlyRootFilesystem"),
        "drop-all-capabilities": lambda pod, c: c["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        "seccomp-profile": lambda pod, c: pod["securityContext"].pop("seccompProfile"),
        "latest-tag": lambda pod, c: c.update(image="localhost/chorus:latest"),
        "unset-cpu-requirements": lambda pod, c: c["resources"]["limits"].pop("cpu"),
        "unset-memory-requirements": lambda pod, c: c["resources"]["requests"].pop("memory"),
        "no-liveness-probe": lambda pod, c: c.pop("livenessProbe"),
        "no-readiness-probe": lambda pod, c: c.pop("readinessProbe"),
        "host-path": lambda pod, c: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "host-network": lambda pod, c: pod.update(hostNetwork=True),
        "host-port": lambda pod, c: c["ports"][0].update(hostPort=7101),
        "low-user": lambda pod, c: pod["securityContext"].update(runAsUser=1000),
        "service-account-token": lambda pod, c: pod.update(automountServiceAccountToken=True),
        "default-service-account": lambda pod, c: pod.pop("serviceAccountName"),
        "env-var-secret": lambda pod, c: c["env"].append({"name": "K", "valueFrom": {"secretKeyRef": {}}}),
        "service-links": lambda pod, c: pod.pop("enableServiceLinks"),
    }
    assert spoil.keys() == RULES.keys()
    for name, break_it in spoil.items():
        document = copy.deepcopy(sound)
        pod = document["spec"]["template"]["spec"]
        break_it(pod, pod["containers"][0])
        assert violations(document).keys() == {name}


@pytest.mark.parametrize("name", SETS)
def test_what_is_excused_of_checkov_is_what_is_excused_of_the_rules(rendered: Rendered, name: str):
    """Whether checkov would miss an excuse, or none needs it, `make policy` alone can tell."""
    for document in rendered(name):
        covered = set().union(*(CHECKOV.get(rule, set()) for rule in exceptions(document)))
        # A token is no breach of the rule where it is needed, but checkov can't know that.
        assert skips(document).keys() <= covered | {"CKV_K8S_38"}, document["metadata"]["name"]


def test_accounts_mount_no_token_by_themselves(rendered: Rendered):
    for name in SETS:
        accounts = [doc for doc in rendered(name) if doc["kind"] == "ServiceAccount"]
        assert all(doc["automountServiceAccountToken"] is False for doc in accounts)


def test_rights_are_no_larger_than_this(rendered: Rendered):
    """Written a second time: whoever widens a role has to do so here, too."""
    allowed = {
        ("Role", "chorus-issuer"): {("secrets", "create"), ("secrets", "get"), ("secrets", "patch")},
        ("ClusterRole", "chorus-issuer"): {("nodes", "list")},
        ("ClusterRole", "chorus-node-drain"): {("nodes", "list"), ("nodes", "watch"), ("nodes", "patch")},
    }
    seen = {}
    for name in SETS:
        for doc in rendered(name):
            if doc["kind"] in ("Role", "ClusterRole"):
                pairs = {(r, v) for rule in doc["rules"] for r in rule["resources"] for v in rule["verbs"]}
                seen[doc["kind"], doc["metadata"]["name"]] = pairs
                named = [rule for rule in doc["rules"] if "secrets" in rule["resources"] and "get" in rule["verbs"]]
                assert all(rule.get("resourceNames") for rule in named)
    assert seen == allowed
