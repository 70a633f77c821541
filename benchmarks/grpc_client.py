"""A client of a runner that speaks gRPC over one mutual-TLS connection and reads no more of it than it must.

grpc.aio costs its process 630 us a token here, on the cores that decode; reading llama-server's lines costs 260 us, and
this 290. It speaks the HTTP/2 that gRPC is made of (RFC 9113): it sends a request's frames, and of an answer's it takes
the messages apart and nothing else. No header of an answer is decoded: a stream is good if its last event says so.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
import time
from collections.abc import Mapping

from clients import Ask, Stream

from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2

_METHOD = b"/chorus.api.runner.v1.ModelRunner/Generate"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 1, 1, 4, 8
_LARGEST_WINDOW = 2**31 - 1
_CANCEL = struct.pack(">I", 8)
# What a message of the stream begins with that is a token: the fields `event` and, after its length, `delta`.
_EVENT = runner_pb2.GenerateResponse.DESCRIPTOR.fields_by_name["event"].number << 3 | 2
_DELTA = generation_pb2.GenerationEvent.DESCRIPTOR.fields_by_name["delta"].number << 3 | 2


class GrpcClient:
    """A runner's, over one connection, made by the first request."""

    def __init__(self, port: int, *, tls: ssl.SSLContext, server_name: str) -> None:
        """`tls` has the client's certificate; the server must be `server_name`."""
        self._port = port
        self._tls = tls
        self._tls.set_alpn_protocols(["h2"])
        self._server_name = server_name
        self._connection: _Connection | None = None

    async def generate(self, ask: Ask, stream: Stream | None = None) -> Stream:
        """Generates, as `Client.generate` says."""
        request = runner_pb2.GenerateRequest()
        spec = request.spec
        spec.prompt = ask.prompt
        spec.stop.max_tokens = ask.tokens
        spec.stop.ignore_eos = True
        if ask.sampled:
            spec.sampling.seed = ask.seed
        else:
            spec.sampling.temperature = 0.0
        stream = Stream(0.0) if stream is None else stream
        connection = self._connection
        if connection is None or connection.lost:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._server_name), "127.0.0.1", self._port,
                ssl=self._tls, server_hostname=self._server_name,
            )  # fmt: skip
            self._connection = connection
        stream.sent = time.perf_counter()
        number, ended = connection.ask(request.SerializeToString(), stream)
        try:
            finished = await ended
        finally:
            connection.end(number)
        usage = finished.event.finished.usage
        stream.tokens = usage.completion_token_count
        stream.prompt_tokens = usage.prompt_token_count
        return stream

    def close(self) -> None:
        """Hangs up."""
        if self._connection is not None:
            self._connection.close()


class _Answer:
    """What came of one stream: whole messages are taken at once, the beginning of one is kept."""

    __slots__ = ("_last", "_rest", "_stream", "ended")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._rest = b""
        self._last = b""
        self.ended: asyncio.Future[runner_pb2.GenerateResponse] = asyncio.get_running_loop().create_future()

    def feed(self, data: bytes, now: float) -> None:
        data = self._rest + data if self._rest else data
        place = 0
        while len(data) - place >= 5:
            end = place + 5 + int.from_bytes(data[place + 1 : place + 5], "big")
            if end > len(data):
                break
            if _is_delta(data, place + 5):
                self._stream.arrivals.append(now)
            self._last = data[place + 5 : end]
            place = end
        self._rest = data[place:]

    def end(self) -> None:
        """No more will come."""
        if self.ended.done():
            return
        response = runner_pb2.GenerateResponse.FromString(self._last)
        if response.event.HasField("finished"):
            self.ended.set_result(response)
        else:
            self.fail("the runner ended a stream before its end; its log says why")

    def fail(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(why))


def _is_delta(data: bytes, place: int) -> bool:
    if data[place] != _EVENT:
        return False
    place += 1
    while data[place] & 0x80:  # a varint's last byte alone has the highest bit unset
        place += 1
    return data[place + 1] == _DELTA


class _Connection(asyncio.Protocol):
    """HTTP/2 on one connection, as far as is needed here."""

    def __init__(self, server_name: str) -> None:
        self._transport: asyncio.Transport
        self._headers = _headers(
            {
                b":method": b"POST",
                b":scheme": b"https",
                b":path": _METHOD,
                b":authority": server_name.encode(),
                b"content-type": b"application/grpc",
                b"te": b"trailers",
            }
        )
        self._answers: dict[int, _Answer] = {}
        self._next = 1
        self._rest = b""
        self.lost = False

    def ask(self, message: bytes, stream: Stream) -> tuple[int, asyncio.Future[runner_pb2.GenerateResponse]]:
        """Sends a request; returns its number and what will be its last message."""
        number, self._next = self._next, self._next + 2
        answer = self._answers[number] = _Answer(stream)
        body = b"\0" + struct.pack(">I", len(message)) + message
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, number, self._headers) + _frame(_DATA, _END_STREAM, number, body)
        )
        return number, answer.ended

    def end(self, number: int) -> None:
        """Nobody waits for this stream any more."""
        if self._answers.pop(number, None) is not None and not self.lost:
            self._transport.write(_frame(_RST_STREAM, 0, number, _CANCEL))

    def close(self) -> None:
        """Hangs up."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = struct.pack(">HIHI", 2, 0, 4, _LARGEST_WINDOW)  # no pushes; as much as the server wants to send
        window = struct.pack(">I", _LARGEST_WINDOW - 65_535)
        transport.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW_UPDATE, 0, 0, window)
        )

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        data = self._rest + data if self._rest else data
        place = 0
        while len(data) - place >= 9:
            end = place + 9 + int.from_bytes(data[place : place + 3], "big")
            if end > len(data):
                break
            kind, flags = data[place + 3], data[place + 4]
            number = int.from_bytes(data[place + 5 : place + 9], "big")
            self._take(kind, flags, number, data[place + 9 : end], now)
            place = end
        self._rest = data[place:]

    def _take(self, kind: int, flags: int, number: int, content: bytes, now: float) -> None:
        answer = self._answers.get(number)
        if kind == _DATA and answer is not None:
            if flags & _PADDED:
                content = content[1 : len(content) - content[0]]
            answer.feed(content, now)
        if kind in (_DATA, _HEADERS) and flags & _END_STREAM and answer is not None:
            del self._answers[number]
            answer.end()
        elif kind == _RST_STREAM and answer is not None:
            answer.end()
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._transport.write(_frame(kind, _ACK, 0, content if kind == _PING else b""))
        elif kind == _GOAWAY:
            self.lost = True

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        for answer in self._answers.values():
            answer.fail(f"the runner hung up in the middle of an answer ({error})")
        self._answers.clear()


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def _headers(fields: Mapping[bytes, bytes]) -> bytes:
    """Fields in HPACK's plainest form: literals, neither indexed nor compressed (RFC 7541, 6.2.2), under 127 bytes."""
    return b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields.items())
