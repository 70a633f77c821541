"""Running other programs without holding up the mesh, which lives on the test's event loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any


async def run(*command: str, timeout_s: float = 60.0) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def run_json_lines(*command: str) -> list[dict[str, Any]]:
    """The JSON objects that a command prints, one a line; it must succeed."""
    code, out, err = await run(*command)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]
