"""The Secrets of a namespace, as the Job that makes them reads and writes them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

from chorus.core.errors import CertificateError, NotFoundError
from chorus.k8s.cluster import Cluster

_LABELS = {"app.kubernetes.io/part-of": "chorus", "app.kubernetes.io/managed-by": "chorus-issue"}


class Secrets:
    """Those of one namespace. Every method raises UnavailableError where the API server does not answer or refuses."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._path = f"/api/v1/namespaces/{cluster.namespace}/secrets"

    def read(self, name: str) -> dict[str, bytes] | None:
        """What a Secret holds; None where there is none. Raises CertificateError where it is damaged."""
        try:
            found = self.cluster.get(f"{self._path}/{name}")
        except NotFoundError:
            return None
        try:
            return {key: base64.b64decode(text, validate=True) for key, text in (found.get("data") or {}).items()}
        except binascii.Error as error:
            raise CertificateError(f"the Secret {name} is damaged: {error}") from error

    def create(self, name: str, data: Mapping[str, bytes | None]) -> None:
        """Makes a Secret. Raises ConflictError where there is one."""
        document = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "labels": _LABELS},
            "type": "Opaque",
            "data": _encoded(data),
        }
        self.cluster.create(self._path, document)

    def write(self, name: str, data: Mapping[str, bytes | None], *, exists: bool) -> None:
        """Makes a Secret, or changes these keys of one that `exists`; None takes a key away."""
        if exists:
            self.cluster.merge(f"{self._path}/{name}", {"data": _encoded(data)})
        else:
            self.create(name, data)


def _encoded(data: Mapping[str, bytes | None]) -> dict[str, str | None]:
    return {key: None if value is None else base64.b64encode(value).decode() for key, value in data.items()}
