"""An API server of Kubernetes as far as Chorus asks one: nodes and Secrets over HTTPS, with a token, and watches.

What a watch says is scripted: each is answered by the next list of events, and ends; when none is left, it is refused.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from chorus.core.identity import Role
from chorus.k8s.cluster import Cluster
from chorus.testing.certificates import MeshCertificates

TOKEN = "a-token-that-the-kubelet-renews"
NAMESPACE = "chorus"


class ApiServer:
    """The objects by path, the scripts of watches, and what was asked."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.version = 100
        self.watches: deque[list[dict[str, Any]] | int] = deque()
        """Each a list of events, or an HTTP status to refuse with."""
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and query of every request."""
        self.patches: list[tuple[str, dict[str, Any]]] = []
        self.token = TOKEN

    def put(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        """Keeps an object as the newest version."""
        self.version += 1
        document.setdefault("metadata", {})["resourceVersion"] = str(self.version)
        self.objects[path] = document
        return document

    def answer(self, method: str, url: str, body: bytes) -> tuple[int, Any]:
        """Status and document; a list of events for a watch."""
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.asked.append((method, parts.path, query))
        if query.get("watch") == "1":
            script = self.watches.popleft() if self.watches else 503
            return (200, script) if isinstance(script, list) else (script, _status(script))
        if method == "POST":
            document = json.loads(body)
            path = f"{parts.path}/{document['metadata']['name']}"
            return (409, _status(409)) if path in self.objects else (201, self.put(path, document))
        if method == "GET" and parts.path not in self.objects:
            return self._listing(parts.path, query)
        if parts.path not in self.objects:
            return 404, _status(404)
        if method == "PATCH":
            patch = json.loads(body)
            self.patches.append((parts.path, patch))
            return 200, self.put(parts.path, _merged(self.objects[parts.path], patch))
        return 200, self.objects[parts.path]

    def _listing(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        if not path.endswith(("/nodes", "/secrets")):
            return 404, _status(404)
        items = [document for key, document in self.objects.items() if key.rpartition("/")[0] == path]
        if selector := query.get("labelSelector"):
            key, _, value = selector.partition("=")
            items = [item for item in items if item["metadata"].get("labels", {}).get(key) == value]
        return 200, {"metadata": {"resourceVersion": str(self.version)}, "items": items}


def _status(code: int) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "code": code, "message": f"scripted {code}"}


def _merged(document: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


@contextmanager
def serving(folder: Path) -> Iterator[tuple[ApiServer, Cluster]]:
    """A server, and a client of it as a pod would have: its token and the authority lie in `folder`."""
    api = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            if self.headers.get("Authorization") != f"Bearer {api.token}":
                status, answer = 401, _status(401)
            else:
                status, answer = api.answer(self.command, self.path, body)
            lines = answer if isinstance(answer, list) else [answer]
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PATCH = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    certificates = MeshCertificates()
    leaf = certificates.leaf(Role.COORDINATOR, "api-server")
    for name, content in (("ca.crt", leaf.ca_pem), ("tls.pem", leaf.cert_pem + leaf.key_pem)):
        (folder / name).write_bytes(content)
    (folder / "token").write_text(TOKEN)
    (folder / "namespace").write_text(NAMESPACE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.server_port)}
    cluster = Cluster.in_pod(environ, folder)
    try:
        yield api, cluster
    finally:
        cluster.close()
        server.shutdown()
        thread.join()
        server.server_close()


def node(
    name: str,
    *,
    version: int = 1,
    runs: bool = True,
    cordoned: bool = False,
    ready: str = "True",
    mark: str | None = None,
) -> dict[str, Any]:
    """A Node as the API tells it, shortened."""
    labels = {"kubernetes.io/hostname": name} | ({"chorus.mesh/runner": "true"} if runs else {})
    return {
        "kind": "Node",
        "metadata": {
            "name": name,
            "resourceVersion": str(version),
            "labels": labels | ({"chorus.mesh/drain": mark} if mark else {}),
        },
        "spec": {"unschedulable": True} if cordoned else {"podCIDR": "10.42.0.0/24"},
        "status": {"conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": ready}]},
    }
