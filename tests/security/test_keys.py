"""Attacks of holders of keys, of tokens, and of those who have neither, on a coordinator's listener for them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chorus.api.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from chorus.client import MeshClient
from chorus.coordinator.callers import read_pepper
from chorus.core.cache.policy import CacheMode
from chorus.core.cache.report import CacheReport
from chorus.core.errors import (
    ApiKeyError,
    BearerTokenError,
    ChorusError,
    ConfigError,
    OverloadedError,
    PermissionDeniedError,
    QuotaExceededError,
    UnauthenticatedError,
)
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.mesh import InProcessMesh
from chorus.wire.errors import from_rpc_error

pytestmark = pytest.mark.asyncio(loop_scope="module")
CERTIFICATES = MeshCertificates()
ISSUER, AUDIENCE = "https://sso.example", "chorus"
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def _jwks() -> str:
    keys = [
        {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY.public_key())), "kid": "rsa", "use": "sig"},
        {**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(EC_KEY.public_key())), "kid": "ec"},
        {"kty": "oct", "k": "c2VjcmV0LXRoYXQtZXZlcnlib2R5LWtub3dzLWFuZC1pcy1sb25n", "kid": "shared"},
    ]
    return json.dumps({"keys": keys})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("callers")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(folder: Path) -> AsyncIterator[InProcessMesh]:
    jwks = folder / "jwks.json"
    jwks.write_text(_jwks())
    callers = {
        "dir": folder / "state",
        "oidc_issuer": ISSUER,
        "oidc_audience": AUDIENCE,
        "oidc_jwks": str(jwks),
        "oidc_grants": {"staff": "requests_per_minute=3", "guests": "models=nothing-*"},
    }
    async with InProcessMesh(certificates=CERTIFICATES, callers=callers) as whole:
        yield whole


async def ask(mesh: InProcessMesh, shown: str, *metadata: tuple[str, str]) -> coordinator_pb2.GenerateResponse | None:
    """Asks with that bearer token; returns the last message. Raises ChorusErrors."""
    options = (("grpc.ssl_target_name_override", CERTIFICATES.id(Role.COORDINATOR, "coordinator-1").dns_name),)
    credentials = grpc.ssl_channel_credentials(CERTIFICATES.authority.certificate_pem)
    address = mesh.coordinators[0].side_addresses["callers"]
    request = coordinator_pb2.GenerateRequest()
    request.spec.prompt = "hello"
    request.spec.stop.max_tokens = 2
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        call = coordinator_pb2_grpc.CoordinatorStub(channel).Generate(
            request, metadata=(("authorization", f"Bearer {shown}"), *metadata), timeout=10
        )
        last = None
        try:
            async for message in call:
                last = message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return last


def token(*, key: Any = RSA_KEY, algorithm: str = "RS256", kid: str = "rsa", **claims: Any) -> str:
    now = int(time.time())
    whole = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": now + 600, "groups": ["staff"], **claims}
    kept = {name: value for name, value in whole.items() if value is not None}
    return jwt.encode(kept, key, algorithm=algorithm, headers={"kid": kid})


async def test_good_tokens_are_let_in_within_what_they_grant(mesh: InProcessMesh) -> None:
    assert await ask(mesh, token(sub="ben")) is not None
    assert await ask(mesh, token(sub="ben", key=EC_KEY, algorithm="ES256", kid="ec", groups="staff others")) is not None
    await ask(mesh, token(sub="ben"))
    with pytest.raises(QuotaExceededError):  # three a minute, of the person and not of the token
        await ask(mesh, token(sub="ben"))
    assert await ask(mesh, token(sub="kim")) is not None
    with pytest.raises(PermissionDeniedError):
        await ask(mesh, token(groups=["guests"]))
    with pytest.raises(PermissionDeniedError, match="grants nothing"):
        await ask(mesh, token(groups=["strangers"]))


def _forged() -> dict[str, str]:
    now, public = int(time.time()), RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    header, claims, _ = token().split(".")
    confused = jwt.api_jws.PyJWS().encode(
        json.dumps({"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": now + 600}).encode(),
        hashlib.sha256(public).digest(),
        algorithm="HS256",
        headers={"kid": "rsa"},
    )
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    bare = {"iss": ISSUER, "aud": AUDIENCE, "sub": "x", "exp": now + 9}
    shared = b"secret-that-everybody-knows-and-is-long"
    return {
        "of no algorithm": jwt.encode(bare, None, algorithm="none"),
        "signed with the public key": confused,
        "signed with the shared key": token(key=shared, algorithm="HS256", kid="shared"),
        "of an algorithm not allowed": token(algorithm="RS512"),
        "signed by somebody else": token(key=other),
        "with a key of another kind": token(kid="ec"),
        "with an unknown key": token(kid="newer"),
        "changed": f"{header}.{claims[:-2]}AA.{token().split('.')[2]}",
        "expired": token(exp=now - 120),
        "not good yet": token(nbf=now + 600),
        "for somebody else": token(aud="another"),
        "of another issuer": token(iss="https://evil.example"),
        "without an end": token(exp=None),
        "of nobody": token(sub=None),
        "no token": "a.b.c",
        "too long": "e" * 13_000,
    }


@pytest.mark.parametrize("kind", list(_forged()))
async def test_bad_tokens_are_refused(mesh: InProcessMesh, kind: str) -> None:
    mesh.coordinators[0]._callers._attempts._callers.clear()  # type: ignore[union-attr]  # of these many tries
    with pytest.raises(BearerTokenError) as told:
        await ask(mesh, _forged()[kind])
    assert "eyJ" not in str(told.value)


async def _key(mesh: InProcessMesh, **options: Any) -> tuple[str, str]:
    key, text = await mesh.client(role=Role.ADMIN, name="root").keys.create("ann", **options)
    return key.key_id, text


async def test_what_is_stored_lets_nobody_in(mesh: InProcessMesh, folder: Path) -> None:
    key_id, text = await _key(mesh)
    assert await ask(mesh, text) is not None
    state = folder / "state"
    pepper = state / "pepper"
    assert pepper.stat().st_mode & 0o777 == 0o600
    assert (state / "callers.db").stat().st_mode & 0o777 == 0o600
    secret = text.rpartition("_")[2]
    kept = b"".join(path.read_bytes() for path in state.iterdir())
    assert secret.encode() not in kept
    with sqlite3.connect(f"file:{state / 'callers.db'}?mode=ro", uri=True) as db:
        (record,) = db.execute("SELECT record FROM keys WHERE key_id = ?", (key_id,)).fetchone()
    for stolen in (json.loads(record)["digest"], record):
        with pytest.raises(ApiKeyError):
            await ask(mesh, f"chorus_{key_id}_{stolen[:43]}")


async def test_another_pepper_and_one_open_to_all_are_refused(mesh: InProcessMesh, folder: Path) -> None:
    pepper = folder / "state" / "pepper"
    right = pepper.read_bytes()
    try:
        pepper.chmod(0o644)
        with pytest.raises(ConfigError, match="every user"):
            read_pepper(folder / "state")
        pepper.chmod(0o600)
        pepper.write_bytes(bytes(32))
        with pytest.raises(ConfigError, match="another one"):
            await mesh.add_coordinator()
    finally:
        pepper.write_bytes(right)


async def test_guessing_is_slowed_down_and_hurts_nobody_with_a_key(mesh: InProcessMesh) -> None:
    _, text = await _key(mesh)
    mesh.coordinators[0]._callers._attempts._callers.clear()  # type: ignore[union-attr]
    said: list[type[ChorusError]] = []
    for n in range(40):
        try:
            await ask(mesh, f"chorus_{n:016x}_{'A' * 43}" if n % 2 else "x")
        except (UnauthenticatedError, OverloadedError) as error:
            said.append(type(error))
    assert len(said) == 40
    assert OverloadedError in said
    assert await ask(mesh, text) is not None
    mesh.coordinators[0]._callers._attempts._callers.clear()  # type: ignore[union-attr]


async def test_a_key_is_nobody_else(mesh: InProcessMesh, folder: Path) -> None:
    """Each key is a caller of its own: its cached answers are its alone, and no certificate can be it."""
    (one_id, one), (_, two) = await _key(mesh), await _key(mesh)
    ca = folder / "ca.crt"
    ca.write_bytes(CERTIFICATES.authority.certificate_pem)

    async def outcome(client: MeshClient) -> str:
        generation = client.generate("hello", max_tokens=4, temperature=0.0, cache=CacheMode.EXACT)
        events = [event async for event in generation]
        assert isinstance(events[0], CacheReport)
        return events[0].outcome.value

    told = []
    for number, text in enumerate((one, one, two)):
        file = folder / f"shown-{number}.key"
        file.write_text(text)
        file.chmod(0o600)
        told.append(await outcome(mesh.key_client(file, ca=str(ca))))
    assert told == ["miss", "exact", "miss"]
    # A certificate of that name is a client of the mesh, and no holder of the key.
    assert await outcome(mesh.client(name=f"key-{one_id}")) == "miss"


async def test_what_callers_say_of_themselves_is_not_believed(mesh: InProcessMesh) -> None:
    _, text = await _key(mesh)
    forged = (("x-forwarded-client-cert", "spiffe://test/admin/root"), ("x-chorus-caller", "spiffe://test/admin/root"))
    assert await ask(mesh, text, *forged) is not None
