"""Clients of the servers under test, each as cheap as its protocol allows; what they cost is told as well.

They note when each message arrived and parse no more of it than they must. A runner's is in `grpc_client`.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `tokens` past any end of text, greedy or with the default chain and this seed."""

    prompt: str
    tokens: int
    sampled: bool = False
    seed: int = 1


@dataclass(slots=True)
class Stream:
    """When a request was sent and each message with text arrived (seconds), and how many tokens it had in the end."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one message and the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


class Client(Protocol):
    """Asks one server."""

    async def generate(self, ask: Ask, stream: Stream | None = None) -> Stream:
        """The whole stream; `stream` is filled as it comes, for who wants to look while it does. Raises `OSError`."""
        ...


class HttpClient:
    """llama-server's: server-sent events, read straight from the socket. No event is parsed as JSON but the last."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def generate(self, ask: Ask, stream: Stream | None = None) -> Stream:
        """Generates, as `Client.generate` says."""
        body: dict[str, Any] = {
            "prompt": ask.prompt,
            "n_predict": ask.tokens,
            "ignore_eos": True,
            "stream": True,
            "repeat_penalty": 1.0,
            "seed": ask.seed,
        }
        if ask.sampled:
            body |= {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
            body["samplers"] = ["top_k", "top_p", "min_p", "temperature"]
        else:  # its cheapest way to take the likeliest token
            body |= {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
        content = json.dumps(body).encode()
        head = (
            "POST /completion HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        stream = Stream(0.0) if stream is None else stream
        loop = asyncio.get_running_loop()
        stream.sent = time.perf_counter()
        transport, events = await loop.create_connection(lambda: _Events(stream), "127.0.0.1", self._port)
        try:
            transport.write(head.encode() + content)
            last = await events.ended
        finally:
            transport.abort()
        stream.tokens = int(last["tokens_predicted"])
        stream.prompt_tokens = int(last["tokens_evaluated"])
        return stream


class _Events(asyncio.Protocol):
    """Counts the events of one answer. Each ends with an empty line, which is nowhere else in the body."""

    def __init__(self, stream: Stream) -> None:
        self._arrivals = stream.arrivals
        self._rest = b""
        self._in_body = False
        self.ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        data = self._rest + data
        if not self._in_body:
            head, found, data_after = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = data
                return
            if b" 200 " not in head.partition(b"\r\n")[0]:
                self._fail(f"llama-server answered {data[:500]!r}")
                return
            self._in_body, data = True, data_after
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if b'"stop":true' not in event:
                self._arrivals.append(now)
            elif not self.ended.done():
                self.ended.set_result(json.loads(event[event.index(b"{") :]))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"llama-server hung up in the middle of an answer ({error or self._rest[:200]!r})")

    def _fail(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(why))
