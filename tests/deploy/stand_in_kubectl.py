"""`kubectl` in a person's pod: the two things that docs/k3s.md has a person do with it before a mesh answers.

A Secret is read by the real kubectl, from a folder with its files, so that the template is the real one; a port is
forwarded to the Service of that name, as this pod resolves it.
"""

from __future__ import annotations

import asyncio
import os
import sys

SECRETS = "/etc/secrets"


def get_secret(name: str, template: str) -> None:
    """Becomes the real one, which makes the same Secret and prints it by the template."""
    words = ["create", "secret", "generic", name, f"--from-file={SECRETS}/{name}", "--dry-run=client", "-o", template]
    os.execv(os.environ["REAL_KUBECTL"], ["kubectl", *words])


async def forward(service: str, port: int) -> None:
    """Forwards 127.0.0.1:port to the Service, until it is ended."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(1 << 16):
            writer.write(part)
            await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(service, port)
        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    async with await asyncio.start_server(connected, "127.0.0.1", port) as server:
        sys.stdout.write(f"Forwarding from 127.0.0.1:{port} -> {port}\n")
        sys.stdout.flush()
        await server.serve_forever()


def main(words: list[str]) -> None:
    """Does what the words say, as `kubectl` would."""
    match words:
        case ["-n", "chorus", "get", "secret", name, "-o", template]:
            get_secret(name, template)
        case ["-n", "chorus", "port-forward", target, port] if target.startswith("service/"):
            asyncio.run(forward(target.removeprefix("service/"), int(port)))
        case _:
            sys.exit(f"not what the documentation has a person do: {words}")


if __name__ == "__main__":
    main(sys.argv[1:])
