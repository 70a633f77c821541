"""The manifests agree with the services: ports, probes, names, certificates, policies. Each of them, broken on purpose,
is noticed."""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client.metrics_core import Metric

from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import now_utc
from chorus.identity.policy import load_policy
from chorus.k8s.enrolling import TOKENS_SECRET
from chorus.k8s.issuing import Issuer
from chorus.telemetry.event_metrics import EventMetrics
from chorus.telemetry.lease_metrics import LeaseMetrics
from chorus.telemetry.metrics import GenerationMetrics, MachineMetrics, RpcMetrics, admission_gauges, new_registry
from tests.deploy.api_server import node, serving
from tests.deploy.conftest import SETS, Rendered
from tests.deploy.edges import SERVICES, disagreements, workloads
from tests.deploy.manifests import K3S, Document, one

Names = dict[str, tuple[str, ...]]
Break = Callable[[list[Document]], object]


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Names:
    """The names in what `chorus k8s issue` makes, by Secret, and by runner in that of all leaves."""
    names: Names = {}
    with serving(tmp_path_factory.mktemp("account")) as (api, cluster):
        api.put("/api/v1/nodes/desktop", node("desktop"))
        issuer = Issuer(cluster, load_policy(), trust_domain="chorus.local", now=now_utc())
        # They join, by a token for their name.
        for runner in (*issuer.run(leaves=False).runners, "chorus-runner-0"):
            identity = SpiffeId("chorus.local", Role.RUNNER, runner)
            names[f"{TOKENS_SECRET}/{runner}"] = (str(identity), identity.dns_name)
        issuer.run()
        secrets = {path.rpartition("/")[2]: doc["data"] for path, doc in api.objects.items() if "/secrets/" in path}
    for name, data in secrets.items():
        for key, text in data.items():
            if key.endswith(".crt") and key != "ca.crt":
                leaf = x509.load_pem_x509_certificate(base64.b64decode(text))
                where = name if key == "tls.crt" else f"{name}/{key.removesuffix('.crt')}"
                names[where] = _names(leaf)
    return names


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    sans = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (*sans.get_values_for_type(x509.UniformResourceIdentifier), *sans.get_values_for_type(x509.DNSName))


def _certificates(documents: tuple[Document, ...], issued: Names) -> Names:
    """The names of each Secret's leaf: those that cert-manager is asked for, or else those of the Job."""
    asked = [document["spec"] for document in documents if document["kind"] == "Certificate"]
    return {spec["secretName"]: (*spec.get("uris", ()), *spec.get("dnsNames", ())) for spec in asked} or issued


@pytest.mark.parametrize("name", SETS)
def test_manifests_agree_with_services(rendered: Rendered, issued: Names, name: str):
    documents = rendered(name)
    assert disagreements(documents, _certificates(documents, issued)) == []


def _workload(documents: list[Document], name: str) -> Document:
    (found,) = [d for d in documents if d["metadata"]["name"] == name and d["kind"] in ("Deployment", "DaemonSet")]
    pod: Document = found["spec"]["template"]["spec"]
    return pod


def _variable(documents: list[Document], workload: str, name: str, value: str) -> None:
    entries = _workload(documents, workload)["containers"][0]["env"]
    (entry,) = [entry for entry in entries if entry["name"] == name]
    entry["value"] = value


def _policy(documents: list[Document], name: str) -> Document:
    spec: Document = one(documents, "NetworkPolicy", name)["spec"]
    return spec


