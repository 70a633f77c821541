"""What is in a folder of certificates, and what is wrong with it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from chorus.core.errors import CertificateError
from chorus.core.identity import SpiffeId
from chorus.identity.ca import CA_KEY
from chorus.transport.tls import (
    CA_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    authority_trust_domain,
    check_chain,
    check_key,
    date_problem,
    open_to_all,
    read_certificates,
    read_file,
    spiffe_id_of,
)

T = TypeVar("T")
_LEAF_FILES = (CERTIFICATE_FILE, KEY_FILE)
_RENEW = "issue it anew with `chorus certs issue --force`"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong. An error keeps the certificate from working; a warning does not yet."""

    text: str
    is_error: bool = True


@dataclass(slots=True)
class Report:
    """One certificate and its key. Times are UTC; `names` are the DNS names and IP addresses of a leaf."""

    path: Path
    is_authority: bool
    subject: str = ""
    identity: str = ""
    names: tuple[str, ...] = ()
    not_before: datetime | None = None
    not_after: datetime | None = None
    fingerprint: str = ""
    key_mode: str | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether nothing keeps it from working."""
        return not any(problem.is_error for problem in self.problems)

    def remaining(self, now: datetime) -> timedelta | None:
        """How long it still lives; negative once expired, None where it cannot be read."""
        return None if self.not_after is None else self.not_after - now


def find(directory: Path) -> list[Path]:
    """Returns the certificates in `directory` and right below it, the authority first, leaves by name.

    Raises CertificateError where there is no such directory, or nothing in it.
    """
    if not directory.is_dir():
        raise CertificateError(f"there is no folder {directory}; `chorus certs init` and `chorus certs issue` make it")
    own = [directory / name for name in (CA_FILE, CERTIFICATE_FILE) if (directory / name).exists()]
    if (directory / CERTIFICATE_FILE).exists():
        return own[-1:]  # a leaf's own folder, whose ca.crt is a copy
    leaves = sorted(
        path / CERTIFICATE_FILE
        for path in directory.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any((path / f).exists() for f in _LEAF_FILES)
    )
    if not own and not leaves:
        raise CertificateError(f"there are no certificates in {directory}; `chorus certs init` makes them")
    return own + leaves


def inspect(path: Path, *, now: datetime, warn: timedelta) -> Report:
    """Reads the certificate at `path` (a `ca.crt` or a `tls.crt`) with what belongs to it; never raises."""
    report = Report(path, is_authority=path.name == CA_FILE)
    chain = _attempt(report, lambda: read_certificates(read_file(path), path.name))
    key_path = path.with_name(CA_KEY if report.is_authority else KEY_FILE)
    _look_at_key(report, key_path, chain[0] if chain else None)
    if not chain:
        return report
    leaf = chain[0]
    _describe(report, leaf)
    if problem := date_problem(leaf, now):
        report.problems.append(Problem(f"it {problem}"))
    elif leaf.not_valid_after_utc - now < warn:
        left = max(1, (leaf.not_valid_after_utc - now).days)
        report.problems.append(Problem(f"it expires within {left} days; {_RENEW}", is_error=False))
    if report.is_authority:
        _look_at_authority(report, leaf)
    else:
        _look_at_leaf(report, chain)
    return report


def _describe(report: Report, certificate: x509.Certificate) -> None:
    report.subject = certificate.subject.rfc4514_string()
    report.not_before, report.not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    report.fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return
    report.names = (
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    )


def _look_at_key(report: Report, path: Path, certificate: x509.Certificate | None) -> None:
    if not path.exists():
        # Machines other than the one that signs have the authority's certificate alone.
        if not report.is_authority:
            report.problems.append(Problem(f"{path.name} is missing; copy it from where it was issued, or {_RENEW}"))
        return
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        report.problems.append(Problem(f"{path.name} cannot be looked at: {error.strerror}"))
        return
    report.key_mode = f"{mode:04o}"
    if open_to_all(path):
        report.problems.append(Problem(f"{path.name} is open to every user of this machine; run `chmod 600 {path}`"))
    elif mode & (stat.S_IRGRP | stat.S_IWGRP):
        report.problems.append(
            Problem(f"{path.name} is open to its group; `chmod 600 {path}` unless that is meant", is_error=False)
        )
    if certificate is not None:
        _attempt(report, lambda: check_key(certificate, read_file(path)))


def _look_at_authority(report: Report, certificate: x509.Certificate) -> None:
    domain = _attempt(report, lambda: authority_trust_domain(certificate))
    if domain:
        report.identity = f"spiffe://{domain}"
    _attempt(report, lambda: check_chain([certificate], [certificate]))


def _look_at_leaf(report: Report, chain: Sequence[x509.Certificate]) -> None:
    leaf, directory = chain[0], report.path.parent
    identity = _attempt(report, lambda: spiffe_id_of(leaf))
    authorities = _attempt(report, lambda: read_certificates(read_file(directory / CA_FILE), CA_FILE))
    if authorities:
        _attempt(report, lambda: check_chain(chain, authorities))
        _look_at_parent(report, authorities)
    if identity is not None:
        report.identity = str(identity)
        _look_at_names(report, identity)
        _look_at_purposes(report, identity, leaf)


def _look_at_parent(report: Report, authorities: Sequence[x509.Certificate]) -> None:
    """A leaf's folder in the authority's: was it issued by the authority that is there now?"""
    try:
        current = read_certificates((report.path.parent.parent / CA_FILE).read_bytes(), CA_FILE)
    except (OSError, CertificateError):
        return
    if not any(certificate in authorities for certificate in current):
        report.problems.append(Problem(f"it is of an authority that was replaced since; {_RENEW}"))


def _look_at_names(report: Report, identity: SpiffeId) -> None:
    if identity.dns_name not in report.names:
        report.problems.append(Problem(f"it lacks the name that is dialled, {identity.dns_name}; {_RENEW}"))
    folder = report.path.parent.name
    if report.path.parent.parent.joinpath(CA_FILE).exists() and folder != f"{identity.role}-{identity.name}":
        report.problems.append(Problem(f"the folder {folder} holds the certificate of {identity}; was it misplaced?"))


def _look_at_purposes(report: Report, identity: SpiffeId, certificate: x509.Certificate) -> None:
    try:
        purposes = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, ValueError):
        purposes = set()
    if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        report.problems.append(Problem(f"it may not be shown by a caller (extended key usage); {_RENEW}"))
    if identity.role.serves and ExtendedKeyUsageOID.SERVER_AUTH not in purposes:
        report.problems.append(Problem(f"it may not be shown by a server (extended key usage); {_RENEW}"))


def _attempt(report: Report, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except CertificateError as error:
        report.problems.append(Problem(error.message))
        return None
