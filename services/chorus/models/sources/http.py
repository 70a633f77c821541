"""Downloading over HTTP so that an interruption costs only what was under way.

A partial file has a record beside it of what it is part of: URL, size, and the server's validator (ETag or date). It is
gone on with only if the server still has the same file; where the digest is known, that decides at the end instead.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from chorus.core.errors import DownloadError
from chorus.models.progress import PullPhase, Reporter
from chorus.models.sources.addresses import AddressGuard
from chorus.models.sources.offer import ensure_space, keep_going

_TIMEOUT = httpx.Timeout(30.0, connect=15.0)
_ATTEMPTS_WITHOUT_PROGRESS = 5
_ATTEMPTS = 1000
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_EXPLANATIONS = {
    401: "it wants a login",
    403: "access is denied; the file may need an account that accepted its licence",
    404: "there is no such file",
    410: "the file is gone",
}


@dataclass(frozen=True, slots=True)
class Download:
    """What to get. `headers` may hold a token: they go to the URL's own host, not to where it redirects.

    `allow_private`: the way there may lead to private addresses, though the URL names none.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int | None = None
    sha256: str | None = None
    allow_private: bool = False


@dataclass(frozen=True, slots=True)
class _Record:
    """What a partial file is part of."""

    url: str
    size: int | None
    validator: str | None


class _Interrupted(Exception):  # noqa: N818 - a state, not an error that anybody sees
    """The transfer broke off in a way that trying again may cure."""

    def __init__(self, problem: str, pause_s: float | None = None) -> None:
        super().__init__(problem)
        self.pause_s = pause_s


def record_path(partial: Path) -> Path:
    """Where the record of a partial file lies."""
    return partial.with_name(partial.name + ".json")


