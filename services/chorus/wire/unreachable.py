"""What gRPC says when a connection fails, in words that name the likely cause and who should look where."""

from __future__ import annotations

from chorus.telemetry.handshakes import handshake_failure

# What grpcio 1.85 writes -> what it means. The first that occurs counts.
_CAUSES: tuple[tuple[str, str], ...] = (
    ("Connection refused", "nothing listens there; is it running, and is the port right?"),
    ("No route to host", "there is no route to it; is it on this network, and does a firewall let the port through?"),
    ("Cancelling all calls", "it was stopped while the call ran"),
    ("Network is unreachable", "this machine has no network that leads there"),
    ("DNS resolution failed", "its name cannot be resolved"),
    ("Domain name not found", "its name cannot be resolved"),
    ("imeout occurred", "it does not answer; is the machine on, and does a firewall let the port through?"),
    ("timed out", "it does not answer; is the machine on, and does a firewall let the port through?"),
)
_BREAKS = ("Socket closed", "Connection reset", "Broken pipe", "FD Shutdown", "GOAWAY", "keepalive", "ping timeout")
_REFUSED_BY_PEER = (
    "it closed the connection while it was being made. Most likely it refused our certificate (another authority, "
    "expired, or none at all); its own log says which"
)


def explain_unreachable(details: str, peer: str = "") -> str:
    """Returns a sentence for people out of `details`, the text of an UNAVAILABLE status made by gRPC itself."""
    who = peer or "the peer"
    connecting = "failed to connect" in details
    details = details.removeprefix("failed to connect to all addresses; last error: ").removeprefix("UNKNOWN: ")
    failure = handshake_failure(details)
    if failure is not None:
        return f"cannot reach {who}: {failure.explanation} ({details})"
    for text, cause in _CAUSES:
        if text in details:
            return f"cannot reach {who}: {cause} ({details})"
    if any(text in details for text in _BREAKS):
        if connecting:
            return f"cannot reach {who}: {_REFUSED_BY_PEER} ({details})"
        return f"the connection to {who} broke ({details})"
    if connecting:
        return f"cannot reach {who} ({details})"
    return f"{who} is unavailable ({details})" if details else f"{who} is unavailable"
