"""What gRPC says when a connection fails, in words that name the likely cause and who should look where."""

from __future__ import annotations

# What grpcio 1.85 writes -> what it means. The first that occurs counts.
_CAUSES: tuple[tuple[str, str], ...] = (
    (
        "Hostname Verification Check failed",
        "whoever answers there has another identity than the one dialled: its certificate does not carry the pinned "
        "name. Is the address right, or does one service pose as another?",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED: certificate has expired",
        "its certificate has expired; issue it anew with `chorus certs issue`",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED: certificate is not yet valid",
        "its certificate is not valid yet; compare the clocks of both machines",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate was signed by another authority than ours; both sides need certificates of one "
        "`chorus certs init`",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "what answers there does not speak TLS; is this the port of a plaintext service?",
    ),
    (
        "NO_SHARED_CIPHER",
        "it does not speak TLS 1.3",
    ),
    ("PROTOCOL_VERSION", "it does not speak TLS 1.3"),
    (
        "Tls handshake failed",
        "the TLS handshake failed",
    ),
    ("Connection refused", "nothing listens there; is it running, and is the port right?"),
    ("No route to host", "there is no route to it; is it on this network, and does a firewall let the port through?"),
    ("Network is unreachable", "this machine has no network that leads there"),
    (
        "DNS resolution failed",
        "its name cannot be resolved",
    ),
    ("Domain name not found", "its name cannot be resolved"),
    (
        "Timeout occurred",
        "it does not answer; is the machine on, and does a firewall let the port through?",
    ),
    (
        "connection attempt timed out",
        "it does not answer; is the machine on, and does a firewall let the port through?",
    ),
)
_REFUSED_BY_PEER = (
    "it closed the connection while it was being made. Most likely it refused our certificate (another authority, "
    "expired, or none at all); its own log says which"
)
_BROKE = "the connection to it broke"


def explain_unreachable(details: str, peer: str = "") -> str:
    """Returns a sentence for people out of `details`, the text of an UNAVAILABLE status made by gRPC itself."""
    who = peer or "the peer"
    for text, cause in _CAUSES:
        if text in details:
            return f"cannot reach {who}: {cause} ({details})"
    if "failed to connect" in details:
        closed = any(text in details for text in ("Socket closed", "Connection reset", "Broken pipe", "FD Shutdown"))
        return f"cannot reach {who}: {_REFUSED_BY_PEER if closed else 'no connection'} ({details})"
    if not details:
        return f"{who} is unavailable"
    if any(
        text in details for text in ("Socket closed", "Connection reset", "Broken pipe", "GOAWAY", "keepalive", "ping")
    ):
        return f"cannot go on with {who}: {_BROKE} ({details})"
    return f"{who} is unavailable ({details})"