def download(
    wanted: Download,
    partial: Path,
    reporter: Reporter,
    *,
    transport: httpx.BaseTransport | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Puts the file at `partial`, going on from what is there; whatever ends this early leaves it to go on from.

    Tries again after transient failures, up to five times in a row without progress. Raises DownloadError.
    """
    host = httpx.URL(wanted.url).host

    def refuse_downgrade(request: httpx.Request) -> None:
        if wanted.url.startswith("https:") and request.url.scheme != "https":
            raise DownloadError(f"{host} redirects to {request.url.host} without encryption; not followed")

    guard = AddressGuard(wanted.url, allow_private=wanted.allow_private)
    hooks: dict[str, list[Callable[..., None]]] = {
        "request": [refuse_downgrade, guard.check_request],
        "response": [guard.check_response],
    }
    failures = 0
    with httpx.Client(follow_redirects=True, timeout=_TIMEOUT, transport=transport, event_hooks=hooks) as client:
        for _ in range(_ATTEMPTS):
            before = _size(partial)
            try:
                _attempt(client, wanted, partial, reporter)
                return
            except _Interrupted as interrupted:
                problem, asked_pause = str(interrupted), interrupted.pause_s
            except httpx.HTTPError as error:
                problem, asked_pause = _plain(error), None
                if not isinstance(error, httpx.TransportError) or "CERTIFICATE_VERIFY_FAILED" in problem:
                    raise DownloadError(f"{host}: {problem}") from error
            except OSError as error:
                raise DownloadError(f"{partial} can't be written: {error.strerror or error}") from error
            failures = 0 if _size(partial) > before else failures + 1
            if failures >= _ATTEMPTS_WITHOUT_PROGRESS:
                break
            growing = min(_FIRST_PAUSE_S * 2**failures, _LONGEST_PAUSE_S)
            reporter.report(PullPhase.DOWNLOADING, _size(partial), wanted.size_bytes or 0, f"{problem}; trying again")
            pause(growing if asked_pause is None else min(asked_pause, _LONGEST_PAUSE_S))
    kept = f"; {_size(partial)} bytes are kept, the next pull goes on from there" if _size(partial) else ""
    raise DownloadError(f"{host}: {problem}{kept}")


def _attempt(client: httpx.Client, wanted: Download, partial: Path, reporter: Reporter) -> None:
    keep_going(reporter)
    if partial.exists() and partial.stat().st_nlink > 1:
        partial.unlink()  # a hard link to a file of somebody else's, which must not be written to
    have, record = _resumable(wanted, partial)
    if have and have == record.size:
        return
    headers = {"Accept-Encoding": "identity", **wanted.headers}
    if have:
        headers["Range"] = f"bytes={have}-"
        if wanted.sha256 is None and record.validator is not None:
            headers["If-Range"] = record.validator
    with client.stream("GET", wanted.url, headers=headers) as response:
        start, size = _checked(response, wanted)
        if start not in (0, have) or (start and record.size not in (None, size)):
            forget(partial)
            raise _Interrupted("the server's file is no longer what it was", 0.0)
        ensure_space(partial.parent, (size or 0) - start)
        _write_record(partial, _Record(wanted.url, size, _validator(response)))
        with partial.open("r+b" if start else "wb") as file:
            # Written by position: where two processes overlap for a moment, they write the same bytes.
            file.seek(start)
            for chunk in response.iter_raw():  # as it comes: a chunk size would hold back what came before a break
                keep_going(reporter)
                if size is not None and start + len(chunk) > size:
                    raise DownloadError(f"{response.url.host} sent more than the {size} bytes that it announced")
                file.write(chunk)
                start += len(chunk)
                reporter.report(PullPhase.DOWNLOADING, start, size or 0)
    if size is not None and start < size:
        raise _Interrupted(f"the connection ended after {start} of {size} bytes")


def forget(partial: Path) -> None:
    """Removes a partial file and its record."""
    partial.unlink(missing_ok=True)
    record_path(partial).unlink(missing_ok=True)


def _checked(response: httpx.Response, wanted: Download) -> tuple[int, int | None]:
    """Where the body starts in the file, and how long the whole file is. -1 where there is nothing from there on."""
    status = response.status_code
    if status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
        return -1, None
    if status in _TRANSIENT:
        raise _Interrupted(f"the server answered {status} {response.reason_phrase}", _retry_after(response))
    if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        explanation = _EXPLANATIONS.get(status, response.reason_phrase)
        raise DownloadError(f"{response.url.host} answered {status}: {explanation}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise DownloadError(f"{response.url.host} sends the file compressed, which can't be gone on with or checked")
    if status == httpx.codes.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None:
            raise DownloadError(f"{response.url.host} sent a part of the file without saying which")
        start, size = int(match.group(1)), int(match.group(3))
        return _agreed(response, wanted, start, size)
    length = response.headers.get("Content-Length", "")
    return _agreed(response, wanted, 0, int(length) if length.isdigit() else None)


def _agreed(response: httpx.Response, wanted: Download, start: int, size: int | None) -> tuple[int, int | None]:
    if wanted.size_bytes is not None and size is not None and size != wanted.size_bytes:
        raise DownloadError(
            f"{response.url.host} has a file of {size} bytes, but it should have {wanted.size_bytes}; it was replaced"
        )
    return start, size if size is not None else wanted.size_bytes


def _resumable(wanted: Download, partial: Path) -> tuple[int, _Record]:
    """How many bytes of the file are here already, and what is recorded of them."""
    nothing = 0, _Record(wanted.url, None, None)
    try:
        fields = json.loads(record_path(partial).read_text(encoding="utf-8"))
        record = _Record(fields["url"], fields["size"], fields["validator"])
    except (OSError, ValueError, LookupError, TypeError):
        return nothing
    if record.url != wanted.url or (wanted.sha256 is None and record.validator is None):
        return nothing
    have = _size(partial)
    return (have, record) if record.size is None or have <= record.size else nothing


def _write_record(partial: Path, record: _Record) -> None:
    text = json.dumps({"url": record.url, "size": record.size, "validator": record.validator})
    record_path(partial).write_text(text, encoding="utf-8")


def _validator(response: httpx.Response) -> str | None:
    """What makes this version of the file different from every other; weak ETags promise too little."""
    tag = response.headers.get("ETag")
    if tag is not None and not tag.startswith("W/"):
        return str(tag)
    date = response.headers.get("Last-Modified")
    return None if date is None else str(date)


def _retry_after(response: httpx.Response) -> float | None:
    seconds = response.headers.get("Retry-After", "")
    return float(seconds) if seconds.isdigit() else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _plain(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__
