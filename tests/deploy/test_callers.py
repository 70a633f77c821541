"""Coordinators that serve callers without a certificate: the manifests agree, and a key that was made is let in."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from chorus.coordinator.callers import read_pepper
from chorus.identity.ca import now_utc
from chorus.identity.policy import load_policy
from chorus.k8s.issuing import Issuer
from chorus.k8s.made_once import CALLERS_SECRET, make_callers_secret, make_valkey_secret
from chorus.k8s.secrets import Secrets
from tests.deploy.api_server import node, serving
from tests.deploy.conftest import Rendered
from tests.deploy.edges import STRANGER, Pods, disagreements, workloads
from tests.deploy.manifests import Document, one
from tests.deploy.sandbox import Cluster, possible
from tests.deploy.test_edges import issued
from tests.deploy.test_pods import person
from tests.deploy.test_valkey import folder, mounted, says, serve_valkey
from tests.interop.test_grpcurl import GRPCURL

__all__ = ["folder", "issued"]  # fixtures

Data = dict[str, dict[str, str]]
Break = Callable[[list[Document]], object]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """What the Job makes."""
    with serving(tmp_path_factory.mktemp("account")) as (api, access):
        api.put("/api/v1/nodes/desktop", node("desktop"))
        Issuer(access, load_policy(), trust_domain="chorus.local", now=now_utc()).run()
        assert make_valkey_secret(Secrets(access))
        assert make_callers_secret(Secrets(access))
        made = {path.rpartition("/")[2]: doc["data"] for path, doc in api.objects.items() if "/secrets/" in path}
        kept = copy.deepcopy(made[CALLERS_SECRET])
        assert not make_callers_secret(Secrets(access))
        assert made[CALLERS_SECRET] == kept
    return made


def coordinator(documents: list[Document]) -> Pods:
    (found,) = [each for each in workloads(documents) if each.service == "coordinator"]
    return found


def wrong(documents: list[Document], names: dict[str, tuple[str, ...]]) -> list[str]:
    """Where ports, Services and policies differ, and where the coordinators would not share one set of keys."""
    found = disagreements(documents, names)
    settings = coordinator(documents).config.callers
    if mounted(coordinator(documents), settings.dir / "pepper") != (CALLERS_SECRET, "pepper"):
        found.append("the pepper")
    if settings.store != "valkey":
        found.append("each coordinator has keys of its own")
    return found


def test_manifests_and_the_secret_agree(
    rendered: Rendered, issued: dict[str, tuple[str, ...]], secrets: Data, tmp_path: Path
):
    assert wrong(list(rendered("identity")), issued) == []
    (tmp_path / "pepper").write_bytes(pepper := base64.b64decode(secrets[CALLERS_SECRET]["pepper"]))
    (tmp_path / "pepper").chmod(0o440)  # as it is mounted
    assert read_pepper(tmp_path) == pepper


def test_without_the_component_nobody_without_a_certificate_is_served(rendered: Rendered):
    assert coordinator(list(rendered("ha"))).config.callers.listen is None


def _env(documents: list[Document], name: str) -> Document:
    entry: Document
    (entry,) = [each for each in coordinator(documents).main["env"] if each["name"] == name]
    return entry


BROKEN: dict[str, Break] = {
    "the listener": lambda d: _env(d, "CHORUS_CALLERS__LISTEN").update(value="0.0.0.0:7304"),
    "the store": lambda d: _env(d, "CHORUS_CALLERS__STORE").update(value="file"),
    "the pepper's folder": lambda d: _env(d, "CHORUS_CALLERS__DIR").update(value="/tmp/callers"),
    "the Service's name": lambda d: one(d, "Service", "chorus-callers")["metadata"].update(name="callers"),
    "the Service's port": lambda d: one(d, "Service", "chorus-callers")["spec"]["ports"][0].update(port=443),
    "the Service's target": lambda d: one(d, "Service", "chorus-callers")["spec"]["ports"][0].update(targetPort="grpc"),
    "who is let in": lambda d: one(d, "NetworkPolicy", "chorus-callers")["spec"].update(ingress=[]),
    "what they reach": lambda d: one(d, "NetworkPolicy", "chorus-callers")["spec"]["ingress"][0].pop("ports"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_on_purpose_is_noticed(rendered: Rendered, issued: dict[str, tuple[str, ...]], what: str):
    documents = copy.deepcopy(list(rendered("identity")))
    BROKEN[what](documents)
    assert wrong(documents, issued) != []


ADMIN = person(
    "admin",
    "chorus-admin-tls",
    "admin-cli",
    {
        "CHORUS_MESH__CERTS_DIR": "/etc/chorus/certs",
        "CHORUS_CLIENT__COORDINATORS": "coordinator@chorus-coordinator:7301",
        "HOME": "/tmp",
    },
    *("chorus", "key", "create", "ann", "--requests-per-minute", "60", "--json"),
)
ANN = Pods(
    "ann",
    STRANGER.labels,
    {
        "spec": {
            "volumes": [
                {
                    "name": "authority",
                    "secret": {
                        "secretName": "chorus-client-tls",
                        "defaultMode": 0o444,
                        "items": [{"key": "ca.crt", "path": "ca.crt"}],
                    },
                }
            ],
            "containers": [{"name": "ann", "volumeMounts": [{"name": "authority", "mountPath": "/etc/mesh"}]}],
        }
    },
)


@pytest.mark.skipif(not possible(), reason="PODS NOT TESTED: making network namespaces takes root, and iproute2")
@pytest.mark.skipif(GRPCURL is None, reason="PODS NOT TESTED: a stranger asks with grpcurl, which isn't here")
async def test_who_has_a_key_is_let_in_by_the_services_name_and_nobody_else(
    rendered: Rendered, secrets: Data, folder: Path
):
    """Made at one coordinator, the key is known to the next: it is in Valkey."""
    documents = rendered("identity")
    cluster = Cluster(documents, folder, secrets)
    with cluster.on():
        pods = {each.service: each for each in workloads(documents)}
        _, server = await serve_valkey(cluster, pods["valkey"])
        first = cluster.pod(pods["coordinator"], "desktop")
        await cluster.start(first)
        cluster.becomes_ready(first)
        assert cluster.listening(first) == set(first.of.ports().values())
        admin = cluster.pod(ADMIN, "desktop")
        key = json.loads(await says(cluster, admin, ADMIN.main))["key"]

        second = cluster.pod(pods["coordinator"], "laptop")
        await cluster.start(second)
        cluster.becomes_ready(second)
        assert await cluster.end(first) == 0
        ann = cluster.pod(ANN, "laptop")
        asked = ["-servername", "coordinator.coordinator.chorus.local", "chorus-callers:7303"]
        asked.append("chorus.api.coordinator.v1.Coordinator/ListModels")
        for shown, answered in ((key, True), (key[:-4] + "AAAA", False)):
            words = [str(GRPCURL), "-cacert", "/etc/mesh/ca.crt", "-H", f"authorization: Bearer {shown}", *asked]
            asking = await cluster.execute(ann, {**ANN.main, "command": words})
            _, errors = await asking.communicate()
            assert (asking.returncode == 0) == answered, errors.decode()
            assert answered or b"Unauthenticated" in errors
        assert await cluster.end(second) == 0
        server.terminate()
        await server.communicate()
