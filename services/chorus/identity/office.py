"""The authority at work: it admits, renews and shuts out as the ledger says, and signs what is to be signed."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from chorus.core.audit import DeedKind, Fact, Trail
from chorus.core.errors import CertificateError, InvalidRequestError, RenewalError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.ledger import JoinToken, Ledger
from chorus.core.identity.revocations import Revocation
from chorus.core.identity.rotation import Phase, Rotation, is_due, waits_for
from chorus.core.identity.spiffe import check_label, node_in
from chorus.identity import succession
from chorus.identity.ca import CertificateAuthority, Leaf
from chorus.identity.ledger_file import read_ledger, write_ledger
from chorus.identity.policy import Policy
from chorus.telemetry.logs import get_logger
from chorus.transport.tls import CA_FILE, check_chain, nodes_of, read_certificates, read_file, spiffe_id_of

SECRET_BYTES = 32
_TTL_MAX_S = 30 * 86_400.0
_ADDRESSES_MAX = 16
_WHY_MAX = 200
_CURVES = (ec.SECP256R1, ec.SECP384R1)

_log = get_logger()


class Office:
    """One authority with its ledger. `wall` is seconds since 1970. Used from one event loop."""

    def __init__(
        self,
        directory: Path,
        ledger_file: Path,
        policy: Policy,
        *,
        lifetime: timedelta,
        wall: Callable[[], float],
        trail: Trail,
    ) -> None:
        """Raises CertificateError where there is no authority in `directory`, ConfigError for a damaged ledger."""
        self._directory = directory
        self._file = ledger_file
        self._policy = policy
        self._lifetime = lifetime
        self._wall = wall
        self._trail = trail
        self.authority = CertificateAuthority.load(directory)
        self.shown_authority = succession.previous(directory) or self.authority
        self.ledger: Ledger = read_ledger(ledger_file)
        self._listeners: list[Callable[[], None]] = []

    @property
    def now(self) -> float:
        """The time, by which everything is decided."""
        return self._wall()

    @property
    def authorities_pem(self) -> bytes:
        """Whom the members of the mesh are to believe; read anew, since one authority may be taking over."""
        return read_file(self._directory / CA_FILE)

    @property
    def authority_sha256(self) -> bytes:
        """By which a machine that joins knows the authority that this service itself shows."""
        return self.shown_authority.certificate.fingerprint(hashes.SHA256())

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever somebody was shut out, or let in again, or an authority took over."""
        self._listeners.append(listener)

    def own_leaf(self, name: str) -> Leaf:
        """A certificate of this service itself: of the old authority while another takes over, for who was away knows
        no other, and this is where he renews."""
        identity = SpiffeId(self.authority.trust_domain, Role.IDENTITY, name)
        return self.shown_authority.issue(
            identity,
            self._policy,
            now=self._moment(),
            addresses=("localhost", "127.0.0.1", "::1"),
            lifetime=self._lifetime,
        )

    # --- for machines -----------------------------------------------------------------------------------------------

    def join(
        self, token_id: str, secret: bytes, request: bytes, *, name: str, addresses: Sequence[str], node: str = ""
    ) -> tuple[SpiffeId, x509.Certificate]:
        """Redeems a token. `node` is the machine's id, for its runner. Raises as `Ledger.redeem`,
        InvalidRequestError."""
        public_key, key = _requested(request)
        if name:
            check_label("name", name)
        if node:
            check_label("node_id", node)
        _check_addresses(addresses)
        digest = hashlib.sha256(secret).digest()
        identity = self.ledger.redeem(
            token_id, digest, key=key, name=name, trust_domain=self.authority.trust_domain, now=self.now, node=node
        )
        certificate = self._certify(identity, public_key, key, addresses, node)
        serial = f"{certificate.serial_number:x}"
        _log.info("member.joined", identity=str(identity), token_id=token_id, serial=serial)
        self._noted(DeedKind.TOKEN_USED, by=str(identity), target=token_id)
        self._noted(DeedKind.MEMBER_JOINED, by=str(identity), target=str(identity), serial=serial)
        self._tell()  # it may have taken somebody's place
        return identity, certificate

    def renew(
        self, shown: bytes, request: bytes, *, addresses: Sequence[str], node: str = ""
    ) -> tuple[SpiffeId, x509.Certificate]:
        """Gives the holder of a certificate's key another; `node` is for one that names no node yet.

        Raises InvalidRequestError, as `Ledger.check_renewal`.
        """
        try:
            old = x509.load_der_x509_certificate(shown)
            identity = spiffe_id_of(old)
            check_chain([old], read_certificates(self.authorities_pem, CA_FILE))
        except ValueError:
            raise InvalidRequestError("certificate", "is no certificate in DER") from None
        except CertificateError as error:
            raise RenewalError(f"the certificate is not of this mesh: {error.message}") from None
        public_key, key = _requested(request)
        if public_key != old.public_key():
            raise InvalidRequestError("certificate_request", "must be signed with the key of the certificate")
        _check_addresses(addresses)
        self.ledger.check_renewal(
            identity, key=key, serial=old.serial_number, not_after=old.not_valid_after_utc.timestamp(), now=self.now
        )
        own = self._node_at_renewal(old, identity, node)
        certificate = self._certify(identity, public_key, key, addresses or _addresses_of(old, identity), own)
        serial = f"{certificate.serial_number:x}"
        _log.info("member.renewed", identity=str(identity), serial=serial)
        self._noted(DeedKind.MEMBER_RENEWED, by=str(identity), target=str(identity), serial=serial)
        return identity, certificate

    def _node_at_renewal(self, old: x509.Certificate, identity: SpiffeId, node: str) -> str:
        """The node stays what it is. One that has none yet has the one that it says, unless somebody else is there."""
        named = nodes_of(old, identity.trust_domain)
        if named:
            return min(named)
        if not node:
            return ""
        check_label("node_id", node)
        there = self.ledger.who_is_on(node, self.now, besides=identity)
        if there is not None:
            _log.warning("member.node_taken", identity=str(identity), node=node, by=str(there.identity))
        return "" if there is not None else node

    def _certify(
        self, identity: SpiffeId, public_key: ec.EllipticCurvePublicKey, key: str, addresses: Sequence[str], node: str
    ) -> x509.Certificate:
        node = node if identity.role is Role.RUNNER else ""
        certificate = self.authority.certify(
            identity,
            public_key,
            self._policy,
            now=self._moment(),
            addresses=addresses,
            lifetime=self._lifetime,
            node=node or None,
        )
        self.ledger.issued(
            identity,
            key=key,
            serial=certificate.serial_number,
            not_after=certificate.not_valid_after_utc.timestamp(),
            addresses=tuple(addresses),
            now=self.now,
            node=node,
        )
        self._write()
        return certificate

    # --- for admins -------------------------------------------------------------------------------------------------

    def create_token(self, role: Role, *, name: str, ttl_s: float, by: str, node: str = "") -> tuple[JoinToken, bytes]:
        """A token and its secret, which is kept nowhere. Raises InvalidRequestError."""
        if role is Role.IDENTITY:
            raise InvalidRequestError("role", "an identity service has the authority's key, and joins nobody")
        if name:
            check_label("name", name)
        if node:
            check_label("node_id", node)
        if not 1 <= ttl_s <= _TTL_MAX_S:
            raise InvalidRequestError("ttl", f"should be from 1 second to {_TTL_MAX_S / 86_400:.0f} days")
        secret = secrets.token_bytes(SECRET_BYTES)
        token = JoinToken(
            token_id=secrets.token_hex(8),
            secret_sha256=hashlib.sha256(secret).digest(),
            role=role,
            name=name,
            created_at=self.now,
            expires_at=self.now + ttl_s,
            created_by=by,
            node=node,
        )
        self.ledger.add(token, self.now)
        self._write()
        _log.info("token.created", token_id=token.token_id, role=role.value, by=by)
        self._noted(DeedKind.TOKEN_CREATED, by=by, target=token.token_id, role=role.value, name=name, ttl_s=int(ttl_s))
        return token, secret

    def revoke_token(self, token_id: str, *, by: str) -> None:
        """Makes a token worthless. Raises as `Ledger.revoke_token`."""
        self.ledger.revoke_token(token_id)
        self._write()
        _log.info("token.revoked", token_id=token_id, by=by)
        self._noted(DeedKind.TOKEN_REVOKED, by=by, target=token_id)

    def revoke(self, identity: SpiffeId, *, why: str, by: str) -> Revocation:
        """Shuts an identity out. Raises InvalidRequestError."""
        self._check_of_this_mesh(identity)
        if identity.role is Role.IDENTITY:
            raise InvalidRequestError("spiffe_id", "is an identity service; stop it, and replace the authority instead")
        if len(why) > _WHY_MAX:
            raise InvalidRequestError("why", f"is longer than {_WHY_MAX} characters")
        longest_s = self._policy.lifetimes[identity.role].total_seconds()
        revocation = self.ledger.revoke(identity, why=why, now=self.now, longest_s=longest_s)
        self._write()
        _log.warning("identity.revoked", identity=str(identity), by=by, why=why)
        self._tell()  # first: who is to be shut out need not wait for a disk
        self._noted(DeedKind.MEMBER_REVOKED, by=by, target=str(identity), why=why)
        return revocation

    def restore(self, identity: SpiffeId, *, by: str) -> None:
        """Takes a revocation back. Raises NotFoundError, InvalidRequestError."""
        self._check_of_this_mesh(identity)
        self.ledger.restore_identity(identity)
        self._write()
        _log.warning("identity.restored", identity=str(identity), by=by)
        self._tell()
        self._noted(DeedKind.MEMBER_RESTORED, by=by, target=str(identity))

    # --- one authority takes over from another ----------------------------------------------------------------------

    def rotate(self, *, by: str) -> None:
        """Begins to replace the authority, unless that is under way. Raises CertificateError where its folder can't be
        written to."""
        if self.ledger.rotation is not None:
            return
        succession.announce(self._directory, self.authority, self._policy, self._moment())
        self.ledger.rotation = Rotation(began_at=self.now)
        self._rotated("begun", by)

    def advance(self, *, by: str = "", at_once: bool = False) -> None:
        """Takes the next step of a rotation, where that is due or is to be done `at_once`. Raises CertificateError."""
        rotation, life_s = self.ledger.rotation, self._lifetime.total_seconds()
        if rotation is None:
            return
        if not at_once and not is_due(rotation, self.ledger.members, self.now, life_s=life_s):
            return
        if rotation.phase is Phase.SPREADING:
            succession.switch(self._directory)
            self.ledger.rotation = replace(rotation, switched_at=self.now)
            self._rotated("switched", by)
        else:
            succession.retire(self._directory)
            self.ledger.rotation = None
            self._rotated("finished", by)

    def waits_for(self) -> tuple[SpiffeId, ...]:
        """For whom a rotation waits."""
        rotation = self.ledger.rotation
        return () if rotation is None else waits_for(rotation, self.ledger.members, self.now)

    def _rotated(self, what: str, by: str) -> None:
        self._write()
        self.authority = CertificateAuthority.load(self._directory)
        self.shown_authority = succession.previous(self._directory) or self.authority
        digest = self.authority.certificate.fingerprint(hashes.SHA256()).hex()
        _log.warning("authority.rotated", step=what, by=by, signs=digest)
        self._tell()
        self._noted(DeedKind.AUTHORITY_ROTATED, by=by, target=digest, step=what)

    def _check_of_this_mesh(self, identity: SpiffeId) -> None:
        if identity.trust_domain != self.authority.trust_domain:
            raise InvalidRequestError("spiffe_id", f"is not of this mesh, {self.authority.trust_domain}")

    def _write(self) -> None:
        write_ledger(self._file, self.ledger)

    def _noted(self, kind: DeedKind, *, by: str, target: str, **facts: Fact) -> None:
        """Notes what was done. It is on disk before anybody is answered, as the ledger is."""
        self._trail.note(kind, by=by, target=target, **facts)
        self._trail.flush()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _moment(self) -> datetime:
        return datetime.fromtimestamp(int(self.now), UTC)


def _requested(request: bytes) -> tuple[ec.EllipticCurvePublicKey, str]:
    """The key of a PKCS #10 request that is signed with it, and its SHA-256. Raises InvalidRequestError."""
    field = "certificate_request"
    try:
        asked = x509.load_der_x509_csr(request)
        valid, key = asked.is_signature_valid, asked.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise InvalidRequestError(field, "is no PKCS #10 request in DER") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise InvalidRequestError(field, "should be for a key on the curve P-256 or P-384")
    if not valid:
        raise InvalidRequestError(field, "is not signed with its own key")
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return key, hashlib.sha256(spki).hexdigest()


def _check_addresses(addresses: Sequence[str]) -> None:
    if len(addresses) > _ADDRESSES_MAX:
        raise InvalidRequestError("addresses", f"are more than {_ADDRESSES_MAX}")


def _addresses_of(certificate: x509.Certificate, identity: SpiffeId) -> tuple[str, ...]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    named = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    own = identity.trust_domain
    return tuple(name for name in named if name != identity.dns_name and node_in(name, own) is None)
