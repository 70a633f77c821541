"""Signing tickets with a process's own key, and finding out whose signature one has: by certificates alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from chorus.core.errors import CertificateError, TicketError
from chorus.core.identity import SpiffeId
from chorus.core.identity.tickets import Ticket
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, TlsIdentity, read_certificates, spiffe_id_of
from chorus.wire.tickets import decode_signed, decode_ticket, encode_signed, encode_ticket

# The same key proves who we are in TLS handshakes: what is signed here can be nothing that is signed there.
_CONTEXT = b"chorus ticket v1\0"
# Whether a chain is valid is looked at again after this long.
_TRUSTED_S = 60
_CHAIN_MAX = 4

_SigningKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class TicketSigner:
    """Signs with the key of an identity, as it is then. Raises CertificateError where that is of a kind that can't."""

    def __init__(self, identity: TlsIdentity) -> None:
        self._identity = identity
        self._read = lru_cache(maxsize=1)(_signing_key)
        self._read(identity.key_pem, identity.cert_pem)

    def sign(self, ticket: Ticket) -> bytes:
        """The bytes of a SignedTicket."""
        raw = encode_ticket(ticket)
        key, chain = self._read(self._identity.key_pem, self._identity.cert_pem)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            signature = key.sign(_CONTEXT + raw, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPrivateKey):
            signature = key.sign(_CONTEXT + raw, padding.PKCS1v15(), hashes.SHA256())
        else:
            signature = key.sign(_CONTEXT + raw)
        return encode_signed(raw, chain, signature)


class TicketVerifier:
    """Opens tickets that somebody of the same mesh signed: of the identity's trust domain and authorities."""

    def __init__(self, identity: TlsIdentity) -> None:
        self._identity = identity
        self._grantor = lru_cache(maxsize=64)(self._verified)

    def open(self, raw: bytes, now: float) -> tuple[Ticket, SpiffeId]:
        """The ticket, and who signed it, whatever their role. `now` is seconds since 1970. Raises TicketError."""
        signed = decode_signed(raw)
        if not 0 < len(signed.certificates) <= _CHAIN_MAX:
            raise TicketError("the ticket is damaged: it has no certificate of who granted it, or too many")
        certificate, grantor = self._grantor(signed.certificates, self._identity.ca_pem, int(now) // _TRUSTED_S)
        if self._identity.revoked.of(grantor, certificate.serial_number) is not None:
            raise TicketError(f"the ticket was granted by {grantor}, who was revoked")
        if not _is_signed(certificate, signed.signature, signed.ticket):
            raise TicketError(f"the signature of the ticket is not {grantor}'s")
        return decode_ticket(signed.ticket), grantor

    def _verified(self, chain: tuple[bytes, ...], ca_pem: bytes, minute: int) -> tuple[x509.Certificate, SpiffeId]:
        try:
            leaf, *between = (x509.load_der_x509_certificate(der) for der in chain)
        except ValueError:
            raise TicketError("the ticket is damaged: it holds what is no certificate") from None
        now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=minute * _TRUSTED_S)
        # A certificate that was issued within this minute is looked at as of its beginning.
        now = max(now, min(leaf.not_valid_before_utc, now + timedelta(seconds=_TRUSTED_S)))
        store = Store(read_certificates(ca_pem, CA_FILE))
        try:
            PolicyBuilder().store(store).time(now).build_client_verifier().verify(leaf, between)
            grantor = spiffe_id_of(leaf)
        except (VerificationError, CertificateError) as error:
            raise TicketError(f"the certificate of who granted the ticket is none of this mesh: {error}") from None
        if grantor.trust_domain != self._identity.spiffe_id.trust_domain:
            raise TicketError(f"the ticket is of another mesh: {grantor} granted it")
        return leaf, grantor


def _signing_key(key_pem: bytes, cert_pem: bytes) -> tuple[_SigningKey, tuple[bytes, ...]]:
    """The key, and the chain of its certificate in DER."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        raise CertificateError("tickets can be signed with EC, RSA and Ed25519 keys alone")
    chain = read_certificates(cert_pem, CERTIFICATE_FILE)
    return key, tuple(certificate.public_bytes(serialization.Encoding.DER) for certificate in chain)


def _is_signed(certificate: x509.Certificate, signature: bytes, raw: bytes) -> bool:
    key = certificate.public_key()
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, _CONTEXT + raw, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, _CONTEXT + raw, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, _CONTEXT + raw)
        else:
            return False
    except InvalidSignature:
        return False
    return True
