"""A way to a server here that can be cut without anybody being told: packets vanish, connections stay open."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class Blackhole:
    """Forwards connections to `127.0.0.1:port` from a port of its own. Use it as `async with`.

    While it is shut nothing passes in either direction; what was sent meanwhile arrives once it is open again.
    """

    def __init__(self) -> None:
        self.port = 0
        self.leads_to = 0
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self.open()
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()
        if self._serving:
            await asyncio.wait(self._serving)

    def shut(self) -> None:
        """Nothing passes any more."""
        self._open.clear()

    def open(self) -> None:
        """Everything passes again, what was held back first."""
        self._open.set()

    def cut(self) -> None:
        """Breaks every connection that there is; both ends see it, and may connect anew."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.leads_to)
        except OSError:  # nobody is there any more
            writer.close()
            return
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            self._writers.discard(writer)
            writer.close()
