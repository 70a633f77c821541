"""The services as the rendered pods run them, each in a network namespace of its own, under a steady load: a request is
served, a runner's pod is killed and its streams go on, pods are replaced as in a rolling update, nothing is lost."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families

from chorus.identity.ca import now_utc
from chorus.identity.policy import load_policy
from chorus.k8s.enrolling import TOKENS_SECRET
from chorus.k8s.issuing import Issuer
from chorus.transport import TlsIdentity
from tests.deploy import stand_in_kubectl
from tests.deploy.api_server import node, serving
from tests.deploy.conftest import Rendered
from tests.deploy.edges import SERVICES, Pods, workloads
from tests.deploy.sandbox import Cluster, Pod, possible
from tests.deploy.test_edges import asked_for, series
from tests.interop.test_grpcurl import GRPCURL
from tests.mesh.child import ROOT

pytestmark = [
    pytest.mark.skipif(not possible(), reason="PODS NOT TESTED: making network namespaces takes root, and iproute2"),
    pytest.mark.skipif(GRPCURL is None, reason="PODS NOT TESTED: they are probed with grpcurl, which isn't here"),
]

NODES = ("desktop", "laptop")
FAKE = {"CHORUS_RUNNER__ENGINE": "fake", "CHORUS_FAKE_TOKENS_PER_SECOND": "20"}
CLIENT_ENV = {
    "CHORUS_MESH__CERTS_DIR": "/etc/chorus/certs",
    "CHORUS_CLIENT__COORDINATORS": "coordinator@chorus-coordinator:7301",
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    "HOME": "/tmp",
}
ADMIN_ENV = {
    "CHORUS_MESH__CERTS_DIR": "/etc/chorus/certs",
    "CHORUS_MESH__IDENTITY_SERVICE": "identity@chorus-identity:7311",
    "HOME": "/tmp",
}


def person(name: str, secret: str, folder: str, environment: dict[str, str], *command: str) -> Pods:
    """A pod from which somebody asks, with the leaf of a Secret."""
    container = {
        "name": name,
        "command": list(command),
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "volumeMounts": [
            {"name": "leaf", "mountPath": f"/etc/chorus/certs/{folder}", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    leaf = {"name": "leaf", "secret": {"secretName": secret, "defaultMode": 0o440}}
    spec = {"volumes": [leaf, {"name": "tmp", "emptyDir": {}}], "containers": [container]}
    return Pods(name, {"chorus.mesh/client": "true"}, {"spec": spec})


CLIENT = person("client", "chorus-client-tls", "client-cli", CLIENT_ENV, "python", "-m", "tests.deploy.client_pod")
ADMIN = person("admin", "chorus-admin-tls", "admin-cli", ADMIN_ENV, "chorus", "token", "create", "--json", "--name")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What the Job makes for a cluster of these nodes."""
    with serving(tmp_path_factory.mktemp("account")) as (api, access):
        for name in NODES:
            api.put(f"/api/v1/nodes/{name}", node(name))
        Issuer(access, load_policy(), trust_domain="chorus.local", now=now_utc()).run()
        return {path.rpartition("/")[2]: doc["data"] for path, doc in api.objects.items() if "/secrets/" in path}


@pytest.fixture(params=["ha"])
def cluster(
    request: pytest.FixtureRequest, rendered: Rendered, tmp_path: Path, secrets: dict[str, dict[str, str]]
) -> Iterator[Cluster]:
    tmp_path.chmod(0o755)
    cluster = Cluster(rendered(request.param), tmp_path, secrets)
    with cluster.on():
        yield cluster


KUBECTL = shutil.which("kubectl")
READER = Pods(
    "reader",
    {"chorus.mesh/client": "true"},
    {
        "spec": {
            "volumes": [
                *(
                    {"name": who, "secret": {"secretName": f"chorus-{who}-tls", "defaultMode": 0o440}}
                    for who in ("client", "admin")
                ),
                {"name": "tmp", "emptyDir": {}},
            ],
            "containers": [
                {
                    "name": "reader",
                    "env": [{"name": "HOME", "value": "/tmp"}, {"name": "REAL_KUBECTL", "value": str(KUBECTL)}],
                    "volumeMounts": [
                        {"name": "client", "mountPath": f"{stand_in_kubectl.SECRETS}/chorus-client-tls"},
                        {"name": "admin", "mountPath": f"{stand_in_kubectl.SECRETS}/chorus-admin-tls"},
                        {"name": "tmp", "mountPath": "/tmp"},
                    ],
                }
            ],
        }
    },
)


