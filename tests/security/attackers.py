"""What attackers of a mesh hold and make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from chorus.core.errors import ChorusError
from chorus.core.identity import Role
from chorus.identity.ca import CertificateAuthority
from chorus.testing.certificates import LOOPBACK, MeshCertificates
from chorus.transport import TlsIdentity
from chorus.wire.errors import from_rpc_error


@dataclass(frozen=True)
class Forgery:
    """Files that somebody made with a key that is theirs, and what a process with them would show."""

    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes
    identity: TlsIdentity


def signed_by_a_leaf(mesh: MeshCertificates, role: Role, name: str) -> Forgery:
    """A certificate of `role` that a client signed with the key of its own, its own certificate beside it."""
    client = mesh.leaf(Role.CLIENT, "mallory")
    key = serialization.load_pem_private_key(client.key_pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signer = CertificateAuthority(
        x509.load_pem_x509_certificate(client.cert_pem), key, trust_domain=mesh.authority.trust_domain
    )
    forged = signer.issue(mesh.id(role, name), mesh.policy, now=mesh.now, addresses=LOOPBACK)
    chain, authority = forged.cert_pem + client.cert_pem, mesh.authority.certificate_pem
    identity = TlsIdentity(authority, chain, forged.key_pem, forged.spiffe_id, forged.not_after)
    return Forgery(authority, chain, forged.key_pem, identity)


async def refusal(call: Any) -> ChorusError:
    """The error that a call ends with."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.RpcError as error:
        return from_rpc_error(error)
    raise AssertionError("it was let")
