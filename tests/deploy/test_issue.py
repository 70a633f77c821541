"""The Job that issues, beside a simulated API server: what it makes, keeps, renews, and how a runner gets its own."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from chorus.config import ChorusConfig
from chorus.core.errors import CertificateError, ConfigError
from chorus.core.identity import Role
from chorus.identity.ca import now_utc
from chorus.identity.policy import load_policy
from chorus.k8s.cluster import Cluster
from chorus.k8s.issuing import Issued, Issuer
from chorus.k8s.leaves import take_leaf
from chorus.transport.process import load_identity
from tests.deploy.api_server import ApiServer, node, serving

SECRETS = "/api/v1/namespaces/chorus/secrets"
NOW = now_utc()


class Scene:
    """A server, and runs of the Job at it."""

    def __init__(self, api: ApiServer, cluster: Cluster) -> None:
        self.api, self._cluster = api, cluster
        for name in ("desktop", "laptop"):
            self.adds(name)

    def adds(self, name: str) -> None:
        self.api.put(f"/api/v1/nodes/{name}", node(name))

    def issue(self, *, now: datetime = NOW, domain: str = "chorus.local") -> Issued:
        return Issuer(self._cluster, load_policy(), trust_domain=domain, now=now).run()

    def secret(self, name: str) -> dict[str, bytes]:
        data = self.api.objects[f"{SECRETS}/{name}"]["data"]
        return {key: base64.b64decode(text) for key, text in data.items()}

    def mounted(self, name: str, folder: Path) -> Path:
        """A Secret as the kubelet mounts it."""
        folder.mkdir(parents=True)
        for key, content in self.secret(name).items():
            (folder / key).touch(mode=0o440)
            (folder / key).write_bytes(content)
        return folder


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    (tmp_path / "account").mkdir()
    with serving(tmp_path / "account") as (api, cluster):
        yield Scene(api, cluster)


def mesh(certs_dir: Path):
    return ChorusConfig.model_validate({"mesh": {"certs_dir": certs_dir}}).mesh


def test_services_start_from_what_it_makes(scene: Scene, tmp_path: Path):
    issued = scene.issue()
    assert len(issued.made) == 7  # the authority, four with a Secret of their own, two runners
    for role in (Role.REGISTRY, Role.COORDINATOR):
        folder = scene.mounted(f"chorus-{role}-tls", tmp_path / role)
        identity = load_identity(mesh(folder), role, str(role))
        assert identity is not None
        assert identity.spiffe_id.dns_name == f"{role}.{role}.chorus.local"
    leaves = scene.mounted("chorus-runner-leaves", tmp_path / "leaves")
    take_leaf("laptop", leaves, tmp_path / "certs")
    assert {path.name for path in (tmp_path / "certs").iterdir()} == {"ca.crt", "tls.crt", "tls.key"}
    runner = load_identity(mesh(tmp_path / "certs"), Role.RUNNER, "laptop")
    assert runner is not None
    assert runner.node == "laptop"
    with pytest.raises(CertificateError, match="configured as"):
        load_identity(mesh(tmp_path / "certs"), Role.RUNNER, "desktop")


def test_a_second_run_keeps_what_is_good(scene: Scene):
    scene.issue()
    before = {path: document["data"] for path, document in scene.api.objects.items() if SECRETS in path}
    issued = scene.issue(now=NOW + timedelta(days=30))
    assert (issued.made, len(issued.kept)) == (("spiffe://chorus.local/admin/operator",), 5)
    after = {path: document["data"] for path, document in scene.api.objects.items() if SECRETS in path}
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {f"{SECRETS}/chorus-admin-tls"}  # of 30 days


def test_leaves_are_renewed_at_two_thirds_of_their_life_by_the_same_authority(scene: Scene, tmp_path: Path):
    scene.issue()
    authority, old = scene.secret("chorus-ca"), scene.secret("chorus-registry-tls")
    issued = scene.issue(now=NOW + timedelta(days=245))
    assert "spiffe://chorus.local/registry/registry" in issued.made
    new = scene.secret("chorus-registry-tls")
    assert new["tls.crt"] != old["tls.crt"]
    assert (new["ca.crt"], scene.secret("chorus-ca")) == (old["ca.crt"], authority)


def test_nodes_come_and_go(scene: Scene):
    scene.issue()
    old = scene.secret("chorus-runner-leaves")
    scene.adds("attic")
    del scene.api.objects["/api/v1/nodes/laptop"]
    assert scene.issue().made == ("spiffe://chorus.local/runner/attic",)
    new = scene.secret("chorus-runner-leaves")
    assert new.keys() == {"ca.crt"} | {f"{name}.{end}" for name in ("desktop", "attic") for end in ("crt", "key")}
    assert new["desktop.key"] == old["desktop.key"]


def test_a_node_whose_name_no_certificate_can_have_is_named(scene: Scene):
    scene.adds("desktop.lan")
    assert scene.issue().refused == ("desktop.lan",)


def test_an_authority_that_was_made_meanwhile_is_taken(scene: Scene):
    """Two runs at once: whose Secret is there first has the say."""
    scene.issue()
    theirs = scene.api.objects.pop(f"{SECRETS}/chorus-ca")
    answer = scene.api.answer

    def late(method: str, url: str, body: bytes):
        if method == "POST" and b"chorus-ca" in body:
            scene.api.objects[f"{SECRETS}/chorus-ca"] = theirs
        return answer(method, url, body)

    scene.api.answer = late  # type: ignore[method-assign]
    assert scene.issue().made == ()
    assert scene.secret("chorus-ca")["ca.crt"] == scene.secret("chorus-registry-tls")["ca.crt"]


def test_what_is_damaged_or_of_another_mesh_is_refused_with_advice(scene: Scene):
    scene.issue()
    with pytest.raises(ConfigError, match=r"mesh\.trust_domain says other\.local"):
        scene.issue(domain="other.local")
    scene.api.objects[f"{SECRETS}/chorus-ca"]["data"]["ca.key"] = base64.b64encode(b"nonsense").decode()
    with pytest.raises(CertificateError, match="restore it from a backup"):
        scene.issue()


def test_a_runner_without_a_leaf_is_told_what_to_do(scene: Scene, tmp_path: Path):
    scene.issue()
    leaves = scene.mounted("chorus-runner-leaves", tmp_path / "leaves")
    with pytest.raises(CertificateError, match=r"it has desktop, laptop.*create job --from=cronjob/chorus-issue"):
        take_leaf("attic", leaves, tmp_path / "certs")
