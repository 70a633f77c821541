"""The certificates of a mesh as Kubernetes Secrets: how they are laid out, and how a runner's pod gets its own."""

from __future__ import annotations

from pathlib import Path

from chorus.core.errors import CertificateError
from chorus.transport.files import CERTIFICATE_MODE, KEY_MODE, make_directory, write_new
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, read_file

LEAVES_SECRET = "chorus-runner-leaves"  # noqa: S105 - a name
"""Holds every runner's leaf: a DaemonSet's pods have one template, which can't name a Secret for each node."""


def certificate_key(runner: str) -> str:
    """The key of a runner's certificate in the Secret of all leaves."""
    return f"{runner}.crt"


def private_key(runner: str) -> str:
    """The key of its private key there."""
    return f"{runner}.key"


def take_leaf(runner: str, source: Path, target: Path) -> None:
    """Copies one runner's leaf from the mounted Secret to `target`, as a service reads it.

    Raises CertificateError, with what to do, where there is none for it.
    """
    if not (source / certificate_key(runner)).exists():
        known = sorted(path.stem for path in source.glob("*.key"))
        raise CertificateError(
            f"there is no certificate for the runner {runner!r} in the Secret {LEAVES_SECRET} "
            f"(it has {', '.join(known) or 'none'}); the CronJob chorus-issue makes those of every node that is "
            "labelled chorus.mesh/runner=true: kubectl -n chorus create job --from=cronjob/chorus-issue issue-now"
        )
    make_directory(target)
    # The key last: a service that finds it finds the others.
    for name, key, mode in (
        (CA_FILE, CA_FILE, CERTIFICATE_MODE),
        (CERTIFICATE_FILE, certificate_key(runner), CERTIFICATE_MODE),
        (KEY_FILE, private_key(runner), KEY_MODE),
    ):
        write_new(target / name, read_file(source / key), mode, replace=True)
