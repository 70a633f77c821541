"""Metrics over plain HTTP, for Prometheus: `/metrics`, and `/-/healthy` for probes. It answers GET and nothing else."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from chorus.core.errors import ConfigError
from chorus.telemetry.logs import get_logger

_MAX_CONNECTIONS = 16
_REQUEST_TIMEOUT_S = 10.0

_log = get_logger()


class MetricsServer:
    """Serves one process's metrics on threads of its own until it is stopped.

    Port 0 lets the system choose; `port` then tells which. `key` is the configuration key that `host` and `port` came
    from, for the message of a ConfigError. `healthy` is asked on a server thread.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str,
        port: int,
        key: str = "metrics_listen",
        healthy: Callable[[], bool] = lambda: True,
    ) -> None:
        self._registry = registry
        self._address = (host, port)
        self._key = key
        self._healthy = healthy
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port that is listened on; the one asked for before `start()`."""
        return self._address[1] if self._server is None else int(self._server.server_address[1])

    def start(self) -> None:
        """Starts to serve: connections are accepted from then on. Raises ConfigError where it cannot listen."""
        host, port = self._address
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
                0
            ]
            self._server = _Server(family, address, self._registry, self._healthy)
        except (OSError, OverflowError, UnicodeError) as error:
            shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            problem = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"{self._key} = '{shown}': cannot listen there: {problem}; choose another address",
                metadata={"keys": self._key},
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics-server", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stops, and closes every connection; a second time does nothing. Blocks for about 0.1 s."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is None or thread is None:
            return
        self._address = (self._address[0], int(server.server_address[1]))
        server.shutdown()
        thread.join()
        server.close_connections()
        server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    """Bounded in connections, and able to close those that are open, so that stopping waits for nobody."""

    daemon_threads = False  # joined by server_close(), which leaves no socket behind
    request_queue_size = _MAX_CONNECTIONS
    # Elsewhere it allows to listen again at once after a restart; on Windows it would let two share a port.
    allow_reuse_address = os.name != "nt"

    def __init__(self, family: int, address: Any, registry: CollectorRegistry, healthy: Callable[[], bool]) -> None:
        self.address_family = family
        self.registry = registry
        self.healthy = healthy
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Binds without asking DNS for this machine's name, which http.server does and which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hands a connection to a thread, or drops it where too many are open."""
        with self._lock:
            full = len(self._open) >= _MAX_CONNECTIONS
            if not full:
                self._open.add(request)
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Makes every thread's next read or write fail."""
        with self._lock:
            for request in self._open:
                try:
                    request.shutdown(socket.SHUT_RDWR)
                except OSError:  # the peer was faster
                    continue

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """What fails outside an answer is the connection, and the other side knows that already."""
        _log.debug("metrics.connection_failed", peer=str(client_address), exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_TIMEOUT_S
    server_version = "chorus"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            try:
                body = encode(self.server.registry)
            except Exception:  # a collector's defect must show up as a failed scrape, not as a broken connection
                _log.exception("metrics.collecting_failed")
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, b"a collector failed; the log says which\n")
            else:
                self._answer(HTTPStatus.OK, body, content_type)
        elif path == "/-/healthy":
            healthy = self.server.healthy()
            self._answer(
                HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, b"ok\n" if healthy else b"not healthy\n"
            )
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there is /metrics and /-/healthy\n")

    def _refuse(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET only\n")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse  # noqa: N815

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""
        _log.debug("metrics.request", peer=str(self.client_address[0]), line=format % args)