BROKEN: dict[str, Break] = {
    "a port": lambda d: _workload(d, "chorus-registry")["containers"][0]["ports"][0].update(containerPort=7102),
    "a listener": lambda d: _variable(d, "chorus-runner", "CHORUS_RUNNER__LISTEN", "0.0.0.0:7999"),
    "a probe": lambda d: _workload(d, "chorus-runner")["containers"][0]["livenessProbe"]["grpc"].update(port=7201),
    "a Service's name": lambda d: one(d, "Service", "chorus-registry")["metadata"].update(name="registry"),
    "a Service's port": lambda d: one(d, "Service", "chorus-coordinator")["spec"]["ports"][0].update(port=443),
    "a Service's target": lambda d: one(d, "Service", "chorus-coordinator")["spec"]["ports"][0].update(targetPort=7101),
    "a Service's pods": lambda d: one(d, "Service", "chorus-registry")["spec"]["selector"].update(tier="x"),
    "a service's name": lambda d: _workload(d, "chorus-coordinator")["containers"][0]["env"].append(
        {"name": "CHORUS_COORDINATOR__NAME", "value": "coordinator-1"}
    ),
    "the trust domain": lambda d: _workload(d, "chorus-registry")["containers"][0]["env"].append(
        {"name": "CHORUS_MESH__TRUST_DOMAIN", "value": "other.local"}
    ),
    "whose certificate": lambda d: _workload(d, "chorus-registry")["volumes"][0]["secret"].update(
        secretName="chorus-coordinator-tls"
    ),
    "who takes which leaf": lambda d: _workload(d, "chorus-runner")["initContainers"][0]["env"][0].update(
        valueFrom={"fieldRef": {"fieldPath": "metadata.name"}}
    ),
    "whom a runner dials": lambda d: _variable(
        d, "chorus-runner", "CHORUS_RUNNER__REGISTRIES", "registry@chorus-registry:7301"
    ),
    "what a runner tells": lambda d: _variable(d, "chorus-runner", "CHORUS_RUNNER__ADVERTISE", "10.42.0.7:7202"),
    "where revocations are watched": lambda d: _variable(
        d, "chorus-coordinator", "CHORUS_MESH__IDENTITY_SERVICE", "identity@chorus-identity:7312"
    ),
    "who has the authority's key": lambda d: _workload(d, "chorus-coordinator")["volumes"].append(
        {"name": "ca", "secret": {"secretName": "chorus-ca", "items": [{"key": "ca.key", "path": "ca.key"}]}}
    ),
    "what the authority's files are called": lambda d: _workload(d, "chorus-identity")["volumes"][0]["secret"]["items"][
        1
    ].update(path="tls.key"),
    "who reaches the authority": lambda d: _policy(d, "chorus-identity")["ingress"][0]["from"].append(
        {"podSelector": {}}
    ),
    "who watches": lambda d: _policy(d, "chorus-revocations")["podSelector"]["matchExpressions"][0]["values"].pop(),
    "a longer drain": lambda d: _variable(d, "chorus-runner", "CHORUS_RUNNER__DRAIN_GRACE_S", "300"),
    "how clients find names": lambda d: _policy(d, "chorus-client")["egress"].pop(0),
    "how services find names": lambda d: d.remove(one(d, "NetworkPolicy", "chorus-dns")),
    "a policy's port": lambda d: _policy(d, "chorus-runner")["egress"][0]["ports"][0].update(port=7301),
    "a policy's peer": lambda d: _policy(d, "chorus-registry")["ingress"][0]["from"].pop(),
    "a policy too many": lambda d: _policy(d, "chorus-registry")["ingress"][0]["from"].append({"podSelector": {}}),
    "no default": lambda d: (
        d.remove(one(d, "NetworkPolicy", "chorus-default-deny")) or d.remove(one(d, "NetworkPolicy", "chorus-registry"))
    ),
}


JOINING: dict[str, Break] = {
    "where a runner renews": lambda d: _variable(
        d, "chorus-runner", "CHORUS_MESH__RENEWAL", "identity@chorus-identity:7311"
    ),
    "where it joins": lambda d: _workload(d, "chorus-runner")["initContainers"][0]["env"][2].update(
        value="identity@chorus-registry:7312"
    ),
    "from which node it joins": lambda d: _workload(d, "chorus-runner")["initContainers"][0]["env"][3].update(
        valueFrom={"fieldRef": {"fieldPath": "metadata.name"}}
    ),
    "as whom it joins": lambda d: _workload(d, "chorus-runner")["initContainers"][0]["env"][0].update(
        valueFrom={"fieldRef": {"fieldPath": "metadata.name"}}
    ),
    "whose token it has": lambda d: _workload(d, "chorus-runner")["volumes"][0]["secret"].update(
        secretName="chorus-client-tls"
    ),
    "the Service's port to join": lambda d: one(d, "Service", "chorus-identity")["spec"]["ports"].pop(),
    "who may join": lambda d: _policy(d, "chorus-join")["ingress"][0]["from"].append({"podSelector": {}}),
    "who may have tokens made": lambda d: _policy(d, "chorus-join")["ingress"].pop(),
    "the way to join": lambda d: d.remove(one(d, "NetworkPolicy", "chorus-join-runner")),
}


@pytest.mark.parametrize("what", JOINING)
def test_what_is_broken_of_joining_is_noticed(rendered: Rendered, issued: Names, what: str):
    documents = copy.deepcopy(list(rendered("identity")))
    JOINING[what](documents)
    try:
        found = disagreements(documents, issued)
    except AssertionError as error:
        found = [str(error)]
    assert found != []


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_on_purpose_is_noticed(rendered: Rendered, issued: Names, what: str):
    documents = copy.deepcopy(list(rendered("home")))
    BROKEN[what](documents)
    assert disagreements(documents, issued) != []


def test_a_name_that_a_certificate_lacks_is_noticed(rendered: Rendered, issued: Names):
    for secret in ("chorus-registry-tls", "chorus-coordinator-tls", f"{TOKENS_SECRET}/desktop"):
        poorer = {**issued, secret: issued[secret][:1]}
        assert disagreements(rendered("home"), poorer) != []
    poorer = {**issued, "chorus-runner-leaves/desktop": ()}
    assert disagreements(rendered("selfsigned"), poorer) != []


@pytest.mark.parametrize("name", SETS)
def test_registries_believe_certificates_alone_where_every_runner_has_one_that_names_its_node(
    rendered: Rendered, name: str
):
    """cert-manager's csi-driver knows no node's name."""
    (registry,) = [each for each in workloads(rendered(name)) if each.service == "registry"]
    entries = [entry["value"] for entry in registry.main["env"] if entry["name"] == "CHORUS_REGISTRY__NODE_CLAIMS"]
    assert entries == [str(registry.config.registry.node_claims)]
    assert entries == ["first" if name == "cert-manager" else "certificate"]


