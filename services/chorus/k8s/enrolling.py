"""Runners that join: the Job lays a token ready for each node whose runner is no member yet, and the runner's pod
redeems it. The key is made on the node, and stays there.

A pod's template can't name a Secret for each node, so all tokens lie in one; each is good for one runner, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from chorus.api.identity.v1 import identity_pb2 as pb
from chorus.client.identity import IdentityClient
from chorus.config import Endpoint
from chorus.core.cluster.invitations import TOKEN_TTL_S, Invitations, invite
from chorus.core.errors import CertificateError, ConfigError, InvalidRequestError
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.join_line import JoinLine
from chorus.core.identity.renewal import GRACE_S
from chorus.k8s.cluster import Cluster
from chorus.k8s.issuing import ADMIN_SECRET
from chorus.k8s.secrets import Secrets
from chorus.local.joining import Wish, enrol
from chorus.transport.files import make_directory
from chorus.transport.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, TlsIdentity
from chorus.wire.identity import decode_time

TOKENS_SECRET = "chorus-join-tokens"  # noqa: S105 - a name
_REACHED_AT = Endpoint("localhost", 7201)  # kubectl port-forward; a pod's own address is another one each time


async def invite_with(
    cluster: Cluster, service: Endpoint | None, runners: Mapping[str, str], now: float
) -> Invitations:
    """As `invite_runners`, as the admin whose leaf is in its Secret. Raises ConfigError where no `service` is known."""
    if service is None:
        raise ConfigError("mesh.identity_service is not set, and it alone makes tokens")
    secrets = Secrets(cluster)
    data = secrets.read(ADMIN_SECRET) or {}
    ca_pem, cert_pem, key_pem = (data.get(name, b"") for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE))
    identity = TlsIdentity.from_pem(ca_pem=ca_pem, cert_pem=cert_pem, key_pem=key_pem)
    async with IdentityClient(service, identity) as admin:
        return await invite_runners(secrets, admin, runners, now)


async def invite_runners(
    secrets: Secrets, admin: IdentityClient, runners: Mapping[str, str], now: float
) -> Invitations:
    """Brings the Secret of tokens up to date for `runners`, each with the node for which alone its token is good, or
    "" where that isn't known yet. `now` is seconds since 1970.

    Raises what the identity service and the API server answer.
    """
    stored = secrets.read(TOKENS_SECRET)
    lines = {name: _line(content) for name, content in (stored or {}).items()}
    tokens, listed = await admin.tokens(), await admin.members()
    decided = invite(
        tuple(runners),
        {name: "" if line is None else line.token_id for name, line in lines.items()},
        {token.token_id: decode_time(token.expires_at) for token in tokens if token.state == pb.TOKEN_STATE_OPEN},
        _runners(one.spiffe_id for one in listed.members if now < decode_time(one.not_after) + GRACE_S),
        _runners(one.spiffe_id for one in listed.revocations if not one.serials),
        now,
    )
    changed: dict[str, bytes | None] = dict.fromkeys(decided.withdrawn)
    for name in decided.invited:
        _, line, _ = await admin.create_token(Role.RUNNER, name=name, node_id=runners[name], ttl_s=TOKEN_TTL_S)
        changed[name] = str(line).encode()
    if changed or stored is None:
        secrets.write(TOKENS_SECRET, changed, exists=stored is not None)
    return decided


def join_once(runner: str, node: str, tokens: Path, where: Endpoint, certs: Path) -> bool:
    """Joins as that runner of that node with the token that is laid ready in the folder `tokens`, unless `certs` has
    its leaf already; returns whether it did. One that has ended does as well: the runner renews it.

    Raises CertificateError where there is neither, and what to do; else as `enrol`.
    """
    make_directory(certs)
    if (certs / f"{Role.RUNNER}-{runner}").is_dir():
        found = TlsIdentity.load(certs / f"{Role.RUNNER}-{runner}", even_ended=True)
        if (found.spiffe_id.role, found.spiffe_id.name) == (Role.RUNNER, runner):
            return False
    try:
        text = (tokens / runner).read_text("utf-8")
    except OSError:
        raise CertificateError(
            f"this node has no certificate for its runner {runner!r}, and there is no token to join with. The CronJob "
            f"chorus-issue makes one, in the Secret {TOKENS_SECRET}, for every node labelled chorus.mesh/runner=true "
            "that never joined: kubectl -n chorus create job --from=cronjob/chorus-issue issue-now. One that has "
            f"joined and lost its key needs one from `chorus token create --name {runner} --node {node}`: docs/k3s.md"
        ) from None
    enrol(certs, where, JoinLine.parse(text), Wish(runner, node=node, advertise=_REACHED_AT))
    return True


def _line(content: bytes) -> JoinLine | None:
    """The token that lies there; None for anything else, which is replaced."""
    try:
        return JoinLine.parse(content.decode("ascii", "replace"))
    except InvalidRequestError:
        return None


def _runners(identities: Iterable[str]) -> frozenset[str]:
    """The names of those that are runners."""
    parsed = map(SpiffeId.parse, identities)
    return frozenset(one.name for one in parsed if one.role is Role.RUNNER)
