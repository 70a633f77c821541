"""What gRPC's core writes, read; and standard error divided without losing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import CapturingLogger

from chorus.telemetry.corelog import CoreLogReader, Refusal, Remark, is_core_line
from chorus.telemetry.handshakes import handshake_failure

SERVICES = Path(__file__).parents[2] / "services"

# As grpcio 1.85.1 writes it.
ARGUMENTS = (
    "args={endpoint=0x7fe360001c30, args={grpc.experimental.event_engine=0x559ddbdf6840, "
    "grpc.internal.endpoint_local_address=ipv4:10.0.0.2:7101, grpc.internal.endpoint_peer_address=ipv4:10.0.0.9:56744, "
    "grpc.internal.server_credentials=0x55b030c09840}, read_buffer.Length()=0, exit_early=0}"
)
START = "I1121 07:36:03.713458   16192 handshaker.cc:155] CallNextHandshakerLocked: error="
EXPIRED = (
    "UNKNOWN: Ssl handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:"
    "OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has expired: OK"
)
RECORD = [
    "I1121 07:36:03.713439   16192 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
    + EXPIRED,
    START + EXPIRED,
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
        [f"{START}UNAVAILABLE: Handshake read failed (Socket closed) shutdown=false index=2, {ARGUMENTS}"]
    )
    assert isinstance(refusal, Refusal)
    assert refusal.failure.reason == "PEER_CLOSED"
    assert refusal.peer == "10.0.0.9:56744"


def test_our_own_dials_are_told_apart() -> None:
    dialled = ARGUMENTS.replace("grpc.internal.server_credentials=0x55b030c09840", "grpc.server_uri=dns:///x:1")
    error = "UNAUTHENTICATED: Custom verification check failed with error: Hostname Verification Check failed."
    [refusal] = parse([f"{START}{error}", f" shutdown=false index=4, {dialled}"])
    assert isinstance(refusal, Refusal)
    assert refusal.dialled
    assert refusal.failure.reason == "WRONG_SERVER"


def test_what_is_no_refusal_is_not_told_as_one() -> None:
    assert parse([f"{START}OK shutdown=false index=1, {ARGUMENTS}"]) == []
    unreachable = "UNKNOWN: Failed to connect to remote host: Connection refused"
    assert parse([f"{START}{unreachable}", f" shutdown=false index=1, {ARGUMENTS}"]) == []
    # An interrupted record does not lend its error to the next.
    assert (
        parse([START + EXPIRED, f"{START}OK shutdown=false index=1, {ARGUMENTS}", f" shutdown=x index=1, {ARGUMENTS}"])
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


def test_lines_of_the_core_are_told_from_others() -> None:
    previous = False
    for line in RECORD:
        previous = is_core_line(line.encode(), previous)
        assert previous, line
    for line in (
        b"llama_model_loader: loaded meta data",
        b"GGML_ASSERT(n_tokens <= n_batch) failed",
        b"F1121 07:36:03.713439   16192 init.cc:1] Check failed",  # fatal: last words
        b"Traceback (most recent call last):",
        b"src/llama.cpp:68: oops",
    ):
        assert not is_core_line(line, previous), line
    assert not is_core_line(b"", False)
    assert not is_core_line(b" shutdown=false", False)


@given(st.lists(st.text(max_size=60) | st.sampled_from(RECORD)))
def test_no_line_is_too_strange(lines: list[str]) -> None:
    for told in parse(lines):
        assert isinstance(told, Refusal | Remark)


PROGRAM = """
import ctypes, os, sys
from chorus.telemetry.native_stderr import divide_stderr
divided = divide_stderr(lambda line, previous: line.startswith(b"core "))
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
