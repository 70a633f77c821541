"""The Valkey server of the manifests: who reaches it, and that coordinators find it with what the Job made."""

from __future__ import annotations

import asyncio
import base64
import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from chorus.k8s.made_once import CALLERS_SECRET, VALKEY_SECRET, make_valkey_secret
from chorus.k8s.secrets import Secrets
from tests.deploy.api_server import serving
from tests.deploy.conftest import Rendered
from tests.deploy.edges import CLIENT, STRANGER, Pods, Policies, workloads
from tests.deploy.manifests import Document, one
from tests.deploy.sandbox import Cluster, Pod, possible
from tests.store.valkey_server import binary

Break = Callable[[list[Document]], object]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the Job makes, which a second run leaves as it is."""
    with serving(tmp_path_factory.mktemp("account")) as (api, cluster):
        assert make_valkey_secret(Secrets(cluster))
        made = copy.deepcopy(api.objects[f"/api/v1/namespaces/chorus/secrets/{VALKEY_SECRET}"]["data"])
        assert not make_valkey_secret(Secrets(cluster))
        assert api.objects[f"/api/v1/namespaces/chorus/secrets/{VALKEY_SECRET}"]["data"] == made
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pods are another user's."""
    tmp_path.chmod(0o755)
    return tmp_path


def disagreements(documents: list[Document], secret: dict[str, str]) -> list[str]:
    """Where the server, its Service, its policies and coordinators differ."""
    pods = workloads(documents)
    (server,) = [each for each in pods if each.service == "valkey"]
    (coordinator,) = [each for each in pods if each.service == "coordinator"]
    words = server.main["args"]
    listens = int(words[words.index("--port") + 1])
    host, _, port = base64.b64decode(secret["url"]).decode().strip().rpartition("@")[2].partition("/")[0].partition(":")
    service = one(documents, "Service", "chorus-valkey")
    (entry,) = service["spec"]["ports"]
    wrong = []
    if server.ports() != {"valkey": listens} or (entry["port"], entry["targetPort"]) != (listens, "valkey"):
        wrong.append("ports")
    if (host, int(port)) != (service["metadata"]["name"], listens):
        wrong.append("the URL")
    if not service["spec"]["selector"].items() <= server.labels.items():
        wrong.append("the Service's pods")
    if mounted(coordinator, coordinator.config.valkey.url_file) != (VALKEY_SECRET, "url"):
        wrong.append("what the coordinator reads")
    if mounted(server, Path(server.main["command"][1])) != (VALKEY_SECRET, "valkey.conf"):
        wrong.append("what the server reads")
    policies = Policies(documents)
    every = (*pods, CLIENT, STRANGER)
    let = {each.name for each in every if policies.allow(each, server, listens)}
    return [*wrong, *(let ^ {each.name for each in pods if each.service == "coordinator"})]


def mounted(pods: Pods, path: Path | None) -> tuple[str, str] | None:
    """The Secret, and the key of it, that a container finds at that path."""
    assert path is not None
    mounts = {mount["name"] for mount in pods.main["volumeMounts"] if mount["mountPath"] == str(path.parent)}
    for volume in pods.template["spec"]["volumes"]:
        if volume["name"] in mounts and "secret" in volume:
            keys = [item["key"] for item in volume["secret"]["items"] if item["path"] == path.name]
            return (volume["secret"]["secretName"], *keys) if keys else None
    return None


def _spec(documents: list[Document], kind: str, name: str) -> Document:
    spec: Document = one(documents, kind, name)["spec"]
    return spec


def _pod(documents: list[Document], kind: str, name: str) -> Document:
    pod: Document = _spec(documents, kind, name)["template"]["spec"]
    return pod


def _volume(documents: list[Document], name: str) -> Document:
    volumes = _pod(documents, "Deployment", "chorus-coordinator")["volumes"]
    volume: Document
    (volume,) = [each for each in volumes if each["name"] == name]
    return volume


