"""The one connection to a Valkey or Redis server, which coordinators may share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from chorus.config.secrets import read_secret
from chorus.config.valkey import ValkeySettings
from chorus.core.errors import ConfigError, UnavailableError

_URL_KEY = "valkey.url_file"
_SCHEMES = {"valkey": "redis", "valkeys": "rediss", "redis": "redis", "rediss": "rediss", "unix": "unix"}
# Of connections that have been idle for longer, it is asked whether they still live before they are used.
_IDLE_S = 15
# Questions beyond that wait for those before them; the server answers one after the other anyway.
_CONNECTIONS = 16


class Valkey:
    """A pool of connections, made as they are needed. Used from one event loop.

    `client` is redis-py's; keys and values are bytes there. What fails inside `reached()` because the server is out of
    reach is an UnavailableError: whoever uses the server decides what that means.
    """

    def __init__(self, url: str, *, prefix: str, timeout_s: float) -> None:
        """Raises ConfigError where the URL can't be, without showing it."""
        self._prefix = prefix
        self._timeout_s = timeout_s
        try:
            # Once more at once, for a connection that the server has closed meanwhile; who may not be asked twice for
            # the same must give each question a name of its own.
            pool = redis.BlockingConnectionPool.from_url(
                _usable(url),
                max_connections=_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                health_check_interval=_IDLE_S,
                retry=Retry(NoBackoff(), 1),
            )
            self.client = redis.Redis.from_pool(pool)
        except (ValueError, RedisError):
            raise ConfigError(
                f"{_URL_KEY}: the file should hold one URL, such as redis://HOST:6379/0", metadata={"keys": _URL_KEY}
            ) from None

    @classmethod
    def configured(cls, settings: ValkeySettings) -> Valkey | None:
        """The server of the configuration, not yet asked for anything; None where there is none. Raises ConfigError."""
        if settings.url_file is None:
            return None
        url = read_secret(settings.url_file, key=_URL_KEY).decode("utf-8", "replace")
        return cls(url, prefix=settings.prefix, timeout_s=settings.timeout_s)

    def key(self, *parts: str) -> str:
        """The key of that name, which no other mesh has: `chorus:quota:alice`."""
        return self._prefix + ":".join(parts)

    def script(self, source: str) -> Script:
        """A Lua script, sent once and then called by its SHA-1; it runs atomically."""
        return Script(self, source)

    @asynccontextmanager
    async def reached(self) -> AsyncIterator[redis.Redis]:
        """The client; raises UnavailableError from whatever says that the server can't be asked, or did not answer."""
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                yield self.client
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            # The library's words may hold the URL's host, which is fine, but never the password.
            raise UnavailableError(
                f"the shared store (Valkey) can't be reached: {error or type(error).__name__}"
            ) from error

    async def close(self) -> None:
        """Closes every connection."""
        await self.client.aclose()


class Script:
    """One Lua script of a server; made by `Valkey.script`."""

    def __init__(self, valkey: Valkey, source: str) -> None:
        self._valkey = valkey
        self._script = valkey.client.register_script(source)

    async def __call__(self, keys: Sequence[str], args: Sequence[str | bytes | int | float]) -> Any:
        """What the script returns. Raises UnavailableError."""
        async with self._valkey.reached():
            return await self._script(keys=list(keys), args=list(args))


def _usable(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or not rest or scheme not in _SCHEMES or any(character.isspace() for character in url):
        raise ValueError
    return f"{_SCHEMES[scheme]}://{rest}"
