"""The authority's files while another one takes over: each step can be taken again after a crash in its middle.

ca.crt            who is believed, both while there are two
ca.key            the key that signs
ca.next.key       while the new authority spreads: its key
ca.previous.key   while both are believed and the new one signs: the old one's key
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from chorus.core.errors import CertificateError
from chorus.identity.ca import CA_KEY, CertificateAuthority
from chorus.identity.policy import Policy
from chorus.transport.files import CERTIFICATE_MODE, KEY_MODE, write_new
from chorus.transport.tls import CA_FILE

NEXT_KEY, PREVIOUS_KEY = "ca.next.key", "ca.previous.key"


def announce(directory: Path, authority: CertificateAuthority, policy: Policy, now: datetime) -> None:
    """Makes the next authority, and has it believed beside `authority`. Raises CertificateError."""
    if _other(directory, NEXT_KEY) is not None:
        return
    following = CertificateAuthority.create(policy, now=now, trust_domain=authority.trust_domain)
    write_new(directory / NEXT_KEY, following.key_pem, KEY_MODE, replace=True)
    both = authority.certificate_pem + following.certificate_pem
    write_new(directory / CA_FILE, both, CERTIFICATE_MODE, replace=True)


def switch(directory: Path) -> None:
    """Has the next authority sign from now on. Raises CertificateError."""
    if not (directory / NEXT_KEY).exists() and (directory / PREVIOUS_KEY).exists():
        return
    current, following = CertificateAuthority.load(directory), CertificateAuthority.load(directory, NEXT_KEY)
    write_new(directory / CA_FILE, following.believed_pem, CERTIFICATE_MODE, replace=True)
    if current.certificate != following.certificate:
        write_new(directory / PREVIOUS_KEY, current.key_pem, KEY_MODE, replace=True)
        write_new(directory / CA_KEY, following.key_pem, KEY_MODE, replace=True)
    _take_away(directory / NEXT_KEY)


def retire(directory: Path) -> None:
    """Forgets the old authority. Raises CertificateError."""
    current = CertificateAuthority.load(directory)
    write_new(directory / CA_FILE, current.certificate_pem, CERTIFICATE_MODE, replace=True)
    _take_away(directory / PREVIOUS_KEY)


def previous(directory: Path) -> CertificateAuthority | None:
    """The authority that another one has taken over from, while it is still believed."""
    return _other(directory, PREVIOUS_KEY)


def _other(directory: Path, key_name: str) -> CertificateAuthority | None:
    """One that goes or comes; None where there is no such key, or nobody believes it (any more, or yet)."""
    if not (directory / key_name).exists():
        return None
    try:
        return CertificateAuthority.load(directory, key_name)
    except CertificateError:
        return None


def _take_away(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CertificateError(f"cannot remove {path}: {error.strerror or error}") from error
