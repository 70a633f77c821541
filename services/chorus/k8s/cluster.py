"""The API server, as a pod with a service account reaches it: JSON over HTTPS, and watches as lines of it."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias

import httpx

from chorus.core.errors import ConfigError, NotFoundError, UnavailableError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S = 15.0
# Beyond what a watch was asked to last: a connection that is silent for longer is dead.
_WATCH_MARGIN_S = 15.0

Object: TypeAlias = dict[str, Any]


class ExpiredError(Exception):
    """The API server no longer knows the resource version that a watch was to go on from: list again."""


class ConflictError(Exception):
    """An object of that name exists already, or was changed by somebody else meanwhile."""


class Cluster:
    """One API server. Every method raises UnavailableError where it does not answer or refuses, saying why.

    `token_file` is read for every request, since the kubelet renews it.
    """

    def __init__(self, url: str, *, token_file: Path, ca_file: Path, namespace: str) -> None:
        self.namespace = namespace
        self._token_file = token_file
        try:
            trust = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise ConfigError(f"cannot read the API server's authority, {ca_file}: {error.strerror}") from error
        self._http = httpx.Client(base_url=url, verify=trust, timeout=_TIMEOUT_S, trust_env=False)

    @classmethod
    def in_pod(cls, environ: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT) -> Self:
        """The cluster that this process is in. Raises ConfigError where it is in none, or has no token."""
        host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ConfigError("this runs in a pod of a Kubernetes cluster alone (KUBERNETES_SERVICE_HOST is not set)")
        try:
            namespace = (account / "namespace").read_text("utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"this pod has no service account token in {account}: {error.strerror}; "
                "its automountServiceAccountToken should be true"
            ) from error
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        return cls(url, token_file=account / "token", ca_file=account / "ca.crt", namespace=namespace)

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def get(self, path: str, **query: str) -> Object:
        """Returns an object or a list. Raises NotFoundError."""
        return self._ask("GET", path, params=query)

    def create(self, path: str, body: Object) -> Object:
        """Makes an object in the collection `path`. Raises ConflictError."""
        return self._ask("POST", path, json=body)

    def merge(self, path: str, patch: Object) -> Object:
        """Changes parts of an object (JSON merge patch, RFC 7386). Raises NotFoundError."""
        return self._ask(
            "PATCH", path, content=json.dumps(patch), headers={"Content-Type": "application/merge-patch+json"}
        )

    def watch(self, path: str, resource_version: str, *, timeout_s: int) -> Iterator[tuple[str, Object]]:
        """Yields (ADDED, MODIFIED, DELETED or BOOKMARK; the object) until the server ends it, after `timeout_s`.

        Raises ExpiredError where `resource_version` is too old.
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_s),
        }
        timeout = httpx.Timeout(_TIMEOUT_S, read=timeout_s + _WATCH_MARGIN_S)
        with (
            self._understood(f"GET {path} (watch)"),
            self._http.stream("GET", path, params=query, headers=self._headers(), timeout=timeout) as answer,
        ):
            if answer.is_error:
                answer.read()
            _check(answer)
            for line in filter(str.strip, answer.iter_lines()):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    if status.get("code") == httpx.codes.GONE:
                        raise ExpiredError(status.get("message", ""))
                    raise UnavailableError(f"the watch of {path} failed: {status.get('message', status)}")
                yield event["type"], event["object"]

    def _ask(self, method: str, path: str, **request: Any) -> Object:
        headers = self._headers() | request.pop("headers", {})
        with self._understood(f"{method} {path}"):
            answer = self._http.request(method, path, headers=headers, **request)
            _check(answer)
            found: Object = answer.json()
            return found

    def _headers(self) -> dict[str, str]:
        try:
            return {"Authorization": f"Bearer {self._token_file.read_text('utf-8').strip()}"}
        except OSError as error:
            raise ConfigError(f"cannot read the service account token: {error.strerror}") from error

    @contextmanager
    def _understood(self, what: str) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise UnavailableError(f"the API server did not answer {what}: {error or type(error).__name__}") from error


def _check(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    what = f"{answer.request.method} {answer.request.url.path}"
    try:
        why = str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        why = answer.text[:200] or answer.reason_phrase
    match answer.status_code:
        case httpx.codes.GONE:
            raise ExpiredError(why)
        case httpx.codes.NOT_FOUND:
            raise NotFoundError(f"{what}: {why}")
        case httpx.codes.CONFLICT:
            raise ConflictError(f"{what}: {why}")
        case code:
            raise UnavailableError(f"the API server refused {what} with {code}: {why}")
