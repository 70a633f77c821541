"""What gRPC's core writes, read; and standard error divided without losing anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import CapturingLogger

from chorus.telemetry.corelog import CONTINUATION, START, CoreLogReader, Refusal, Remark
from chorus.telemetry.handshakes import handshake_failure
from chorus.telemetry.stderr_divider import Divider

SERVICES = Path(__file__).parents[2] / "services"

# As grpcio 1.85.1 writes it.
ARGUMENTS = (
    "args={endpoint=0x7fe360001c30, args={grpc.experimental.event_engine=0x559ddbdf6840, "
    "grpc.internal.endpoint_local_address=ipv4:10.0.0.2:7101, grpc.internal.endpoint_peer_address=ipv4:10.0.0.9:56744, "
    "grpc.internal.server_credentials=0x55b030c09840}, read_buffer.Length()=0, exit_early=0}"
)
FIRST = "I1121 07:36:03.713458   16192 handshaker.cc:155] CallNextHandshakerLocked: error="
EXPIRED = (
    "UNKNOWN: Ssl handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:"
    "OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has expired: OK"
)
RECORD = [
    "I1121 07:36:03.713439   16192 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
    + EXPIRED,
    FIRST + EXPIRED,
    "=== Source Location Trace: === ",
    "src/core/util/status_helper.cc:68",
    f" shutdown=false index=2, {ARGUMENTS}",
    f"I1121 07:36:03.713468   16192 channel_trace.h:396] handshake manager 0x7fe3: Failed with error: {EXPIRED}",
    "=== Source Location Trace: === ",
    "src/core/util/status_helper.cc:68",
    "",
]


def parse(lines: list[str]) -> list[Refusal | Remark]:
    reader = CoreLogReader(CapturingLogger())  # type: ignore[arg-type]
    return [told for line in lines if (told := reader.parse(line)) is not None]


def test_a_refusal_is_told_once_with_its_peer() -> None:
    [refusal] = parse(RECORD)
    assert isinstance(refusal, Refusal)
    assert refusal.failure.reason == "CERTIFICATE_EXPIRED"
    assert (refusal.peer, refusal.local, refusal.dialled) == ("10.0.0.9:56744", "10.0.0.2:7101", False)


def test_a_record_on_one_line_is_told_too() -> None:
    [refusal] = parse(
        [f"{FIRST}UNAVAILABLE: Handshake read failed (Socket closed) shutdown=false index=2, {ARGUMENTS}"]
    )
    assert isinstance(refusal, Refusal)
    assert refusal.failure.reason == "PEER_CLOSED"
    assert refusal.peer == "10.0.0.9:56744"


def test_our_own_dials_are_told_apart() -> None:
    dialled = ARGUMENTS.replace("grpc.internal.server_credentials=0x55b030c09840", "grpc.server_uri=dns:///x:1")
    error = "UNAUTHENTICATED: Custom verification check failed with error: Hostname Verification Check failed."
    [refusal] = parse([f"{FIRST}{error}", f" shutdown=false index=4, {dialled}"])
    assert isinstance(refusal, Refusal)
    assert refusal.dialled
    assert refusal.failure.reason == "WRONG_SERVER"


def test_what_is_no_refusal_is_not_told_as_one() -> None:
    assert parse([f"{FIRST}OK shutdown=false index=1, {ARGUMENTS}"]) == []
    unreachable = "UNKNOWN: Failed to connect to remote host: Connection refused"
    assert parse([f"{FIRST}{unreachable}", f" shutdown=false index=1, {ARGUMENTS}"]) == []
    # An interrupted record does not lend its error to the next.
    assert (
        parse([FIRST + EXPIRED, f"{FIRST}OK shutdown=false index=1, {ARGUMENTS}", f" shutdown=x index=1, {ARGUMENTS}"])
        == []
    )


def test_the_rest_keeps_its_severity() -> None:
    [remark] = parse(["E1121 08:04:17.060414    2680 add_port.cc:83] Failed to add port to server"])
    assert remark == Remark("error", "add_port.cc", "Failed to add port to server")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "UNKNOWN_AUTHORITY"),
        ("CERTIFICATE_VERIFY_FAILED: self signed certificate", "UNKNOWN_AUTHORITY"),
        ("CERTIFICATE_VERIFY_FAILED: certificate has expired", "CERTIFICATE_EXPIRED"),
        ("CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", "CERTIFICATE_NOT_YET_VALID"),
        ("CERTIFICATE_VERIFY_FAILED: unsupported certificate purpose", "WRONG_PURPOSE"),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid certificate verification context", "NO_CERTIFICATE"),
        ("WRONG_VERSION_NUMBER: Invalid certificate verification context", "PLAINTEXT"),
        ("HTTP_REQUEST: Invalid certificate verification context", "PLAINTEXT"),
        ("NO_SHARED_CIPHER: Invalid certificate verification context", "OLD_TLS"),
        ("TLSV1_ALERT_UNKNOWN_CA", "REFUSED_BY_PEER"),
        ("Handshake read failed (Socket closed)", "PEER_CLOSED"),
        ("Ssl handshake failed: something new", "HANDSHAKE_FAILED"),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    failure = handshake_failure(text)
    assert failure is not None
    assert failure.reason == reason


OTHERS = [
    "llama_model_loader: loaded meta data",
    "GGML_ASSERT(n_tokens <= n_batch) failed",
    "F1121 07:36:03.713439   16192 init.cc:1] Check failed",  # fatal: last words
    "Traceback (most recent call last):",
    "src/llama.cpp:68: oops",
    "",
]


def divided(chunks: list[bytes]) -> tuple[bytes, bytes]:
    """Returns what a divider that is fed these chunks hands over, and what it passes on."""
    with open_pipe() as wanted, open_pipe() as rest:
        divider = Divider(wanted[1], rest[1], re.compile(START.encode()), re.compile(CONTINUATION.encode()))
        for chunk in chunks:
            divider.feed(chunk)
        divider.end()
        return os.read(wanted[0], 1 << 20), os.read(rest[0], 1 << 20)


@contextmanager
def open_pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    # A byte that is read back with the rest, so that an empty pipe is not an error.
    os.write(ends[1], b"|")
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def test_lines_of_the_core_are_told_from_others() -> None:
    lines = [*OTHERS, *RECORD, *OTHERS[:-1], RECORD[0]]
    wanted, rest = divided([("\n".join(lines) + "\n").encode()])
    assert wanted[1:].decode().splitlines() == [*RECORD, RECORD[0]]
    assert rest[1:].decode().splitlines() == [*OTHERS, *OTHERS[:-1]]


@given(st.lists(st.binary(max_size=50)))
def test_what_is_nobodys_log_passes_unchanged(chunks: list[bytes]) -> None:
    assert divided(chunks) == (b"|", b"|" + b"".join(chunks))


def test_half_a_line_does_not_wait_for_its_end() -> None:
    with open_pipe() as wanted, open_pipe() as rest:
        divider = Divider(wanted[1], rest[1], re.compile(START.encode()), re.compile(CONTINUATION.encode()))
        divider.feed(b"10%")
        assert os.read(rest[0], 100) == b"|10%"
        divider.feed(RECORD[0].encode())
        divider.feed(b" and the rest of it\n")
        assert os.read(wanted[0], 1000) == f"|{RECORD[0]} and the rest of it\n".encode()


@given(st.lists(st.text(max_size=60) | st.sampled_from(RECORD)))
def test_no_line_is_too_strange(lines: list[str]) -> None:
    for told in parse(lines):
        assert isinstance(told, Refusal | Remark)


PROGRAM = """
import ctypes, os, sys
from chorus.telemetry.native_stderr import divide_stderr
divided = divide_stderr("core ", "never")
wanted = []
divided.read_lines(wanted.append)
libc = ctypes.CDLL(None)
{body}
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        env={"PYTHONPATH": str(SERVICES), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_wanted_lines_are_handed_over_and_all_others_pass() -> None:
    done = run(
        """
for number in range(20000):
    os.write(2, b"core %d\\n" % number if number % 2 else b"other %d\\n" % number)
    if number % 100 == 0: print("python", number, file=sys.stderr)
os.write(2, b"a progress bar 10%")
divided.close()
os.write(2, b" closed\\n")
import json; print(json.dumps(len(wanted)), wanted[0], wanted[-1])
"""
    )
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("other")] == [f"other {n}" for n in range(0, 20000, 2)]
    assert [line for line in lines if line.startswith("python")] == [f"python {n}" for n in range(0, 20000, 100)]
    assert lines[-1].endswith("a progress bar 10% closed")
    # The core's lines may be dropped while nobody has time for them, but are never torn.
    count, *rest = done.stdout.split()
    assert rest[:2] == ["core", "1"]
    assert 0 < json.loads(count) <= 10000
    assert done.returncode == 0


def test_the_last_words_of_a_crash_are_heard() -> None:
    done = run('os.write(2, b"core first\\nGGML_ASSERT failed: " + b"x" * 100000 + b"\\n"); libc.abort()')
    assert done.returncode < 0
    assert "GGML_ASSERT failed: " + "x" * 100000 + "\n" in done.stderr


def test_a_traceback_is_heard() -> None:
    done = run('raise ValueError("heard")')
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: heard")


def test_closing_twice_is_no_error() -> None:
    done = run('os.write(2, b"x\\n"); divided.close(); divided.close(); print("done")')
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "x\n")
