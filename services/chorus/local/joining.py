"""A machine joins a mesh: it makes sure whom it talks to, gets its certificate, and writes down how it runs.

Nothing but a TLS handshake is sent before the authority's fingerprint was compared with the token's. The key is made
here and never leaves. Whatever is interrupted is begun again with the same key, so that the token still does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from chorus.api.identity.v1 import identity_pb2 as pb
from chorus.api.identity.v1 import identity_pb2_grpc
from chorus.config import ChorusConfig, Endpoint, to_toml
from chorus.core.errors import CertificateError, ConfigError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.join_line import JoinLine
from chorus.local.home import MeshHome
from chorus.local.ports import is_free
from chorus.transport.channel import open_channel_to_join
from chorus.transport.files import CERTIFICATE_MODE, KEY_MODE, make_directory, write_new, write_new_directory
from chorus.transport.keeping import certificate_request
from chorus.transport.meeting import Met, meet
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, TlsIdentity
from chorus.wire.errors import from_rpc_error
from chorus.wire.identity import decode_time

_TIMEOUT_S = 10.0
_PORTS = range(7201, 7300)
_SERVICES = (Role.REGISTRY, Role.RUNNER, Role.COORDINATOR)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a machine wants of the mesh. `advertise` None: the address by which it reached the identity service;
    `remote`: a model server that answers here, such as `ollama=http://127.0.0.1:11434`; `node`: its id.
    """

    name: str
    node: str = ""
    advertise: Endpoint | None = None
    remote: str | None = None
    engine: str | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """A machine of the mesh. `config_file` is how its service, or its client, runs."""

    identity: SpiffeId
    config_file: Path


def joined_already(home: MeshHome) -> Joined | None:
    """What this machine joined as before, where it did."""
    for role in (*_SERVICES, Role.CLIENT, Role.ADMIN):
        config_file = _config_file(home, role)
        if config_file.exists():
            from chorus.config import load_config

            config = load_config(file=config_file)
            folder = config.client.identity
            name = getattr(config, role.value).name if role in _SERVICES else folder.removeprefix(f"{role}-")
            return Joined(SpiffeId(config.mesh.trust_domain, role, name), config_file)
    return None


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A machine with a certificate of its own: whom it has met, and where the others are."""

    identity: SpiffeId
    met: Met
    endpoints: pb.MeshEndpoints


def join(home: MeshHome, where: Endpoint, line: JoinLine, wish: Wish) -> Joined:
    """Joins the mesh at `where`, and writes down how to run. Raises as `enrol`."""
    home.make()
    enrolled = enrol(home.certs, where, line, wish)
    role = enrolled.identity.role
    config = _config(home, where, enrolled, wish)
    config_file = _config_file(home, role)
    section = role.value if role in _SERVICES else "client"
    write_new(config_file, to_toml(config, "mesh", "log", "audit", section).encode(), KEY_MODE, replace=True)
    return Joined(enrolled.identity, config_file)


def enrol(certs: Path, where: Endpoint, line: JoinLine, wish: Wish) -> Enrolled:
    """Joins the mesh at `where`: a folder below `certs` has the key and the certificate then.

    Raises CertificateError where somebody else answers there, or a clock is wrong, UnavailableError, and what the
    identity service answers.
    """
    make_directory(certs)
    met = meet(where, line.authority_sha256)
    pending = certs / f"joining-{line.token_id}.key"
    key_pem = _own_key(pending)
    own = wish.advertise.host if wish.advertise is not None else met.own_ip
    answer = asyncio.run(_ask(where, met, line, key_pem, wish, addresses=(own, "127.0.0.1", "localhost")))
    issued = answer.certificate
    got = TlsIdentity.from_pem(ca_pem=issued.authorities_pem, cert_pem=issued.certificate_pem, key_pem=key_pem)
    _check_clock(decode_time(issued.time))
    contents = {
        KEY_FILE: (key_pem, KEY_MODE),
        CERTIFICATE_FILE: (got.cert_pem, CERTIFICATE_MODE),
        CA_FILE: (got.ca_pem, CERTIFICATE_MODE),
    }
    write_new_directory(certs / f"{got.spiffe_id.role}-{got.spiffe_id.name}", contents, replace=True)
    pending.unlink(missing_ok=True)
    return Enrolled(got.spiffe_id, met, answer.endpoints)


def _own_key(pending: Path) -> bytes:
    """The key of an earlier try with the same token, or a new one."""
    try:
        return pending.read_bytes()
    except FileNotFoundError:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_new(pending, pem, KEY_MODE, replace=False)
        return pem
    except OSError as error:
        raise CertificateError(f"cannot read {pending}: {error.strerror}") from error


async def _ask(
    where: Endpoint, met: Met, line: JoinLine, key_pem: bytes, wish: Wish, *, addresses: Sequence[str]
) -> pb.JoinResponse:
    authority = met.authority.public_bytes(serialization.Encoding.PEM)
    request = pb.JoinRequest(
        token_id=line.token_id,
        secret=line.secret,
        certificate_request=certificate_request(key_pem),
        name=wish.name,
        addresses=list(dict.fromkeys(addresses)),
        node_id=wish.node,
    )
    async with open_channel_to_join(where.authority, ca_pem=authority, server=met.server) as channel:
        stub: Any = identity_pb2_grpc.EnrolmentStub(channel)
        try:
            answer: pb.JoinResponse = await stub.Join(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=f"the identity service at {where.authority}") from error
    return answer


def _check_clock(theirs: float) -> None:
    skew_s = datetime.now(UTC).timestamp() - theirs
    if abs(skew_s) > 300:
        which = "ahead" if skew_s > 0 else "behind"
        raise CertificateError(
            f"this machine's clock is {abs(skew_s) / 60:.0f} minutes {which} of the mesh's; set it and run this again "
            "(the token still does)"
        )


def _config(home: MeshHome, where: Endpoint, enrolled: Enrolled, wish: Wish) -> ChorusConfig:
    identity, endpoints, met = enrolled.identity, enrolled.endpoints, enrolled.met
    own = wish.advertise.host if wish.advertise is not None else met.own_ip
    mesh = {
        "trust_domain": identity.trust_domain,
        "certs_dir": home.certs,
        "identity_service": endpoints.identity,
        "renewal": f"{met.server.name}@{where.authority}",
    }
    if identity.role not in _SERVICES:
        client = {"coordinators": list(endpoints.coordinators), "identity": f"{identity.role}-{identity.name}"}
        return ChorusConfig.model_validate({"mesh": mesh, "client": client})
    port = wish.advertise.port if wish.advertise is not None else _free_port()
    section: dict[str, Any] = {"name": identity.name, "listen": str(Endpoint(own, port))}
    if wish.advertise is not None:
        section["listen"] = f"0.0.0.0:{port}"
    if identity.role is not Role.REGISTRY:
        section["registries"] = list(endpoints.registries)
    if identity.role is Role.RUNNER:
        section["advertise"] = str(Endpoint(own, port))
        section |= {"remote": wish.remote} if wish.remote else {}
        section |= {"engine": wish.engine} if wish.engine else {}
    return ChorusConfig.model_validate({"mesh": mesh, "audit": {"dir": home.audit}, identity.role.value: section})


def _free_port() -> int:
    for port in _PORTS:
        if is_free("0.0.0.0", port):  # noqa: S104 - whether anybody has it
            return port
    raise ConfigError("no port from 7201 to 7299 is free; choose one with --advertise HOST:PORT")


def _config_file(home: MeshHome, role: Role) -> Path:
    return home.config_file(f"joined-{role}")
