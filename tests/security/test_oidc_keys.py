"""Where the keys of an identity provider come from: a local server over TLS, whose certificate is checked."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from chorus.config.callers import CallersSettings
from chorus.coordinator.oidc import KEPT_S, TokenVerifier
from chorus.core.errors import ConfigError, UnavailableError
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates

CERTIFICATES, STRANGERS = MeshCertificates(), MeshCertificates()
ISSUER, AUDIENCE = "https://sso.home", "chorus"
KEY = ec.generate_private_key(ec.SECP256R1())
JWKS = {"keys": [{**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key())), "kid": "ec"}]}


@contextmanager
def provider(folder: Path, answers: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """A provider on this machine, by paths: status, headers and body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    leaf = CERTIFICATES.leaf(Role.COORDINATOR, "sso")
    for name, content in (("tls.crt", leaf.cert_pem), ("tls.key", leaf.key_pem)):
        (folder / name).write_bytes(content)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def verifier(jwks: str, ca: Path | None, clock: Callable[[], float] = time.monotonic) -> TokenVerifier:
    settings = CallersSettings(
        oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_jwks=jwks, oidc_ca=ca, oidc_grants={"*": ""}
    )
    return TokenVerifier(settings, clock=clock)


def token() -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": int(time.time()) + 600}
    return jwt.encode(claims, KEY, algorithm="ES256", headers={"kid": "ec"})


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    path = tmp_path / "ca.crt"
    path.write_bytes(CERTIFICATES.authority.certificate_pem)
    return path


async def test_keys_come_over_https_from_a_private_address_by_an_authority_of_ones_own(
    tmp_path: Path, ca: Path
) -> None:
    with provider(tmp_path, {"/keys": (200, {}, json.dumps(JWKS).encode())}) as url:
        _, grant, _ = await verifier(f"{url}/keys", ca).verify(token())
    assert grant.account.startswith("oidc-")


async def test_nobody_else_is_believed_to_be_the_provider(tmp_path: Path, ca: Path) -> None:
    strangers = tmp_path / "strangers.crt"
    strangers.write_bytes(STRANGERS.authority.certificate_pem)
    with provider(tmp_path, {"/keys": (200, {}, json.dumps(JWKS).encode())}) as url:
        for trusted in (None, strangers):
            with pytest.raises(UnavailableError):
                await verifier(f"{url}/keys", trusted).verify(token())


@pytest.mark.parametrize(
    "answer",
    [
        (302, {"location": "/keys"}, b""),
        (200, {}, b'{"keys": [], "pad": "' + b"x" * (1 << 20) + b'"}'),
        (200, {}, b"<html>"),
        (200, {}, b"[]"),
        (500, {}, b""),
    ],
    ids=["another place", "too long", "no JSON", "no keys", "an error"],
)
async def test_what_is_no_list_of_keys_is_none(
    tmp_path: Path, ca: Path, answer: tuple[int, dict[str, str], bytes]
) -> None:
    good = (200, {}, json.dumps(JWKS).encode())
    with provider(tmp_path, {"/asked": answer, "/keys": good}) as url, pytest.raises(UnavailableError):
        await verifier(f"{url}/asked", ca).verify(token())


async def test_keys_that_cannot_be_fetched_again_are_good_for_a_day_and_no_longer(tmp_path: Path) -> None:
    file, now = tmp_path / "keys.json", 0.0
    file.write_text(json.dumps(JWKS))
    verify = verifier(str(file), None, lambda: now).verify
    await verify(token())
    file.unlink()
    now = KEPT_S - 1
    await verify(token())
    now = KEPT_S + 60
    with pytest.raises(UnavailableError):
        await verify(token())
    file.write_text(json.dumps(JWKS))
    now += 60
    await verify(token())


def test_a_file_without_authorities_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "none"):
        with pytest.raises(ConfigError, match=r"callers\.oidc_ca"):
            verifier("https://127.0.0.1/keys", tmp_path / name)
