"""The Job that makes a mesh's certificates in its cluster: the authority once, and a leaf for whoever lacks one.

Everything is kept in Secrets, which this Job's service account alone may read. Run again, it makes what has come to be
missing: leaves of new nodes, and those that have lived for two thirds of their time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from chorus.core.cluster.labels import RUNNER_LABEL
from chorus.core.errors import CertificateError, ConfigError, InvalidRequestError
from chorus.core.identity import Role, SpiffeId
from chorus.identity.ca import CA_KEY, CertificateAuthority, Leaf
from chorus.identity.policy import Policy
from chorus.k8s.cluster import Cluster, ConflictError
from chorus.k8s.leaves import LEAVES_SECRET, certificate_key, private_key
from chorus.k8s.secrets import Secrets
from chorus.transport.tls import (
    CA_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    check_chain,
    check_key,
    nodes_of,
    read_certificates,
    spiffe_id_of,
)

AUTHORITY_SECRET = "chorus-ca"  # noqa: S105 - a name
ADMIN_SECRET = "chorus-admin-tls"  # noqa: S105 - a name
_RENEWED_AT = 2 / 3


@dataclass(frozen=True, slots=True)
class Single:
    """A leaf with a Secret of its own. `service` is the Service that it is reached by, for tools that check that."""

    role: Role
    name: str
    secret: str
    service: str = ""


SINGLES = (
    Single(Role.REGISTRY, "registry", "chorus-registry-tls", "chorus-registry"),
    Single(Role.COORDINATOR, "coordinator", "chorus-coordinator-tls", "chorus-coordinator"),
    Single(Role.CLIENT, "cli", "chorus-client-tls"),
    Single(Role.ADMIN, "operator", "chorus-admin-tls"),
)


@dataclass(frozen=True, slots=True)
class Issued:
    """What one run did: identities, the runners of all labelled nodes, called as those are, and the names of nodes that
    can be no runner's."""

    made: tuple[str, ...]
    kept: tuple[str, ...]
    runners: tuple[str, ...]
    refused: tuple[str, ...]


