"""A real HTTP server on loopback that serves files as well, or as badly, as a test wants."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_RANGE = re.compile(r"bytes=(\d+)-")


@dataclass
class ServedFile:
    """A file and how it is served.

    `break_after` ends that many of the next connections after so many bytes of body; `gate` is waited for after
    `gate_after` bytes. `statuses` are answered, one per request, before anything else; `headers` go with them.
    """

    content: bytes
    etag: str | None = None
    last_modified: str | None = None
    ranges: bool = True
    announce_length: bool = True
    break_after: list[int] = field(default_factory=list)
    gate: threading.Event | None = None
    gate_after: int = 0
    reached_gate: threading.Event = field(default_factory=threading.Event)
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    redirect: str | None = None


@dataclass
class Seen:
    """One request that came in."""

    method: str
    path: str
    headers: dict[str, str]


class FileServer:
    """Files by path; `requests` holds what was asked, in order."""

    def __init__(self) -> None:
        self.files: dict[str, ServedFile] = {}
        self.requests: list[Seen] = []
        self.answer: Callable[[Seen], tuple[int, dict[str, str], bytes] | None] = lambda seen: None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._serve(self)

            def do_HEAD(self) -> None:
                server._serve(self)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def add(self, path: str, content: bytes, **how: Any) -> ServedFile:
        """Serves `content` at `path`, by default with a strong ETag of it."""
        how.setdefault("etag", f'"{hashlib.sha256(content).hexdigest()[:16]}"')
        self.files[path] = ServedFile(content, **how)
        return self.files[path]

    def ranges(self, path: str) -> list[str | None]:
        """The Range header of every request for `path`, in order."""
        return [seen.headers.get("range") for seen in self.requests if seen.path == path and seen.method == "GET"]

    @contextlib.contextmanager
    def running(self) -> Iterator[FileServer]:
        self._thread.start()
        try:
            yield self
        finally:
            for served in self.files.values():
                if served.gate is not None:
                    served.gate.set()
            self._http.shutdown()
            self._http.server_close()
            self._thread.join(10)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {key.lower(): value for key, value in handler.headers.items()}
        seen = Seen(handler.command, handler.path, headers)
        self.requests.append(seen)
        handler.close_connection = True
        special = self.answer(seen)
        if special is not None:
            self._head(handler, special[0], special[1] | {"Content-Length": str(len(special[2]))})
            handler.wfile.write(b"" if handler.command == "HEAD" else special[2])
            return
        served = self.files.get(handler.path.partition("?")[0])
        if served is None:
            self._head(handler, 404, {"Content-Length": "0"})
        elif served.redirect is not None:
            self._head(handler, 302, {"Location": served.redirect, "Content-Length": "0"})
        elif served.statuses:
            self._head(handler, served.statuses.pop(0), {"Content-Length": "0"} | served.headers)
        else:
            with contextlib.suppress(ConnectionError):
                self._body(handler, served, headers)

    def _body(self, handler: BaseHTTPRequestHandler, served: ServedFile, headers: dict[str, str]) -> None:
        size = len(served.content)
        answer = dict(served.headers)
        if served.etag is not None:
            answer["ETag"] = served.etag
        if served.last_modified is not None:
            answer["Last-Modified"] = served.last_modified
        match = _RANGE.fullmatch(headers.get("range", "")) if served.ranges else None
        condition = headers.get("if-range")
        start, status = 0, 200
        if match is not None and condition in (None, served.etag, served.last_modified):
            start, status = int(match.group(1)), 206
            if start >= size:
                self._head(handler, 416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
            answer["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        body = served.content[start:]
        if served.announce_length:
            answer["Content-Length"] = str(len(body))
        self._head(handler, status, answer)
        if served.break_after:
            handler.wfile.write(body[: served.break_after.pop(0)])
            return
        if served.gate is not None:
            handler.wfile.write(body[: served.gate_after])
            handler.wfile.flush()
            served.reached_gate.set()
            served.gate.wait(60)
            body = body[served.gate_after :]
        handler.wfile.write(body)

    @staticmethod
    def _head(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        handler.send_response_only(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Connection", "close")
        handler.end_headers()
