"""Every set of manifests renders, and every document is what Kubernetes' own schemas say, old and new."""

from __future__ import annotations

import json

import kubernetes_validate
import pytest

from tests.deploy.conftest import SETS, Rendered

# The oldest that K3s' own channels still had when this was written, one between, and the newest that is known here.
VERSIONS = ("1.29", "1.33", "1.37")

# Kinds of other projects, whose schemas no package here has: what they must have, so that a slip is noticed.
FOREIGN = {
    ("traefik.io/v1alpha1", "IngressRouteTCP"): {"entryPoints", "routes", "tls"},
    ("monitoring.coreos.com/v1", "ServiceMonitor"): {"selector", "endpoints"},
    ("monitoring.coreos.com/v1", "PrometheusRule"): {"groups"},
    ("cert-manager.io/v1", "Issuer"): set(),
    ("cert-manager.io/v1", "Certificate"): {"secretName", "issuerRef"},
}


def documents(rendered: Rendered) -> list[dict]:
    """Each different document of all sets once."""
    seen = {json.dumps(doc, sort_keys=True): doc for name in SETS for doc in rendered(name)}
    return list(seen.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_documents_are_strictly_what_kubernetes_knows(rendered: Rendered, version: str):
    checked = 0
    for doc in documents(rendered):
        if (doc["apiVersion"], doc["kind"]) not in FOREIGN:
            kubernetes_validate.validate(doc, version, strict=True)
            checked += 1
    assert checked >= 60


def test_a_misspelt_field_would_be_noticed(rendered: Rendered):
    spoilt = next(doc for doc in rendered("home") if doc["kind"] == "DaemonSet")
    spoilt = {**spoilt, "spec": {**spoilt["spec"], "revisionHistoryLimits": 3}}
    with pytest.raises(kubernetes_validate.ValidationError, match="revisionHistoryLimits"):
        kubernetes_validate.validate(spoilt, VERSIONS[0], strict=True)


def test_kinds_of_other_projects_have_what_they_need(rendered: Rendered):
    seen = set()
    for doc in documents(rendered):
        kind = (doc["apiVersion"], doc["kind"])
        if kind in FOREIGN:
            assert FOREIGN[kind] <= doc["spec"].keys(), doc["metadata"]["name"]
            seen.add(kind)
    assert seen == FOREIGN.keys()


@pytest.mark.parametrize("name", SETS)
def test_all_that_is_namespaced_is_in_one_namespace(rendered: Rendered, name: str):
    outside = {
        "Namespace",
        "PriorityClass",
        "ClusterRole",
        "ClusterRoleBinding",
        "RuntimeClass",
    }
    for doc in rendered(name):
        expected = None if doc["kind"] in outside else "chorus"
        assert doc["metadata"].get("namespace") == expected, doc["metadata"]["name"]


@pytest.mark.parametrize("name", SETS)
def test_no_document_stands_twice(rendered: Rendered, name: str):
    keys = [(doc["kind"], doc["metadata"]["name"]) for doc in rendered(name)]
    assert len(keys) == len(set(keys))