BROKEN: dict[str, Break] = {
    "its port": lambda d: _pod(d, "StatefulSet", "chorus-valkey")["containers"][0].update(args=["--port", "6380"]),
    "the Service's port": lambda d: _spec(d, "Service", "chorus-valkey")["ports"][0].update(port=6380),
    "the Service's pods": lambda d: _spec(d, "Service", "chorus-valkey")["selector"].update(tier="x"),
    "what the coordinator reads": lambda d: _volume(d, "valkey").update(
        secret={"secretName": VALKEY_SECRET, "items": [{"key": "password", "path": "url"}]}
    ),
    "who is let in": lambda d: _spec(d, "NetworkPolicy", "chorus-valkey")["ingress"][0]["from"].append(
        {"podSelector": {}}
    ),
    "who is let out": lambda d: _spec(d, "NetworkPolicy", "chorus-coordinator-valkey")["egress"].clear(),
}


def test_manifests_and_the_secret_agree(rendered: Rendered, secret: dict[str, str]):
    assert disagreements(list(rendered("identity")), secret) == []


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_on_purpose_is_noticed(rendered: Rendered, secret: dict[str, str], what: str):
    documents = copy.deepcopy(list(rendered("identity")))
    BROKEN[what](documents)
    assert disagreements(documents, secret) != []


ASKING = """
import asyncio
from chorus.config import load_config
from chorus.store.valkey import Valkey

async def ask():
    valkey = Valkey.configured(load_config().valkey)
    async with valkey.reached() as client:
        await client.set(valkey.key("asked"), b"by a coordinator")
        print((await client.get(valkey.key("asked"))).decode())
    await valkey.close()

asyncio.run(ask())
"""


@pytest.mark.skipif(not possible(), reason="PODS NOT TESTED: making network namespaces takes root, and iproute2")
async def test_a_coordinators_pod_reaches_it_and_its_probe_succeeds(
    rendered: Rendered, secret: dict[str, str], folder: Path
):
    documents = rendered("identity")
    leaf = {name: base64.b64encode(b"-").decode() for name in ("ca.crt", "tls.crt", "tls.key")}
    pods = {each.service: each for each in workloads(documents)}
    program = binary()
    cluster = Cluster(
        documents,
        folder,
        {VALKEY_SECRET: secret, "chorus-coordinator-tls": leaf, CALLERS_SECRET: {"pepper": leaf["tls.key"]}},
    )
    with cluster.on():
        pod, server = await serve_valkey(cluster, pods["valkey"])
        main = pod.of.main
        probe = [word.replace("valkey-cli", program.replace("-server", "-cli")) for word in _probe(main)]
        assert await says(cluster, pod, {**main, "command": probe, "args": []}) == ""
        nobody = [program.replace("-server", "-cli"), "get", "chorus:asked"]
        assert "NOAUTH" in await says(cluster, pod, {**main, "command": nobody, "args": []})

        asking = cluster.pod(pods["coordinator"], "laptop")
        words = {**asking.of.main, "command": ["python", "-c", ASKING], "args": []}
        assert await says(cluster, asking, words) == "by a coordinator\n"
        server.terminate()
        await server.communicate()


async def serve_valkey(cluster: Cluster, of: Pods) -> tuple[Pod, asyncio.subprocess.Process]:
    """The server's pod, which is ready: a real server, run as the pod says."""
    pod = cluster.pod(of, "desktop")
    server = await cluster.execute(pod, {**of.main, "command": [binary(), *of.main["command"][1:]]})
    assert server.stdout is not None
    async for line in server.stdout:
        if b"eady to accept connections" in line:
            break
    cluster.becomes_ready(pod)
    return pod, server


def _probe(container: Document) -> list[str]:
    command: list[str] = container["readinessProbe"]["exec"]["command"]
    assert container["livenessProbe"]["exec"]["command"] == container["startupProbe"]["exec"]["command"] == command
    return command


async def says(cluster: Cluster, pod: Pod, container: Document) -> str:
    """What a command in a pod prints; it has to succeed."""
    process = await cluster.execute(pod, container)
    said, errors = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, errors.decode()
    return said.decode()
