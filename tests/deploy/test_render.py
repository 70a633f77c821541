"""`chorus k8s render`: what it writes is what kustomize and the services take, as the overlays are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import kubernetes_validate
import pytest
from typer.testing import CliRunner

from chorus.cli.k8s import app
from chorus.core.cluster.layout import Certificates, Extra
from tests.deploy.edges import workloads
from tests.deploy.manifests import K3S, Document, containers, one, overlay, render
from tests.deploy.test_policy import exceptions, violations
from tests.deploy.test_schemas import VERSIONS


def invoke(*words: str) -> str:
    """Runs the command, which has to succeed; returns all that it says."""
    result = CliRunner().invoke(app, ["render", *words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    target = tmp_path_factory.mktemp("rendered") / "deep" / "mesh"
    words = ["--to", str(target), "--gpu-node", "desktop", "--node", "laptop", "--node", "attic"]
    return target, invoke(*words, "--model", "one", "--model", "hf:a/b", "--image", "house:5000/chorus:7")


def test_what_is_written_is_whole_and_valid(written: tuple[Path, str]):
    documents = render(written[0])
    for document in documents:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        assert violations(document).keys() <= exceptions(document).keys()
    pods = workloads(documents)
    images = {container["image"] for each in pods for container in containers(each.template)}
    assert images == {"house:5000/chorus:7", "house:5000/chorus:7-cuda"}
    pull = next(c for each in pods for c in containers(each.template) if c["name"] == "pull")
    assert pull["args"] == ["models", "pull", "one", "hf:a/b"]
    assert one(documents, "Deployment", "chorus-registry")["spec"]["replicas"] == 3


def test_it_says_what_is_left_to_do(written: tuple[Path, str]):
    target, said = written
    assert "kubectl label --overwrite node attic desktop laptop chorus.mesh/runner=true" in said
    assert "kubectl label --overwrite node desktop chorus.mesh/gpu=nvidia" in said
    assert f"kubectl apply -k {target}" in said


def _by_name(documents: tuple[Document, ...]) -> list[Document]:
    return sorted(documents, key=lambda d: (d["kind"], d["metadata"]["name"]))


def test_for_a_laptop_it_is_the_overlay_for_one(tmp_path: Path):
    target = tmp_path / "mesh"
    invoke("--to", str(target), "--node", "laptop")
    assert _by_name(render(target)) == _by_name(overlay("single-node"))


def test_for_three_servers_it_is_the_overlay_for_three(tmp_path: Path):
    target = tmp_path / "mesh"
    words = ["--node", "a", "--node", "b", "--node", "c", "--with", "observability", "--with", "ingress"]
    invoke("--to", str(target), *words)
    assert _by_name(render(target)) == _by_name(overlay("ha"))


@pytest.mark.parametrize("certificates", Certificates)
def test_whoever_makes_certificates_extras_have_what_they_need_of_it(tmp_path: Path, certificates: Certificates):
    """kustomize says nothing of a change to what isn't there (yet)."""
    target = tmp_path / "mesh"
    invoke("--to", str(target), "--gpu-node", "a", "--certificates", certificates, "--with", "callers")
    pods = {each.name: each for each in workloads(render(target))}
    ways = {"leaf": Certificates.SELFSIGNED, "join": Certificates.IDENTITY, "": Certificates.CERT_MANAGER}
    for runner in ("chorus-runner", "chorus-runner-nvidia"):
        first = [container["name"] for container in containers(pods[runner].template)][:-1]
        assert ways["".join(first)] is certificates
    jobs = [each for each in pods.values() if each.service == "issuer"]
    assert all({"--callers", "--valkey"} <= {*each.main["args"]} for each in jobs)
    assert bool(jobs) == (certificates is not Certificates.CERT_MANAGER)


def test_nothing_of_others_is_overwritten(tmp_path: Path):
    target = tmp_path / "mesh"
    target.mkdir()
    (target / "thesis.txt").write_text("")
    refused = CliRunner().invoke(app, ["render", "--to", str(target), "--node", "a", "--replace"])
    assert (refused.exit_code, "there already" in refused.output) == (2, True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mesh", "thesis.txt"]


def test_an_overlay_is_written_anew_if_told_so(tmp_path: Path):
    words = ["render", "--to", str(tmp_path / "mesh"), "--node"]
    invoke(*words[1:], "a")
    refused = CliRunner().invoke(app, [*words, "b"])
    assert (refused.exit_code, "--replace" in refused.output) == (2, True)
    invoke(*words[1:], "b", "--replace")
    assert "for b." in (tmp_path / "mesh" / "kustomization.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["mesh"]


@pytest.mark.parametrize("image", ["chorus", "chorus:", ":1", "house:5000/chorus", "a@sha256:00", "a b:1"])
def test_an_image_without_a_tag_is_refused(tmp_path: Path, image: str):
    refused = CliRunner().invoke(app, ["render", "--to", str(tmp_path / "m"), "--node", "a", "--image", image])
    assert (refused.exit_code, "NAME:TAG" in refused.output) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_every_component_can_be_asked_for_or_is_said_to_be_by_hand():
    known = {f"mtls-{each}" for each in Certificates} | set(Extra) | {"gpu-nvidia", "node-drain"}
    assert {path.name for path in (K3S / "components").iterdir()} == known | {"runner-statefulset"}


def test_an_installed_wheel_has_every_manifest(tmp_path: Path):
    root = K3S.parents[1]
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([sys.executable, *words, str(tmp_path), str(root)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    prefix = "chorus/k8s/manifests/"
    carried = {name.removeprefix(prefix) for name in ZipFile(wheel).namelist() if name.startswith(prefix)}
    assert carried == {str(path.relative_to(K3S)) for path in K3S.rglob("*") if path.is_file()}
