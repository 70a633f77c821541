"""Who listens and who dials, by the services' own configuration; what manifests let through; where the two differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from chorus.config import ChorusConfig, Endpoint, load_config
from chorus.core.identity import Role, SpiffeId
from tests.deploy.manifests import Document, containers, pod_template

SERVICES = ("registry", "runner", "coordinator", "identity")
AUTHORITY = "chorus-ca"
HANGS_AFTER_S = 15  # transport/process.py: so long after its grace a service is left where it is
_STAND_INS = {"spec.nodeName": "desktop", "metadata.name": "chorus-runner-0", "status.podIP": "10.42.0.7"}


@dataclass(frozen=True)
class Pods:
    """The pods of one workload: one service of the mesh each, by `service`, or something beside it ("models")."""

    name: str
    labels: Mapping[str, str]
    template: Document

    @property
    def service(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "client")

    @property
    def main(self) -> Document:
        container: Document = self.template["spec"]["containers"][0]
        return container

    def environment(self, container: Document | None = None) -> dict[str, str]:
        """A container's variables, as the kubelet makes them."""
        made: dict[str, str] = {}
        for entry in (container or self.main).get("env", []):
            if "value" in entry:
                value = str(entry["value"])
                for name, known in made.items():
                    value = value.replace(f"$({name})", known)
                made[entry["name"]] = value
            else:
                made[entry["name"]] = _STAND_INS[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        return made

    @property
    def config(self) -> ChorusConfig:
        """What the service makes of them."""
        return load_config(environ=self.environment())

    def ports(self) -> dict[str, int]:
        """The ports that it says it has, by name."""
        return {port["name"]: port["containerPort"] for port in self.main.get("ports", [])}

    def listens(self) -> dict[str, int]:
        """The ports that it listens on, by what they are for."""
        settings = getattr(self.config, self.service)
        found = {"grpc": settings.listen, "health": settings.health_listen, "metrics": settings.metrics_listen}
        if self.service == "identity":
            found["join"] = settings.join_listen
        if self.service == "coordinator":
            found["callers"] = self.config.callers.listen
        for address in found.values():
            assert address is None or address.is_wildcard, "nobody but itself could reach it"
        return {name: address.port for name, address in found.items() if address is not None}


@dataclass(frozen=True)
class Dial:
    """`who` dials a service at a Service's name, or at the pod's own address where `host` is empty; `purpose` is which
    of its listeners is meant."""

    who: str
    role: Role
    name: str
    host: str
    port: int
    purpose: str = "grpc"


def workloads(documents: Iterable[Document]) -> list[Pods]:
    """The pods of every workload."""
    found = []
    for document in documents:
        template = pod_template(document)
        if template is not None:
            claims = document["spec"].get("volumeClaimTemplates", [])
            if claims:
                claimed = [{"name": one["metadata"]["name"], "persistentVolumeClaim": {}} for one in claims]
                spec = template["spec"]
                template = {**template, "spec": {**spec, "volumes": [*spec.get("volumes", []), *claimed]}}
            found.append(Pods(document["metadata"]["name"], template["metadata"]["labels"], template))
    return found


def dials(pods: Iterable[Pods]) -> Iterator[Dial]:
    """Every connection that the services make, and that of a client within the cluster."""
    for each in pods:
        if each.service in ("registry", "runner", "coordinator"):
            service = each.config.mesh.identity_service
            assert service is not None, "it would not learn who is revoked"
            yield _dial(each.service, Role.IDENTITY, service)
        if (renewal := each.config.mesh.renewal) is not None:
            yield _dial(each.service, Role.IDENTITY, renewal, "join")
        if each.service == "issuer" and "--tokens" in each.main["args"]:
            assert each.config.mesh.identity_service is not None, "it could ask nobody for tokens"
            yield _dial("issuer", Role.IDENTITY, each.config.mesh.identity_service)
        if each.service in ("runner", "coordinator"):
            for endpoint in getattr(each.config, each.service).registries:
                yield _dial(each.service, Role.REGISTRY, endpoint)
        if each.service == "runner":
            runner = each.config.runner
            assert runner.name is not None, "nobody could tell whose certificate it has to show"
            assert runner.advertise is not None, "it listens on every address, and would not know which to tell"
            for who in ("coordinator", "client"):
                yield Dial(who, Role.RUNNER, runner.name, "", runner.advertise.port)
        if each.service == "coordinator":
            name = each.config.coordinator.name
            yield Dial("client", Role.COORDINATOR, name, "chorus-coordinator", 7301)
            if each.config.callers.listen is not None:  # whoever has a key, from wherever
                yield Dial(STRANGER.service, Role.COORDINATOR, name, "chorus-callers", 7303, "callers")


def _dial(who: str, role: Role, endpoint: Endpoint, purpose: str = "grpc") -> Dial:
    return Dial(who, role, endpoint.name or str(role), endpoint.host, endpoint.port, purpose)


def matches(selector: Document | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    selector = selector or {}
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(_holds(one, labels) for one in selector.get("matchExpressions", []))


def _holds(expression: Document, labels: Mapping[str, str]) -> bool:
    value = labels.get(expression["key"])
    match expression["operator"]:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
    raise AssertionError(f"not used so far: {expression['operator']}")


class Policies:
    """What the NetworkPolicies of a namespace let through between two of its pods."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]

    def allow(self, source: Pods, target: Pods, port: int) -> bool:
        """Whether a TCP connection may be made: both sides have to let it."""
        out = source is STRANGER or self._let(source, "Egress", "egress", "to", target, port, target)
        into = self._let(target, "Ingress", "ingress", "from", source, port, target)
        return out and into

    def may_resolve(self, source: Pods) -> bool:
        """Whether it may ask the cluster's DNS, over UDP."""
        held = [
            spec
            for spec in self._policies
            if "Egress" in spec["policyTypes"] and matches(spec["podSelector"], source.labels)
        ]
        return not held or any(_asks_dns(rule) for spec in held for rule in spec.get("egress", []))

    def _let(self, of: Pods, kind: str, rules: str, peers: str, other: Pods, port: int, target: Pods) -> bool:
        held = [
            spec for spec in self._policies if kind in spec["policyTypes"] and matches(spec["podSelector"], of.labels)
        ]
        if not held:
            return True
        return any(
            self._port(rule, port, target) and self._peer(rule, peers, other)
            for spec in held
            for rule in spec.get(rules, [])
        )

    @staticmethod
    def _port(rule: Document, port: int, target: Pods) -> bool:
        wanted = [entry["port"] for entry in rule.get("ports", []) if entry.get("protocol", "TCP") == "TCP"]
        return "ports" not in rule or any(target.ports().get(one, one) == port for one in wanted)

    @staticmethod
    def _peer(rule: Document, peers: str, other: Pods) -> bool:
        # Pods of this namespace; an ipBlock means addresses outside of the cluster, as ours leave its ranges out.
        if peers not in rule:
            return True
        return any(
            "podSelector" in peer and "namespaceSelector" not in peer and matches(peer["podSelector"], other.labels)
            for peer in rule[peers]
        )


def _asks_dns(rule: Document) -> bool:
    return {"protocol": "UDP", "port": 53} in rule.get("ports", []) and any(
        matches(peer.get("namespaceSelector"), {"kubernetes.io/metadata.name": "kube-system"})
        and matches(peer.get("podSelector"), {"k8s-app": "kube-dns"})
        for peer in rule["to"]
    )


CLIENT = Pods("a-client", {"chorus.mesh/client": "true"}, {"spec": {"containers": [{}]}})
# Whose own connections no policy holds back, such as a pod that was there before the policies were.
STRANGER = Pods("a-stranger", {"app.kubernetes.io/component": "stranger"}, {"spec": {"containers": [{}]}})


def disagreements(documents: Iterable[Document], names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Where manifests and services differ, in words. `names`: the DNS names and the SPIFFE id of each Secret's leaf."""
    documents = list(documents)
    pods = workloads(documents)
    mesh = [each for each in pods if each.service in SERVICES]
    found = [] if {each.service for each in mesh} == set(SERVICES) else ["a service has no pods"]
    for each in mesh:
        found += _of_ports(each)
        found += _of_ending(each)
        found += _of_authority(each)
        if each.service != "identity":
            found += _of_certificates(each, names)
    wanted = list(dict.fromkeys(dials(pods)))
    for dial in wanted:
        found += _of_dial(dial, mesh, documents)
    return [*found, *_of_policies(wanted, [*pods, CLIENT, STRANGER], documents)]


def _of_ports(pods: Pods) -> Iterator[str]:
    listens = pods.listens()
    if pods.ports() != listens:
        yield f"{pods.name} says {pods.ports()} and listens on {listens}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if (port := pods.main[probe]["grpc"]["port"]) != listens.get("health"):
            yield f"{pods.name}: the {probe} asks port {port}, and health is told on {listens.get('health')}"
    if pods.main["args"] != [pods.service]:
        yield f"{pods.name} runs {pods.main['args']}"


def _of_ending(pods: Pods) -> Iterator[str]:
    grace_s = getattr(getattr(pods.config, pods.service), "drain_grace_s", 0.0)
    before = pods.main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    needed_s = float(before[1]) + grace_s + HANGS_AFTER_S
    if pods.template["spec"]["terminationGracePeriodSeconds"] < needed_s:
        yield f"{pods.name} may take {needed_s:g} s to end, and is killed before"


def _of_authority(pods: Pods) -> Iterator[str]:
    """That the identity service alone has the authority's key, as it is called there."""
    secrets = [volume["secret"] for volume in pods.template["spec"]["volumes"] if "secret" in volume]
    paths = {item["path"] for secret in secrets if secret["secretName"] == AUTHORITY for item in secret["items"]}
    if paths != ({"ca.crt", "ca.key"} if pods.service == "identity" else set()):
        yield f"{pods.name} has of the authority {paths or 'nothing'}"


def _of_certificates(pods: Pods, names: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """That the mounted leaf is the one that the service's own name asks for."""
    config = pods.config
    name = getattr(config, pods.service).name
    identity = SpiffeId(config.mesh.trust_domain, Role(pods.service), name)
    mounted = {mount["name"] for mount in pods.main["volumeMounts"] if mount["mountPath"] == str(config.mesh.certs_dir)}
    volumes = {volume["name"]: volume for volume in pods.template["spec"]["volumes"]}
    (volume,) = [volumes[key] for key in mounted]
    if "csi" in volume:
        attributes = {key.partition("/")[2]: value for key, value in volume["csi"]["volumeAttributes"].items()}
        given = tuple(attributes[key].replace("${POD_NAME}", name) for key in ("uri-sans", "dns-names"))
    elif "secret" in volume:
        given = names.get(volume["secret"]["secretName"], ())
    else:
        given = _handed_over(pods, names)
    for wanted in (str(identity), identity.dns_name):
        if wanted not in given:
            yield f"{pods.name} serves as {wanted}, and its certificate says {given}"


def _handed_over(pods: Pods, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The leaf that an init container gets for the runner: out of the Secret of all leaves, or by joining."""
    first = next(container for container in containers(pods.template) if container["name"] in ("leaf", "join"))
    runner = pods.environment(first)["CHORUS_RUNNER__NAME"]
    words = ["k8s", "leaf", "$(CHORUS_RUNNER__NAME)", "--from", "/etc/chorus/leaves", "--to", "/etc/chorus/certs"]
    if first["name"] == "join":
        words = ["k8s", "join", "--tokens", "/etc/chorus/tokens"]
        joins, runs = load_config(environ=pods.environment(first)), pods.config
        assert joins.mesh.certs_dir == runs.mesh.certs_dir, "the runner looks elsewhere"
        assert joins.mesh.renewal == runs.mesh.renewal, "the runner renews elsewhere"
        assert joins.runner.node_id == runs.runner.node_id is not None, "its certificate names another node"
    assert first["args"] == words
    secrets = [volume["secret"]["secretName"] for volume in pods.template["spec"]["volumes"] if "secret" in volume]
    return tuple(itertools.chain.from_iterable(names.get(f"{secret}/{runner}", ()) for secret in secrets))


def _of_dial(dial: Dial, mesh: list[Pods], documents: list[Document]) -> Iterator[str]:
    targets = [each for each in mesh if each.service == dial.role]
    port: int | str = dial.port
    if dial.host:
        service = next((d for d in documents if d["kind"] == "Service" and d["metadata"]["name"] == dial.host), None)
        if service is None:
            yield f"{dial.who} dials {dial.host}, and there is no such Service"
            return
        entry = next((entry for entry in service["spec"]["ports"] if entry["port"] == dial.port), None)
        if entry is None:
            yield f"{dial.who} dials {dial.host}:{dial.port}, and that Service has no such port"
            return
        port = entry["targetPort"]
        if not all(service["spec"]["selector"].items() <= target.labels.items() for target in targets):
            yield f"the Service {dial.host} does not lead to every {dial.role}"
        # Nothing translates ports behind a headless Service: the pods themselves are dialled.
        if service["spec"].get("clusterIP") == "None":
            port = dial.port
    for target in targets:
        if target.ports().get(str(port), port) != (listens := target.listens()[dial.purpose]):
            yield f"{dial.who} reaches port {port} of {target.name}, which listens on {listens}"
        if getattr(target.config, target.service).name != dial.name and dial.role is not Role.RUNNER:
            yield f"{dial.who} asks for {dial.name}, and {target.name} is called otherwise"


def _of_policies(wanted: list[Dial], pods: list[Pods], documents: list[Document]) -> Iterator[str]:
    """Every edge that is dialled is let through, and no other one between two pods of the mesh."""
    policies = Policies(documents)
    needed = {(dial.who, str(dial.role), dial.purpose) for dial in wanted}
    named = {dial.who for dial in wanted if dial.host}
    for each in pods:
        if each.service in named and each is not STRANGER and not policies.may_resolve(each):
            yield f"{each.name} dials names, and may not ask the DNS"
    for source, target in itertools.product(pods, pods):
        if target.service not in SERVICES:
            continue
        for purpose, port in target.listens().items():
            due = (source.service, target.service, purpose) in needed
            if policies.allow(source, target, port) != due:
                yield f"{source.name} -> {target.name}:{purpose} is {'kept out' if due else 'let through'}"
