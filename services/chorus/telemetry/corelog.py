"""What gRPC's core writes about itself, as events of our log: above all, whom TLS refused and why.

The core tells of a failed handshake on file descriptor 2 alone, and of the peer only while its `handshaker` trace is
on. So a service's main calls `prepare_core()` before anything imports grpc, which reads its environment once, at
import, and `capture_core_log()` once its logging is set up. Without the first the second still tells of refusals, but
not of whom.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import MutableMapping
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
_START = re.compile(rb"[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w./-]+:\d+\] ")
# A status is written with the places that it came from, which spreads its record over several lines.
_CONTINUATION = re.compile(rb"=== Source Location Trace.*|src/core/\S+:\d+\s*|\s*shutdown=.*|")
_RECORD = re.compile(r"(?P<severity>[IWE])\d{4} [\d:.]+ +\d+ (?P<source>[\w./-]+):\d+\] (?P<text>.*)", re.DOTALL)
_HANDSHAKE = re.compile(r"CallNextHandshakerLocked: error=(?P<error>.*?)(?:\n| shutdown=|$)")
_ARGUMENTS = re.compile(r"\s*shutdown=\w+ index=\d+, args=\{endpoint=\S+, args=\{(?P<arguments>.*)")
_PEER = re.compile(r"grpc\.internal\.endpoint_peer_address=(?:ipv[46]:)?([^,}]+)")
_LOCAL = re.compile(r"grpc\.internal\.endpoint_local_address=(?:ipv[46]:)?([^,}]+)")
_DIALLED = "grpc.server_uri="  # among the arguments of our own dials only
_SEVERITIES = {"I": "debug", "W": "warning", "E": "error"}


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


def prepare_core(environ: MutableMapping[str, str] | None = None) -> bool:
    """Sets what the core reads from the environment; returns whether that is in time: grpc is not imported yet.

    It turns TLS 1.2 off for all of this process's gRPC, and makes the core tell whom a handshake failed with. What is
    set already stays. For service processes, not for libraries: it holds for every user of grpc in the process, and the
    trace fills standard error unless `capture_core_log` takes it. Given another mapping, it prepares that one, for a
    process to be started.
    """
    target = os.environ if environ is None else environ
    traces = [name for name in target.get(_TRACE, "").split(",") if name]
    if _HANDSHAKER not in traces:
        target[_TRACE] = ",".join([*traces, _HANDSHAKER])
    target.setdefault(_CIPHERS, _NO_TLS_1_2)
    return "grpc._cython.cygrpc" not in sys.modules


def capture_core_log(*, traced: bool | None = None) -> NativeStderr | None:
    """Turns what the core writes into events, until `close()` or the end of the process. Call it once, early.

    `traced` says whether the core will tell of peers, because `prepare_core()` came in time; by default the environment
    is believed. Events: `handshake.refused` (reason, why, peer, local, dialled), `grpc.core` for the rest. What other
    native code writes goes to standard error as before. Returns None where descriptor 2 cannot be divided (Windows).
    """
    if traced is None:
        traced = _HANDSHAKER in os.environ.get(_TRACE, "").split(",")
    divided = divide_stderr(is_core_line)
    if divided is None:
        return None
    divided.read_lines(CoreLogReader(get_logger(), traced=traced).feed)
    atexit.register(divided.close)
    return divided


def is_core_line(line: bytes, previous: bool) -> bool:
    """Whether a line of standard error is the core's; `previous` tells whether the one before it was."""
    return _START.match(line) is not None or (previous and _CONTINUATION.fullmatch(line) is not None)


class CoreLogReader:
    """Puts lines together to records, and logs what they tell."""

    def __init__(self, log: FilteringBoundLogger, *, traced: bool) -> None:
        self._log = log
        self._traced = traced
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
        if source.endswith("channel_trace.h"):
            return None
        if source.endswith("ssl_transport_security.cc"):
            failure = handshake_failure(text)
            if self._traced or failure is None:
                return None  # the trace tells the same once more, with the peer
            return Refusal(failure, detail=text)
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
