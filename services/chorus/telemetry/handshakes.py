"""Why a TLS handshake failed, out of what gRPC and BoringSSL write about it, in words for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HandshakeFailure:
    """`reason` is for programs. `explanation` is a clause about the peer, to come after "refused 10.0.0.7: "."""

    reason: str
    explanation: str


def _failure(reason: str, explanation: str, *texts: str) -> tuple[tuple[str, ...], HandshakeFailure]:
    return texts, HandshakeFailure(reason, explanation)


# What grpcio 1.85 writes. The first that occurs counts, so the more special come first.
_FAILURES = (
    _failure(
        "WRONG_SERVER",
        "whoever answers there has another identity than the one dialled: its certificate lacks the pinned name. "
        "Is the address right, or does one service pose as another?",
        "Hostname Verification Check failed",
    ),
    _failure(
        "CERTIFICATE_EXPIRED",
        "its certificate has expired; issue it anew with `chorus certs issue --force`",
        "certificate has expired",
    ),
    _failure(
        "CERTIFICATE_NOT_YET_VALID",
        "its certificate is not valid yet; compare the clocks of both machines",
        "certificate is not yet valid",
    ),
    _failure(
        "WRONG_PURPOSE",
        "its certificate is not made for this side of a connection; clients and admins cannot serve",
        "unsupported certificate purpose",
        "unsuitable certificate purpose",
    ),
    _failure(
        "UNKNOWN_AUTHORITY",
        "its certificate was signed by another authority; both sides need certificates of one `chorus certs init`",
        "CERTIFICATE_VERIFY_FAILED",
    ),
    _failure("NO_CERTIFICATE", "it showed no certificate", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
    _failure(
        "PLAINTEXT",
        "it does not speak TLS; is this the port meant, and are both sides of one mind about TLS?",
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
    ),
    _failure(
        "OLD_TLS", "it does not speak TLS 1.3", "NO_SHARED_CIPHER", "UNSUPPORTED_PROTOCOL", "ALERT_PROTOCOL_VERSION"
    ),
    _failure(
        "REFUSED_BY_PEER",
        "it refused our certificate (another authority, expired, or none at all); its own log says which",
        "_ALERT_",
    ),
    _failure(
        "PEER_CLOSED",
        "it closed the connection during the handshake: it may not trust our certificate, or only looked whether "
        "somebody listens",
        "Handshake read failed",
        "Handshake write failed",
    ),
)


def handshake_failure(text: str) -> HandshakeFailure | None:
    """Returns what `text` says of a failed handshake, or None where it says nothing of one."""
    for texts, failure in _FAILURES:
        if any(part in text for part in texts):
            return failure
    if "andshake failed" in text or "Handshake" in text:
        return HandshakeFailure("HANDSHAKE_FAILED", "the TLS handshake failed")
    return None
