"""The manifests as kustomize renders them, each folder once in a test run."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

K3S = Path(__file__).resolve().parents[2] / "deploy" / "k3s"
OVERLAYS = ("single-node", "home", "ha")
_OLDEST = (4, 5)

Document = dict[str, Any]


@functools.cache
def kustomize() -> tuple[str, ...]:
    """The command that renders a folder. Fails, not skips, where there is none: the manifests are untested then."""
    for words, version in (
        (("kustomize", "build"), ("kustomize", "version")),
        (("kubectl", "kustomize"), ("kubectl", "version", "--client")),
    ):
        if shutil.which(words[0]) is None:
            continue
        said = subprocess.run(version, capture_output=True, text=True, timeout=60, check=False).stdout
        found = re.search(r"(?:Kustomize Version: |^\{?(?:kustomize/)?)v(\d+)\.(\d+)", said, re.MULTILINE)
        if found and (int(found[1]), int(found[2])) >= _OLDEST:
            return words
    raise AssertionError("the manifests need kustomize >= 4.5 on PATH, or a kubectl >= 1.25, which has it built in")


@functools.cache
def render(folder: Path) -> tuple[Document, ...]:
    """The documents of a kustomization."""
    done = subprocess.run([*kustomize(), str(folder)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def overlay(name: str) -> tuple[Document, ...]:
    """The documents of an overlay."""
    return render(K3S / "overlays" / name)


def variant(folder: Path, *components: str) -> tuple[Document, ...]:
    """The base with components, by an overlay that is written to `folder`, which has to be somewhere beside `K3S`."""
    folder.mkdir()
    up = Path(*[".."] * len(folder.relative_to("/").parts)) / K3S.relative_to("/")
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization", "resources:", f"  - {up}/base"]
    lines += ["components:", *(f"  - {up}/components/{name}" for name in components)]
    lines += ["images:"]
    lines += [f"  - {{name: {name}, newName: localhost/chorus, newTag: 0.1.0}}" for name in ("chorus", "chorus-cuda")]
    (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
    return render(folder)


def one(documents: tuple[Document, ...] | list[Document], kind: str, name: str) -> Document:
    """The document of that kind and name."""
    (found,) = [doc for doc in documents if doc["kind"] == kind and doc["metadata"]["name"] == name]
    return found


def pod_template(document: Document) -> Document | None:
    """The template of a document's pods, if it makes any."""
    spec = document.get("spec", {})
    if document["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    template: Document | None = spec.get("template") if document["kind"] in WORKLOADS else None
    return template


WORKLOADS = ("Deployment", "DaemonSet", "StatefulSet", "Job", "CronJob")


def containers(template: Document) -> Iterator[Document]:
    """Every container of a pod, those that run first first."""
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]
