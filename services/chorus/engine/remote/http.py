"""HTTP to one server: JSON there and back, and streams of lines that end when their reader goes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

import chorus
from chorus.core.errors import EngineError, InvalidRequestError
from chorus.engine.remote.failures import broken, failure
from chorus.engine.remote.settings import RemoteSettings

_CONNECT_S = 2.0
_WORK_S = 15.0
_MAX_BODY_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Asked:
    """About which model a request is, for the words of its error. `known` names the models there are."""

    model: str = ""
    context_length: int = 0
    known: str = ""


NO_MODEL = Asked()


class Http:
    """A client of one server. Every error that it raises is a `ChorusError`; redirects are not followed."""

    def __init__(self, settings: RemoteSettings) -> None:
        server = settings.server
        self.server = f"{server.kind} at {server.url}"
        headers = {"User-Agent": f"chorus/{chorus.__version__}", "Accept-Encoding": "identity"}
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        self._answer_s = settings.answer_s
        self._client = httpx.AsyncClient(
            base_url=server.url,
            headers=headers,
            # A long prompt is silence for minutes: whether the server lives, the watch tells. But one that answers the
            # watch may still have lost what was asked of it.
            timeout=httpx.Timeout(None, connect=_CONNECT_S, write=30.0, read=settings.prompt_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=15.0),
            # A proxy is for reaching the Internet, not for the next room.
            trust_env=not server.is_household,
            verify=server.url.startswith("https:"),
        )

    async def close(self) -> None:
        """Closes every connection."""
        await self._client.aclose()

    async def ask(self, path: str, body: Mapping[str, Any] | None = None, *, work: bool = False) -> Any:
        """Asks the server about itself: GET, or POST of `body`. Returns the JSON that it answers within `answer_s`.

        `work`: what is asked makes it work, and may wait for other work; it gets longer.
        """
        return await self._json(path, body, NO_MODEL, httpx.Timeout(_WORK_S if work else self._answer_s))

    async def post(self, path: str, body: Mapping[str, Any], asked: Asked) -> Any:
        """Returns the JSON that it answers. Raises `NoAnswerError` after a silence of `prompt_timeout_s`."""
        return await self._json(path, body, asked, None)

    @asynccontextmanager
    async def lines(self, path: str, body: Mapping[str, Any], asked: Asked) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines that it streams in answer to a POST. Leaving the context closes the connection at once.

        Raises `NoAnswerError` after a silence of `prompt_timeout_s`.
        """
        async with self._answer(path, body, asked, None) as response, aclosing(self._lines(response)) as lines:
            yield lines

    async def _json(
        self, path: str, body: Mapping[str, Any] | None, asked: Asked, timeout: httpx.Timeout | None
    ) -> Any:
        async with self._answer(path, body, asked, timeout) as response:
            content = await self._content(response, _MAX_BODY_BYTES)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise EngineError(f"{self.server} answered {path} with what is no JSON; is it the right server?") from None

    @asynccontextmanager
    async def _answer(
        self, path: str, body: Mapping[str, Any] | None, asked: Asked, timeout: httpx.Timeout | None
    ) -> AsyncIterator[httpx.Response]:
        request = self._request(path, body, timeout)
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            raise broken(self.server, _plain(error), slow=_slow(error), sent=sent) from error
        try:
            if response.status_code != 200:
                raise failure(
                    response.status_code,
                    await self._content(response, _MAX_ERROR_BYTES, cut=True),
                    server=self.server,
                    model=asked.model,
                    context_length=asked.context_length,
                    retry_after=response.headers.get("retry-after"),
                    known=asked.known,
                )
            yield response
        finally:
            await response.aclose()

    def _request(self, path: str, body: Mapping[str, Any] | None, timeout: httpx.Timeout | None) -> httpx.Request:
        limits = httpx.USE_CLIENT_DEFAULT if timeout is None else timeout
        try:
            return self._client.build_request("GET" if body is None else "POST", path, json=body, timeout=limits)
        except ValueError as error:
            raise InvalidRequestError("request", f"holds what cannot be said in JSON: {error}") from None

    async def _content(self, response: httpx.Response, limit: int, *, cut: bool = False) -> bytes:
        content = bytearray()
        async with aclosing(self._chunks(response)) as chunks:
            async for chunk in chunks:
                content += chunk
                if len(content) > limit:
                    if cut:
                        break
                    raise EngineError(f"{self.server} answered with over {limit} bytes")
        return bytes(content)

    async def _lines(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        # Not httpx's own lines: those end at U+2028 too, which may stand within JSON.
        held = b""
        async with aclosing(self._chunks(response)) as chunks:
            async for chunk in chunks:
                *whole, held = (held + chunk).split(b"\n")
                for line in whole:
                    if line.strip():
                        yield line.strip()
                if len(held) > _MAX_LINE_BYTES:
                    raise EngineError(f"{self.server} sent a line of over {_MAX_LINE_BYTES} bytes")
        if held.strip():
            yield held.strip()

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in response.aiter_bytes():
                yield chunk
        except httpx.HTTPError as error:
            raise broken(self.server, f"the connection broke: {_plain(error)}", slow=_slow(error)) from error


def _slow(error: httpx.HTTPError) -> bool:
    return isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout | httpx.PoolTimeout)


def _plain(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return "it cannot be reached: no answer to the connection"
    if isinstance(error, httpx.TimeoutException):
        return "it does not answer in time"
    if isinstance(error, httpx.ConnectError):
        return f"it cannot be reached: {error or 'no connection'}"
    return str(error) or type(error).__name__
