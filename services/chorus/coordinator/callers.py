"""Callers without a certificate: whose key or token was shown, what that lets them do, and the keys' administration."""

from __future__ import annotations

import asyncio
import hmac
import math
import secrets
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from chorus.coordinator.oidc import TokenVerifier
from chorus.coordinator.quotas import Quotas
from chorus.core.audit import DeedKind, Trail
from chorus.core.callers import PEPPER_BYTES, ApiKey, Grant, KeyRing, KeyText, Limits, Scopes, Usage
from chorus.core.errors import (
    ApiKeyError,
    ApiKeyRevokedError,
    CertificateError,
    ChorusError,
    ConfigError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from chorus.core.identity import Role, SpiffeId
from chorus.core.identity.attempts import Attempts
from chorus.store.callers import CallerStore
from chorus.telemetry.logs import get_logger
from chorus.transport.files import KEY_MODE, make_directory, write_new
from chorus.transport.peer import Peer, caller_host, current_caller
from chorus.transport.tls import open_to_all

_POLL_S = 1.0
"""How long another coordinator's new or revoked key may go unnoticed."""
_AGAIN_S = 0.2
"""A key that is not known makes keys be looked at again, at most this often."""
_TTL_MAX_S = 3660 * 86_400.0
_TOKEN_ACCOUNT = "oidc-"  # noqa: S105
_KEY_ACCOUNT = "key-"

_log = get_logger()
_token_grant: ContextVar[Grant | None] = ContextVar("chorus_token_grant", default=None)


def read_pepper(directory: Path) -> bytes:
    """The pepper in `directory`, which is made where there is none. Raises ConfigError, CertificateError."""
    path = directory / "pepper"
    make_directory(directory)
    if not path.exists():
        try:
            write_new(path, secrets.token_bytes(PEPPER_BYTES), KEY_MODE, replace=False)
        except CertificateError:
            if not path.exists():
                raise  # unlike where another coordinator made it meanwhile
    problem = "can be read by every user of this machine; run `chmod 600` on it" if open_to_all(path) else ""
    try:
        pepper = path.read_bytes()
    except OSError as error:
        pepper, problem = b"", f"cannot be read: {error.strerror}"
    if len(pepper) != PEPPER_BYTES and not problem:
        problem = f"should hold {PEPPER_BYTES} bytes; copy it from another coordinator, or restore it from a backup"
    if problem:
        raise ConfigError(f"callers.dir: {path} {problem}", metadata={"keys": "callers.dir"})
    return pepper


class Callers:
    """The Standing of callers with keys. Used from one event loop; `wall` is seconds since 1970.

    A caller is `spiffe://callers.<trust domain>/client/<account>`: no certificate of the mesh names anybody there.
    """

    def __init__(
        self,
        store: CallerStore,
        pepper: bytes,
        *,
        trust_domain: str,
        verifier: TokenVerifier | None,
        trail: Trail,
        wall: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self.quotas = Quotas(store, clock=clock)
        self._store = store
        self._pepper = pepper
        self._domain = f"callers.{trust_domain}"
        self._verifier = verifier
        self._trail = trail
        self._wall = wall
        self._clock = clock
        self._ring = KeyRing()
        self._known = False
        self._looked_at = -math.inf
        self._attempts = Attempts(burst=30, per_s=1.0)
        self._listeners: set[Callable[[], None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._soon: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Learns the keys, now and from now on. Raises ConfigError where the pepper is not that of the store."""
        try:
            await self._begin()
        except UnavailableError as error:  # services and admins are served, and it may come back
            _log.warning("keys.store_away", why=error.message)
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self.quotas.run())]

    async def close(self) -> None:
        """Ends what goes on, once all use is told."""
        tasks = [*self._tasks, *([self._soon] if self._soon is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.quotas.close()
        await self._store.close()

    # --- who calls --------------------------------------------------------------------------------------------------

    async def authenticate(self, context: Any, now: float) -> Peer:
        """Whose key or token was shown. Raises UnauthenticatedErrors, and UnavailableError while keys aren't known."""
        try:
            shown = _bearer(context.invocation_metadata())
            if self._verifier is not None and not shown.startswith("chorus_"):
                account, grant, not_after = await self._verifier.verify(shown)
                _token_grant.set(grant)
                return self._peer(f"{_TOKEN_ACCOUNT}{account}", not_after)
            key = await self._admit(KeyText.parse(shown), now)
        except UnauthenticatedError:
            # Who tries many is told so, which takes the fun out of guessing; who has a right one is never counted.
            self._attempts.take(caller_host(context), self._clock())
            raise
        return self._peer(key.account, key.expires_at or math.inf)

    def check(self, peer: Peer) -> None:
        """Raises ApiKeyRevokedError where a key was taken back since."""
        name = peer.spiffe_id.name
        key = self._ring.get(name.removeprefix(_KEY_ACCOUNT))
        if key is not None and key.revoked_at:
            raise ApiKeyRevokedError(f"the API key {key.key_id} was revoked; ask whoever runs the mesh for another")

    def expired(self, peer: Peer) -> ChorusError:
        """A key or a token ends for good."""
        return UnauthenticatedError(f"what {peer.spiffe_id.name} showed has expired; get a new key or token")

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` when keys have changed."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def grant(self) -> Grant | None:
        """What whoever calls now may do; None where nothing holds them back but who they are.

        Raises UnavailableError while nobody knows that.
        """
        caller = current_caller()
        if caller is None or caller.role is not Role.CLIENT:
            return None
        if caller.trust_domain != self._domain:
            self._check_known()  # or who is limited would not be, while nobody knows of it
            key = self._ring.of_client(caller.name)
            return key.grant if key is not None and key.state(self._wall()) == "open" else None
        if caller.name.startswith(_TOKEN_ACCOUNT):
            return _token_grant.get()
        key = self._ring.get(caller.name.removeprefix(_KEY_ACCOUNT))
        assert key is not None, "it was admitted"
        return key.grant

    async def _admit(self, shown: KeyText, now: float) -> ApiKey:
        if self._ring.get(shown.key_id) is None:
            await self._look_soon()  # it may have been made a moment ago, elsewhere
        self._check_known()
        return self._ring.admit(shown, self._pepper, now)

    def _check_known(self) -> None:
        if not self._known:
            raise UnavailableError("the keys are not known yet: their store can't be reached", retry_after_s=_POLL_S)

    def _peer(self, account: str, not_after: float) -> Peer:
        return Peer(SpiffeId(self._domain, Role.CLIENT, account), 0, not_after)

    # --- for admins -------------------------------------------------------------------------------------------------

    async def create(
        self, name: str, *, ttl_s: float | None, client: str, scopes: Scopes, limits: Limits, by: str
    ) -> tuple[ApiKey, KeyText]:
        """A key, and its text, which is kept nowhere. Raises InvalidRequestError, UnavailableError."""
        if ttl_s is not None and not 1 <= ttl_s <= _TTL_MAX_S:
            raise InvalidRequestError("ttl", f"should be from 1 second to {_TTL_MAX_S / 86_400:.0f} days")
        text = KeyText(secrets.token_hex(8), secrets.token_bytes(32))
        now = self._wall()
        key = ApiKey(
            text.key_id,
            name,
            text.digest(self._pepper),
            created_at=now,
            created_by=by,
            expires_at=now + ttl_s if ttl_s is not None else 0.0,
            client=client,
            scopes=scopes,
            limits=limits,
        )
        await self._begin()
        await self._store.put(key)
        await self._look()
        self._noted(DeedKind.KEY_CREATED, by, key)
        return key, text

    async def keys(self) -> tuple[ApiKey, ...]:
        """All keys, the oldest first. Raises UnavailableError."""
        await self._look()
        return self._ring.keys

    async def revoke(self, key_id: str, *, by: str) -> None:
        """Makes a key worthless. Safe to ask twice. Raises NotFoundError, UnavailableError."""
        key = await self._found(key_id)
        if not key.revoked_at:
            await self._store.put(key.revoked(self._wall()))
            await self._look()
        self._noted(DeedKind.KEY_REVOKED, by, key)

    async def usage(self, key_id: str) -> Usage:
        """What was used with a key, or by the holder of tokens whose account that is. Raises as `revoke`."""
        if key_id.startswith(_TOKEN_ACCOUNT):
            return await self.quotas.usage(key_id)
        return await self.quotas.usage((await self._found(key_id)).account)

    @property
    def now(self) -> float:
        """The time by which keys end."""
        return self._wall()

    async def _found(self, key_id: str) -> ApiKey:
        await self._look()
        key = self._ring.get(key_id)
        if key is None:
            raise NotFoundError(f"there is no API key {key_id[:40]!r}; `chorus key list` names them")
        return key

    def _noted(self, kind: DeedKind, by: str, key: ApiKey) -> None:
        _log.info(kind.value, key_id=key.key_id, by=by)
        self._trail.note(kind, by=by, target=key.key_id, name=key.name, client=key.client)
        self._trail.flush()

    # --- what others did --------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        if self._known:
            return
        mark = hmac.digest(self._pepper, b"the pepper of these keys", "sha256")
        if not hmac.compare_digest(await self._store.pepper_mark(mark), mark):
            raise ConfigError(
                "callers.dir: its file pepper is another one than that by which the keys were made; copy it from the "
                "coordinator that made them",
                metadata={"keys": "callers.dir"},
            )
        await self._look()
        self._known = True

    async def _look(self) -> None:
        """Takes over what was changed. Raises UnavailableError."""
        self._looked_at = self._clock()
        ring = await self._store.ring(self._ring.revision)
        if ring is not None:
            self._ring = ring
            for listener in tuple(self._listeners):
                listener()

    async def _look_soon(self) -> None:
        """Looks once for all who ask meanwhile, a moment after the last time. Raises UnavailableError."""
        if self._soon is None or self._soon.done():

            async def look() -> None:
                await asyncio.sleep(max(0.0, self._looked_at + _AGAIN_S - self._clock()))
                await self._begin()
                await self._look()

            self._soon = asyncio.create_task(look(), name="look for a new key")
        await asyncio.shield(self._soon)

    async def _follow(self) -> None:
        away = False
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                await self._begin()
                await self._look()
                away = False
            except ChorusError as error:
                if not away:
                    _log.warning("keys.store_away", why=error.message)
                away = True


def _bearer(metadata: Any) -> str:
    values = [value for name, value in metadata or () if name == "authorization"]
    scheme, _, shown = values[0].partition(" ") if len(values) == 1 and isinstance(values[0], str) else ("", "", "")
    if scheme.lower() != "bearer" or not shown.strip():
        raise ApiKeyError(
            "show an API key, as metadata `authorization: Bearer chorus_…`; `chorus key create` makes one"
        )
    return shown.strip()
