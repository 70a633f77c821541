"""An overlay for the nodes and models of one's own, written beside the manifests that it is made of.

The manifests are those that the package carries, so that a folder is whole: `kubectl apply -k` needs nothing else.
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory

from chorus.core.cluster.labels import GPU_LABEL, RUNNER_LABEL
from chorus.core.cluster.layout import Layout
from chorus.core.errors import ConfigError, InvalidRequestError

_MANIFESTS = "manifests"

_HEAD = """\
# Written by `chorus k8s render`, for {nodes}. Change it here, or render it again.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - {manifests}/base
components:
{components}
images:
  - {{name: chorus, newName: {image}, newTag: {tag}}}
  - {{name: chorus-cuda, newName: {image}, newTag: {cuda_tag}}}
replicas:
  - {{name: chorus-registry, count: {registries}}}
patches:
  - patch: |
      - {{op: replace, path: /spec/minReplicas, value: {coordinators}}}
    target: {{kind: HorizontalPodAutoscaler, name: chorus-coordinator}}
  # What is fetched to every node that runs models, by the init container `pull`. (Named in a merged patch, it would
  # come before the one that makes its folder.)
  - patch: |
      - {{op: replace, path: /spec/template/spec/initContainers/1/args, value: {pull}}}
    target: {{kind: DaemonSet, name: chorus-models}}
"""
_SPREAD = """\
  # Never two on one machine while another has none; a machine that is lost is no place that waits for its share.
  - patch: |
      - {op: replace, path: /spec/template/spec/topologySpreadConstraints/0/whenUnsatisfiable, value: DoNotSchedule}
      - {op: add, path: /spec/template/spec/topologySpreadConstraints/0/nodeTaintsPolicy, value: Honor}
    target: {kind: Deployment, name: chorus-(registry|coordinator)}
"""


def kustomization(layout: Layout, image: str) -> str:
    """The overlay's text; `image` is NAME:TAG. Raises InvalidRequestError where it is not."""
    name, colon, tag = image.rpartition(":")
    if not (name and colon and tag) or "/" in tag or "@" in name or any(map(str.isspace, image)):
        raise InvalidRequestError("--image", f"{image[:80]!r} is no NAME:TAG, such as localhost/chorus:0.1.0")
    text = _HEAD.format(
        nodes=", ".join(layout.nodes),
        manifests=_MANIFESTS,
        components="\n".join(f"  - {_MANIFESTS}/components/{each}" for each in layout.components),
        image=json.dumps(name),
        tag=json.dumps(tag),
        cuda_tag=json.dumps(f"{tag}-cuda"),
        registries=layout.registries,
        coordinators=layout.coordinators,
        pull=json.dumps(["models", "pull", *layout.models]),
    )
    return text + (_SPREAD if layout.spread else "")


def write_overlay(layout: Layout, image: str, target: Path, *, replace: bool) -> None:
    """Writes the overlay and all manifests to the folder `target`, which appears whole or not at all.

    Raises ConfigError where something is there already (unless it is an overlay and `replace`) or can't be written.
    """
    text = kustomization(layout, image)
    if target.exists() and not (replace and (target / _MANIFESTS).is_dir()):
        advice = (
            "`chorus k8s render --replace` writes it anew"
            if (target / _MANIFESTS).is_dir()
            else "choose another folder"
        )
        raise ConfigError(f"{target} is there already; {advice}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            made = Path(scratch) / "made"
            _copy_manifests(made / _MANIFESTS)
            (made / "kustomization.yaml").write_text(text, "utf-8")
            if target.exists():
                target.rename(Path(scratch) / "before")
            made.rename(target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error


def label_commands(layout: Layout) -> list[str]:
    """The commands that say which nodes run models: labels are the cluster's, and no overlay sets them."""
    found = [f"kubectl label --overwrite node {' '.join(layout.nodes)} {RUNNER_LABEL}=true"]
    if layout.gpu_nodes:
        found.append(f"kubectl label --overwrite node {' '.join(layout.gpu_nodes)} {GPU_LABEL}=nvidia")
    return found


def _copy_manifests(target: Path) -> None:
    # Every component, since some are made of others, and one may be listed by hand later.
    with as_file(files("chorus.k8s") / _MANIFESTS) as source:
        for each in ("base", "components"):
            shutil.copytree(source / each, target / each)