def test_each_runner_of_a_statefulset_gets_a_token_and_nobody_else(rendered: Rendered):
    documents = rendered("statefulset")
    replicas = one(documents, "StatefulSet", "chorus-runner")["spec"]["replicas"]
    wanted = [f"--runner=chorus-runner-{number}" for number in range(replicas)]
    jobs = [each for each in workloads(documents) if each.service == "issuer"]
    assert [each.main["args"] for each in jobs] == [["k8s", "issue", "--tokens", *wanted]] * 2


def test_traefik_routes_by_the_name_that_clients_pin(rendered: Rendered):
    documents = rendered("ha")
    route = one(documents, "IngressRouteTCP", "chorus-coordinator")["spec"]
    pinned = SpiffeId("chorus.local", Role.COORDINATOR, "coordinator").dns_name
    assert route["routes"][0]["match"] == f"HostSNI(`{pinned}`)"
    assert route["tls"] == {"passthrough": True}
    (target,) = route["routes"][0]["services"]
    ports = one(documents, "Service", target["name"])["spec"]["ports"]
    assert target["port"] in [port["port"] for port in ports]


def _exported() -> set[str]:
    """The series that the services have, as a scrape shows them."""
    registry = new_registry(service="any", version="0")
    RpcMetrics(registry)
    GenerationMetrics(registry)
    MachineMetrics(registry)
    EventMetrics(registry)
    LeaseMetrics(registry)
    admission_gauges(registry, running=lambda: 0, waiting=lambda: 0)
    return series(registry.collect())


def series(families: Iterable[Metric]) -> set[str]:
    """The names by which a query finds them."""
    found = set()
    for family in families:
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        found |= {family.name + end for end in ends}
    return found


def asked_for(documents: tuple[Document, ...]) -> set[str]:
    """The series that alerts, dashboard and scaling ask for."""
    rules = one(documents, "PrometheusRule", "chorus")["spec"]["groups"]
    dashboard = json.loads(one(documents, "ConfigMap", "chorus-dashboard")["data"]["chorus.json"])
    asked = [rule["expr"] for group in rules for rule in group["rules"]]
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked.append(one(documents, "ConfigMap", "chorus-adapter-rule")["data"]["rule.yaml"].splitlines()[0])
    return {name for text in asked for name in re.findall(r"\bchorus_\w+", text)}


def test_alerts_dashboard_and_scaling_ask_for_series_that_there_are(rendered: Rendered):
    names = asked_for(rendered("ha"))
    assert len(names) >= 15
    assert names <= _exported()


def test_the_queue_is_scaled_by_the_name_that_the_adapter_gives(rendered: Rendered):
    documents = rendered("ha")
    metrics = one(documents, "HorizontalPodAutoscaler", "chorus-coordinator")["spec"]["metrics"]
    (queue,) = [metric["pods"]["metric"]["name"] for metric in metrics if metric["type"] == "Pods"]
    rule = one(documents, "ConfigMap", "chorus-adapter-rule")["data"]["rule.yaml"]
    assert f"name: {{as: {queue}}}" in rule


def test_only_prometheus_reaches_metrics_and_on_their_ports(rendered: Rendered):
    documents = rendered("ha")
    policy = one(documents, "NetworkPolicy", "chorus-metrics")["spec"]
    assert policy["ingress"][0]["ports"] == [{"protocol": "TCP", "port": "metrics"}]
    assert set(policy["podSelector"]["matchExpressions"][0]["values"]) == set(SERVICES)
    for service in SERVICES:
        (entry,) = one(documents, "Service", f"chorus-{service}-metrics")["spec"]["ports"]
        assert entry["targetPort"] == "metrics"


def test_the_package_carries_the_manifests():
    import chorus.k8s

    carried = Path(next(iter(chorus.k8s.__path__))) / "manifests"
    assert carried.resolve() == K3S


@pytest.mark.parametrize("name", SETS)
def test_one_process_writes_the_ledger_and_what_it_keeps_is_kept(rendered: Rendered, name: str):
    documents = rendered(name)
    spec = one(documents, "Deployment", "chorus-identity")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    pod = spec["template"]["spec"]
    (volume,) = [each["name"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
    (mounted,) = [each["mountPath"] for each in pod["containers"][0]["volumeMounts"] if each["name"] == volume]
    (identity,) = [each for each in workloads(documents) if each.service == "identity"]
    assert identity.config.identity.ledger is not None
    assert identity.config.identity.ledger.parent == Path(mounted)
    assert one(documents, "PersistentVolumeClaim", "chorus-identity")["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_authority_is_where_the_identity_service_looks(rendered: Rendered):
    """The keys of its Secret, which the Job and cert-manager call differently."""
    kept = {"home": {"ca.crt", "ca.key"}, "cert-manager": {"tls.crt", "tls.key"}}
    for name, keys in kept.items():
        volume = _workload(list(rendered(name)), "chorus-identity")["volumes"][0]
        assert {item["key"] for item in volume["secret"]["items"]} == keys