def documented() -> str:
    """What docs/k3s.md has a person type who wants to be answered, or to shut somebody out; a script for bash."""
    text = (ROOT / "docs" / "k3s.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) if "port-forward" in block]
    typed = re.findall(r"^\s*\$ (.*)$", re.sub(r"\\\n\s*", "", "\n".join(blocks)), re.MULTILINE)
    # Whoever types is slower than kubectl; a script waits for its first line.
    waits = r"coproc F\2 { exec \1; }; read -r <&${F\2[0]}"
    script = [re.sub(r"^(kubectl .* port-forward \S+ (\d+)) &$", waits, line) for line in typed]
    stand_in = f'exec python {stand_in_kubectl.__file__} "$@"'
    return "\n".join(
        [
            "set -e; mkdir /tmp/bin; export PATH=/tmp/bin:$PATH",
            f"printf '#!/bin/sh\\n%s\\n' {shlex.quote(stand_in)} > /tmp/bin/kubectl; chmod +x /tmp/bin/kubectl",
            *script,
            "kill $(jobs -p)",
        ]
    )


class Kubelet:
    """Starts pods, probes them as they say, and replaces them. `environment` is what all of them have besides."""

    def __init__(self, cluster: Cluster, pods: list[Pods], folder: Path, **environment: str) -> None:
        self._cluster = cluster
        self._environment = FAKE | environment
        self._pods = {each.service: each for each in pods}
        # The health listener has no reflection, so grpcurl is given the messages.
        files = FileDescriptorSet()
        health_pb2.DESCRIPTOR.CopyToProto(files.file.add())
        self._protos = folder / "health.protoset"
        self._protos.write_bytes(files.SerializeToString())

    async def bring_up(self, service: str, where: str = "desktop", *, ordinal: int | None = None) -> Pod:
        """A new pod, which is ready."""
        pod = self._cluster.pod(self._pods[service], where, ordinal=ordinal)
        await self._cluster.start(pod, **self._environment)
        await self._becomes_ready(pod)
        self._cluster.becomes_ready(pod)
        return pod

    async def replace(self, pod: Pod, *, surge: bool) -> Pod:
        """As a rolling update does: with `surge` the new one first, else after the old one."""
        if surge:
            new = await self.bring_up(pod.of.service, pod.node)
            assert await self._cluster.end(pod) == 0
            return new
        assert await self._cluster.end(pod) == 0
        return await self.bring_up(pod.of.service, pod.node)

    async def _becomes_ready(self, pod: Pod) -> None:
        """Watches what its readiness probe would ask for again and again."""
        port = pod.of.main["readinessProbe"]["grpc"]["port"]
        words = ["-plaintext", "-protoset", str(self._protos), f"{pod.address}:{port}", "grpc.health.v1.Health/Watch"]
        process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", pod.namespace, str(GRPCURL), *words), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                if b'"SERVING"' in line:
                    return
            raise AssertionError(f"{pod.name} never became ready")
        finally:
            process.kill()
            await process.communicate()


class Load:
    """The client's pod, and what it has told so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.told: list[dict[str, Any]] = []

    async def until(self, key: str, *, told_since: float = 0.0, **wanted: str) -> dict[str, Any]:
        """Reads on to the next line that has that key, and these values, and was written at that time or later."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            self.told.append(told)
            print(told)  # shown with a test that fails
            assert "failed" not in told
            if key in told and told["at"] >= told_since and wanted.items() <= told.items():
                return told
        assert self._process.stderr is not None
        raise AssertionError(f"the client ended: {(await self._process.stderr.read()).decode()[-2000:]}")

    async def ends(self) -> None:
        """Lets it finish what it has begun."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        self.told += [json.loads(line) async for line in self._process.stdout]
        assert self._process.stderr is not None
        errors = await self._process.stderr.read()
        assert await self._process.wait() == 0, errors.decode()


async def lay_tokens_ready(cluster: Cluster, secrets: dict[str, dict[str, str]], *runners: str) -> dict[str, str]:
    """What the Job does (test_enrolling.py), as an admin does it by hand; returns the Secret's data."""
    tokens = secrets[TOKENS_SECRET] = dict[str, str]()
    asking = cluster.pod(ADMIN, "laptop")
    for runner in runners:
        command = await cluster.execute(asking, {**ADMIN.main, "args": [runner]})
        said, errors = await command.communicate()
        assert command.returncode == 0, errors.decode()
        tokens[runner] = b64encode(json.loads(said)["token"].encode()).decode()
    return tokens


async def steal(cluster: Cluster, runner: Pod, folder: str, tries: list[tuple[str, str, int]]) -> list[list[str]]:
    """What a registry says to whoever has taken the leaf out of a runner's pod (thief_pod.py)."""
    words = ["python", "-m", "tests.deploy.thief_pod", f"/etc/chorus/certs/{folder}", json.dumps(tries)]
    container = {
        "name": "thief",
        "command": words,
        "env": [{"name": "PYTHONPATH", "value": str(ROOT)}, {"name": "HOME", "value": "/tmp"}],
        "volumeMounts": [{"name": "certs", "mountPath": "/etc/chorus/certs"}],
    }
    thief = await cluster.execute(runner, container)
    said, errors = await thief.communicate()
    assert thief.returncode == 0, errors.decode()
    return [json.loads(line) for line in said.splitlines()]


async def grpcurl(cluster: Cluster, pod: Pod, *words: str) -> str:
    """What grpcurl says in a client's pod, as the README calls it."""
    folder = "/etc/chorus/certs/client-cli"
    tls = ["-cacert", f"{folder}/ca.crt", "-cert", f"{folder}/tls.crt", "-key", f"{folder}/tls.key"]
    process = await cluster.execute(pod, {**CLIENT.main, "command": [str(GRPCURL), *tls, *words]})
    said, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return said.decode()


async def type_what_is_documented(cluster: Cluster) -> None:
    """Everything that docs/k3s.md has a person type, with the real programs but for a cluster's kubectl."""
    assert KUBECTL is not None, "the documentation is typed with kubectl, for its templates"
    typing = await cluster.execute(
        cluster.pod(READER, "laptop"), {**READER.main, "command": ["bash", "-c", documented()]}
    )
    said, errors = (text.decode() for text in await typing.communicate())
    assert typing.returncode == 0, errors
    assert '"nodes"' in said
    assert "runner/attic" in said + errors


async def test_a_mesh_of_pods_serves_survives_and_is_updated(
    cluster: Cluster, rendered: Rendered, tmp_path: Path, secrets: dict[str, dict[str, str]]
):
    mesh = [each for each in workloads(rendered("ha")) if each.service in SERVICES]
    kubelet = Kubelet(cluster, mesh, tmp_path)
    _, registry = await asyncio.gather(kubelet.bring_up("identity"), kubelet.bring_up("registry"))
    await lay_tokens_ready(cluster, secrets, *NODES)
    runners = dict(zip(NODES, await asyncio.gather(*(kubelet.bring_up("runner", n) for n in NODES)), strict=True))
    coordinator = await kubelet.bring_up("coordinator")
    for pod in cluster.pods:
        assert cluster.listening(pod) == set(pod.of.ports().values())

    # A stolen leaf is good for its own runner on its own node, and (being of an older incarnation) not even there.
    newest, refused = 1 << 62, "PERMISSION_DENIED"
    tries = [("desktop", "laptop", newest), ("desktop", "attic", newest), ("laptop", "laptop", newest)]
    said = await steal(cluster, runners["desktop"], "runner-desktop", [*tries, ("desktop", "desktop", 1)])
    assert said == [*([who, where, refused] for who, where, _ in tries), ["desktop", "desktop", "STALE_INCARNATION"]]

    client = cluster.pod(CLIENT, "laptop")
    load = Load(await cluster.execute(client, CLIENT.main, stdin=asyncio.subprocess.PIPE))
    await load.until("whole")

    # grpcurl, by the names and ports of Services.
    pinned = ("-servername", "coordinator.coordinator.chorus.local", "chorus-coordinator:7301")
    assert "chorus.api.coordinator.v1.Coordinator" in await grpcurl(cluster, client, *pinned, "list")
    said = await grpcurl(cluster, client, *pinned, "chorus.api.coordinator.v1.Coordinator/ListNodes")
    assert all(f'"{name}"' in said for name in NODES)

    await type_what_is_documented(cluster)
    # What Prometheus finds on them is what alerts, dashboard and scaling ask for.
    told = (cluster.scrape(pod) for pod in cluster.pods if "metrics" in pod.of.ports())
    assert asked_for(rendered("ha")) <= {name for text in told for name in series(text_string_to_metric_families(text))}

    # Who is connected to whom is what the policies are written for (test_edges.py), direct mode included.
    assert cluster.connections(7101) == {("runner", "registry"), ("coordinator", "registry")}
    assert cluster.connections(7201) == {("coordinator", "runner"), ("client", "runner")}
    assert cluster.connections(7301) == {("client", "coordinator")}

    assert cluster.connections(7311) == {(who, "identity") for who in ("registry", "runner", "coordinator")}

    # A runner's pod is killed in the middle of an answer.
    # What it told while nobody read has long been answered.
    await load.until("began", told_since=time.monotonic(), runner="desktop")
    await cluster.kill(runners["desktop"])
    while not (await load.until("whole"))["moved"]:
        pass
    runners["desktop"] = await kubelet.bring_up("runner", "desktop")

    # A rolling update: of the other runner, of the coordinator, of the registry.
    runners["laptop"] = await kubelet.replace(runners["laptop"], surge=False)
    await kubelet.replace(coordinator, surge=True)
    await kubelet.replace(registry, surge=True)
    assert "nodes" in await grpcurl(cluster, client, *pinned, "chorus.api.coordinator.v1.Coordinator/ListNodes")
    await load.ends()
    assert [told for told in load.told if "failed" in told] == []
    assert len([told for told in load.told if "whole" in told]) > 6
    for pod in [pod for pod in cluster.pods if pod.process is not None]:
        assert await cluster.end(pod) == 0


@pytest.mark.parametrize(
    ("cluster", "name", "kept"),
    [
        ("home", "desktop", "node-desktop/certs"),
        ("statefulset", "chorus-runner-0", "claims-chorus-runner-0/certs"),
    ],
    indirect=["cluster"],
)
async def test_a_runner_joins_keeps_its_key_on_its_node_and_renews(
    cluster: Cluster, tmp_path: Path, secrets: dict[str, dict[str, str]], name: str, kept: str
):
    mesh = [each for each in workloads(cluster.documents) if each.name != "chorus-runner-nvidia"]
    ordinal = None if name in NODES else 0
    kubelet = Kubelet(cluster, mesh, tmp_path, CHORUS_IDENTITY__LEAF_LIFETIME_S="8")
    await asyncio.gather(kubelet.bring_up("identity"), kubelet.bring_up("registry"))
    tokens = await lay_tokens_ready(cluster, secrets, name)

    runner = await kubelet.bring_up("runner", "desktop", ordinal=ordinal)
    own = tmp_path / kept / f"runner-{name}"
    key, first = (own / "tls.key").read_bytes(), (own / "tls.crt").read_bytes()
    assert runner.process is not None
    while (own / "tls.crt").read_bytes() == first:  # it may have been renewed already when it was first looked at
        await runner.process.event("certificate.renewed")
    assert (own / "tls.key").read_bytes() == key
    assert cluster.connections(7101) == {("runner", "registry")}
    assert TlsIdentity.load(own).node == "desktop"

    # Its next pod needs no token, however long the last one has been gone.
    tokens.clear()
    assert await cluster.end(runner) == 0
    await kubelet.bring_up("runner", "desktop", ordinal=ordinal)
    assert (own / "tls.key").read_bytes() == key
    for pod in [pod for pod in cluster.pods if pod.process is not None]:
        assert await cluster.end(pod) == 0
