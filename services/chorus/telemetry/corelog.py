"""What gRPC's core writes about itself, as events of our log: above all, whom TLS refused and why.

The core tells of a failed handshake on file descriptor 2 alone, and of the peer only while its `handshaker` trace is
on. It reads its environment once, when grpc is imported. So a service's main calls `prepare_core()` before that, and
puts what it does under `core_log_events()` once its logging is set up.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from structlog.typing import FilteringBoundLogger

from chorus.telemetry.handshakes import HandshakeFailure, handshake_failure
from chorus.telemetry.logs import get_logger
from chorus.telemetry.native_stderr import NativeStderr, divide_stderr

_TRACE = "GRPC_TRACE"
_CIPHERS = "GRPC_SSL_CIPHER_SUITES"
_HANDSHAKER = "handshaker"
# The setting is about TLS 1.2 alone (1.3 has its own suites, which stay on). With nothing in it but a suite that needs
# a shared secret which nobody has, no TLS 1.2 connection can come about, in either direction. gRPC has no better
# switch.
_NO_TLS_1_2 = "ECDHE-PSK-AES128-CBC-SHA"

# Fatal records are left out: the process dies with them, so they belong on standard error.
START = r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w./-]+:\d+\] "
# A status is written with the places that it came from, which spreads its record over several lines.
CONTINUATION = r"=== Source Location Trace.*|src/core/\S+:\d+\s*|\s*shutdown=.*|"
_RECORD = re.compile(r"(?P<severity>[IWE])\d{4} [\d:.]+ +\d+ (?P<source>[\w./-]+):\d+\] (?P<text>.*)", re.DOTALL)
_HANDSHAKE = re.compile(r"CallNextHandshakerLocked: error=(?P<error>.*?)(?:\n| shutdown=|$)")
_ARGUMENTS = re.compile(r"\s*shutdown=\w+ index=\d+, args=\{endpoint=\S+, args=\{(?P<arguments>.*)")
_PEER = re.compile(r"grpc\.internal\.endpoint_peer_address=(?:ipv[46]:)?([^,}]+)")
_LOCAL = re.compile(r"grpc\.internal\.endpoint_local_address=(?:ipv[46]:)?([^,}]+)")
_DIALLED = "grpc.server_uri="  # among the arguments of our own dials only
_SEVERITIES = {"I": "debug", "W": "warning", "E": "error"}

_divided: NativeStderr | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """One failed handshake. `peer` and `local` are `address:port`, or empty where the core did not say."""

    failure: HandshakeFailure
    peer: str = ""
    local: str = ""
    dialled: bool = False  # we called them, rather than they us
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Remark:
    """Anything else that the core said."""

    level: str
    source: str
    text: str


def prepare_core() -> bool:
    """Gets the core's log within reach, and TLS 1.2 out of it; returns whether that worked. Call it first of all, once.

    It sets what the core reads from the environment (what is set there already stays): the trace that names peers, and
    ciphers that no TLS 1.2 connection can have. For service processes, not for libraries: it holds for every user of
    grpc in the process. Once grpc is imported it is too late, and nothing is done; nor on Windows.
    """
    global _divided
    if _divided is not None or "grpc._cython.cygrpc" in sys.modules:
        return False
    os.environ.setdefault(_CIPHERS, _NO_TLS_1_2)
    _divided = divide_stderr(START, CONTINUATION)
    if _divided is None:
        return False
    # Only now: undivided, the trace would fill standard error.
    traces = [name for name in os.environ.get(_TRACE, "").split(",") if name]
    if _HANDSHAKER not in traces:
        os.environ[_TRACE] = ",".join([*traces, _HANDSHAKER])
    atexit.register(_divided.close)
    return True


@contextmanager
def core_log_events() -> Iterator[None]:
    """Logs what the core says while the block runs, if `prepare_core()` could prepare for it.

    Events: `handshake.refused` (reason, why, peer, local, dialled) and `grpc.core` for the rest.
    """
    if _divided is None:
        yield
        return
    _divided.read_lines(CoreLogReader(get_logger()).feed)
    try:
        yield
    finally:
        _divided.close()


class CoreLogReader:
    """Puts lines together to records, and logs what they tell."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._failed: str | None = None  # the error of a handshake whose arguments are still to come

    def feed(self, line: str) -> None:
        """Takes the next line."""
        told = self.parse(line)
        if isinstance(told, Refusal):
            # A peer that hangs up may be a probe that only tries the port; every other refusal wants somebody's
            # attention.
            level = self._log.info if told.failure.reason == "PEER_CLOSED" else self._log.warning
            level(
                "handshake.refused",
                reason=told.failure.reason,
                why=told.failure.explanation,
                peer=told.peer or "unknown",
                local=told.local or None,
                dialled=told.dialled,
                detail=told.detail,
            )
        elif told is not None:
            getattr(self._log, told.level)("grpc.core", source=told.source, message=told.text)

    def parse(self, line: str) -> Refusal | Remark | None:
        """Returns what the line completes, or None where it completes nothing worth telling."""
        arguments = _ARGUMENTS.search(line)
        record = _RECORD.fullmatch(line)
        if record is None:
            failed, self._failed = self._failed, None if arguments else self._failed
            return self._refusal(failed, arguments["arguments"]) if arguments and failed else None
        source, text = record["source"], record["text"]
        self._failed = None
        if source.endswith("handshaker.cc"):
            error = _HANDSHAKE.match(text)
            if error is None or error["error"] == "OK":
                return None
            if arguments:
                return self._refusal(error["error"], arguments["arguments"])
            self._failed = error["error"]
            return None
        if source.endswith(("channel_trace.h", "ssl_transport_security.cc")):
            return None  # the same once more, without the peer
        return Remark(_SEVERITIES[record["severity"]], source, text)

    def _refusal(self, error: str, arguments: str) -> Refusal | None:
        if "andshake" not in error and "verification check" not in error:
            return None  # the peer could not be reached at all: the call that wanted it says so
        peer, local = _PEER.search(arguments), _LOCAL.search(arguments)
        return Refusal(
            handshake_failure(error) or HandshakeFailure("HANDSHAKE_FAILED", "the TLS handshake failed"),
            peer=peer[1] if peer else "",
            local=local[1] if local else "",
            dialled=_DIALLED in arguments,
            detail=error,
        )
