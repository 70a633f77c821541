"""A server with OpenAI's API that streams words without token ids, as a program: what a remote engine may be.

python text_server.py PORT

A prompt is answered with `w0 w1 ... w59`, ten words a second; one that ends with some of them, with the rest.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading

WORDS = 60
_PER_SECOND = 10
_MODEL = {"id": "words", "object": "model", "owned_by": "bench"}


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = re.search(r"content-length: *(\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1])) if length else b""
            path = head.split(" ", 2)[1]
            if path == "/v1/models":
                _answer(writer, 200, {"object": "list", "data": [_MODEL]})
            elif path == "/v1/completions":
                await _complete(writer, json.loads(body))
                return
            else:
                _answer(writer, 404, {"error": {"message": f"there is no {path} here"}})
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        return
    finally:
        writer.close()


def _answer(writer: asyncio.StreamWriter, status: int, content: object) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


async def _complete(writer: asyncio.StreamWriter, asked: dict[str, str]) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
    begin = len(re.findall(r"w\d+ ", asked["prompt"]))
    for number in range(begin, WORDS):
        await asyncio.sleep(1 / _PER_SECOND)
        _tell(writer, {"choices": [{"index": 0, "text": f"w{number} ", "finish_reason": None}]})
        await writer.drain()
    usage = {"prompt_tokens": 3, "completion_tokens": WORDS - begin, "total_tokens": WORDS - begin + 3}
    _tell(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}], "usage": usage})
    writer.write(b"data: [DONE]\n\n")
    await writer.drain()


def _tell(writer: asyncio.StreamWriter, event: object) -> None:
    writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")


async def main() -> None:
    """Serves until it is killed, or whoever started it has ended."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    async with await asyncio.start_server(_serve, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()


def _end_with_starter() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
