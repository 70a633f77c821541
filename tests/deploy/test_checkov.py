"""checkov's own judgement of every set of manifests. `make policy` installs it and runs this; CI has the rules of
test_policy.py instead."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.conftest import SETS, Rendered
from tests.deploy.manifests import Document
from tests.deploy.test_policy import skips
from tests.mesh.child import ROOT

CHECKOV = ROOT / "build" / "policy" / "bin" / "checkov"
CONFIG = ROOT / "deploy" / "checkov.yaml"

pytestmark = pytest.mark.skipif(not CHECKOV.exists(), reason="CHECKOV NOT RUN: `make policy` installs and runs it")

Failed = set[tuple[str, str]]


def judge(folder: Path, documents: tuple[Document, ...] | list[Document]) -> Failed:
    """The (check, resource) that fail of what is written to `folder`."""
    folder.mkdir()
    (folder / "all.yaml").write_text(yaml.safe_dump_all(documents))
    words = [str(CHECKOV), "--config-file", str(CONFIG), "-d", str(folder), "--output", "json", "--skip-download"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    told = json.loads(done.stdout)
    assert told["summary"]["passed"] > 300, "it looked at nothing"
    assert told["summary"]["parsing_errors"] == 0
    return {(check["check_id"], check["resource"]) for check in told["results"]["failed_checks"]}


def bare(documents: tuple[Document, ...]) -> list[Document]:
    """The same without what says that a check is to be skipped."""
    stripped = copy.deepcopy(list(documents))
    for document in stripped:
        document["metadata"].pop("annotations", None)
    return stripped


@pytest.mark.parametrize("name", SETS)
def test_nothing_fails_but_what_is_explained_and_all_that_is_explained_fails(
    rendered: Rendered, tmp_path: Path, name: str
):
    documents = rendered(name)
    assert judge(tmp_path / "as-they-are", documents) == set()
    excused = {
        (check, f"{doc['kind']}.{doc['metadata']['namespace']}.{doc['metadata']['name']}")
        for doc in documents
        for check in skips(doc)
    }
    assert judge(tmp_path / "bare", bare(documents)) == excused


def test_what_is_broken_on_purpose_fails(rendered: Rendered, tmp_path: Path):
    documents = copy.deepcopy(list(rendered("home")))
    documents = [doc for doc in documents if doc["kind"] != "NetworkPolicy"]
    (registry,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == ("Deployment", "chorus-registry")]
    registry["spec"]["template"]["spec"]["containers"][0]["securityContext"].update(privileged=True)
    failed = judge(tmp_path / "spoilt", documents)
    assert {("CKV_K8S_16", "Deployment.chorus.chorus-registry")} < failed
    assert "CKV2_K8S_6" in {check for check, _ in failed}
