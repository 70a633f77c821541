"""A registry of sorts in a process of its own, started as a service's main would start it: `python -m` by test_tls.py.

Argument: a directory with a certificate. The log is JSON on standard error; standard output gets the port, once it
serves. It ends when its standard input does.
"""

# The order matters here as in a service's main: gRPC's core reads its environment when grpc is imported.
# ruff: noqa: E402
from chorus.telemetry.corelog import core_log_events, prepare_core

assert prepare_core(), "grpc was imported too early"

import asyncio
import os
import sys
from pathlib import Path

from chorus.telemetry.logs import configure_logging
from chorus.transport import TlsIdentity, build_server
from tests.mesh.tiny_registry import tiny_registry


async def serve(directory: Path) -> None:
    server = build_server(identity=TlsIdentity.load(directory), listen=["127.0.0.1:0"], services=[tiny_registry()])
    await server.start()
    print(server.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os.write(2, b"last words of native code\n")
    await server.stop(0)


with configure_logging(service="registry", level="debug", format="json"), core_log_events():
    asyncio.run(serve(Path(sys.argv[1])))