class Issuer:
    """One run over one namespace. `now` is when; certificates are as `policy` says."""

    def __init__(self, cluster: Cluster, policy: Policy, *, trust_domain: str, now: datetime) -> None:
        self._cluster = cluster
        self._secrets = Secrets(cluster)
        self._policy = policy
        self._trust_domain = trust_domain
        self._now = now
        self._made: list[str] = []
        self._kept: list[str] = []

    def run(self, *, leaves: bool = True) -> Issued:
        """Makes what is missing; without `leaves` runners get theirs elsewhere.

        Raises UnavailableError where the API server can't be asked, CertificateError where the authority's Secret is
        damaged, ConfigError where it is of another mesh.
        """
        authority = self._authority()
        for single in SINGLES:
            self._single(authority, single)
        names, refused = self._runner_names()
        if leaves:
            self._leaves(authority, names)
        return Issued(tuple(self._made), tuple(self._kept), tuple(names), tuple(refused))

    def _authority(self) -> CertificateAuthority:
        stored = self._secrets.read(AUTHORITY_SECRET)
        if stored is None:
            with TemporaryDirectory() as scratch:
                made = CertificateAuthority.create(self._policy, now=self._now, trust_domain=self._trust_domain)
                made.write(Path(scratch), replace=True)
                data = {name: (Path(scratch) / name).read_bytes() for name in (CA_FILE, CA_KEY)}
            try:
                self._secrets.create(AUTHORITY_SECRET, data)
            except ConflictError:  # another run was faster, and its authority is the one
                stored = self._secrets.read(AUTHORITY_SECRET)
            else:
                self._made.append(f"the authority of {self._trust_domain}")
                return made
        return self._loaded(stored or {})

    def _loaded(self, data: Mapping[str, bytes]) -> CertificateAuthority:
        with TemporaryDirectory() as scratch:
            for name in (CA_FILE, CA_KEY):
                path = Path(scratch) / name
                path.touch(mode=0o600)
                path.write_bytes(data.get(name, b""))
            try:
                authority = CertificateAuthority.load(Path(scratch))
            except CertificateError as error:
                raise CertificateError(
                    f"the Secret {AUTHORITY_SECRET} is damaged ({error.message}); restore it from a backup, or delete "
                    "it and every other Secret chorus-*, after which all pods have to be restarted"
                ) from error
        if authority.trust_domain != self._trust_domain:
            raise ConfigError(
                f"the Secret {AUTHORITY_SECRET} is the authority of {authority.trust_domain}, and mesh.trust_domain "
                f"says {self._trust_domain}"
            )
        return authority

    def _single(self, authority: CertificateAuthority, single: Single) -> None:
        identity = SpiffeId(self._trust_domain, single.role, single.name)
        stored = self._secrets.read(single.secret)
        data = stored or {}
        if self._lasts(authority, identity, data.get(CERTIFICATE_FILE), data.get(KEY_FILE)):
            self._kept.append(str(identity))
            return
        leaf = self._issue(authority, identity, self._service_names(single.service))
        fresh = {CERTIFICATE_FILE: leaf.cert_pem, KEY_FILE: leaf.key_pem, CA_FILE: leaf.ca_pem}
        self._secrets.write(single.secret, fresh, exists=stored is not None)

    def _leaves(self, authority: CertificateAuthority, runners: Iterable[str]) -> None:
        """Those of a DaemonSet, each called as the node that it is on."""
        stored = self._secrets.read(LEAVES_SECRET)
        wanted: dict[str, bytes] = {CA_FILE: authority.believed_pem}
        for runner in runners:
            identity = SpiffeId(self._trust_domain, Role.RUNNER, runner)
            pair = [(stored or {}).get(key) for key in (certificate_key(runner), private_key(runner))]
            if self._lasts(authority, identity, pair[0], pair[1], runner):
                self._kept.append(str(identity))
                cert_pem, key_pem = pair
            else:
                leaf = self._issue(authority, identity, (), node=runner)
                cert_pem, key_pem = leaf.cert_pem, leaf.key_pem
            assert cert_pem is not None, "what lasts is there"
            assert key_pem is not None, "what lasts is there"
            wanted |= {certificate_key(runner): cert_pem, private_key(runner): key_pem}
        if wanted != stored:
            # Leaves of nodes that are gone go as well: a merge patch takes away what is set to null.
            gone = dict.fromkeys((stored or {}).keys() - wanted.keys())
            self._secrets.write(LEAVES_SECRET, {**gone, **wanted}, exists=stored is not None)

    def _runner_names(self) -> tuple[list[str], list[str]]:
        nodes = self._cluster.get("/api/v1/nodes", labelSelector=f"{RUNNER_LABEL}=true")
        names, refused = [], []
        for name in (node["metadata"]["name"] for node in nodes["items"]):
            try:
                SpiffeId(self._trust_domain, Role.RUNNER, name)
            except InvalidRequestError:
                refused.append(name)
            else:
                names.append(name)
        return names, refused

    def _issue(
        self, authority: CertificateAuthority, identity: SpiffeId, addresses: Sequence[str], node: str | None = None
    ) -> Leaf:
        leaf = authority.issue(identity, self._policy, now=self._now, addresses=addresses, node=node)
        self._made.append(str(identity))
        return leaf

    def _lasts(
        self,
        authority: CertificateAuthority,
        identity: SpiffeId,
        cert_pem: bytes | None,
        key_pem: bytes | None,
        node: str | None = None,
    ) -> bool:
        """Whether a leaf is that identity's, on that node, of this authority, and has over a third of its life left."""
        if cert_pem is None or key_pem is None:
            return False
        try:
            chain = read_certificates(cert_pem, CERTIFICATE_FILE)
            check_key(chain[0], key_pem)
            check_chain(chain, [authority.certificate])
            named = nodes_of(chain[0], identity.trust_domain)
            if spiffe_id_of(chain[0]) != identity or named != ({node} if node else frozenset()):
                return False
        except CertificateError:
            return False
        begin, end = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
        return self._now < begin + (end - begin) * _RENEWED_AT

    def _service_names(self, service: str) -> tuple[str, ...]:
        if not service:
            return ()
        namespace = self._cluster.namespace
        return (
            service,
            *(f"{service}.{namespace}{end}" for end in ("", ".svc", ".svc.cluster.local")),
            *("localhost", "127.0.0.1", "::1"),  # kubectl port-forward
        )
