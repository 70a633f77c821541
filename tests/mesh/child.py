"""Services in processes of their own, as `chorus registry` and `chorus runner` start them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

REGISTRY = """
import json, sys
from chorus.telemetry.corelog import prepare_core
prepare_core()
from chorus.config import ChorusConfig
from chorus.registry.main import run
sys.exit(run(ChorusConfig.model_validate(json.loads(sys.argv[1]))))
"""

RUNNER = """
import json, sys
from chorus.telemetry.corelog import prepare_core
prepare_core()
from chorus.config import ChorusConfig
from chorus.runner.main import run
from chorus.testing.service import make_fake_engine
sys.exit(run(ChorusConfig.model_validate(json.loads(sys.argv[1])), make_engine=make_fake_engine))
"""

COORDINATOR = REGISTRY.replace("chorus.registry.main", "chorus.coordinator.main")


class Child:
    """A process that logs JSON on standard error."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.plain: list[str] = []
        """What it wrote to standard error that is no event."""

    async def event(self, name: str) -> dict[str, Any]:
        """Reads on until the event of that name."""
        async for event in self._events():
            if event["event"] == name:
                return event
        raise AssertionError(f"the process ended before {name}: {self.plain}")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Reads the rest, and returns the exit code; negative for a signal's number."""
        async for _ in self._events():
            pass
        return await self._process.wait()

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode().rstrip("\n")
            if text.startswith("{"):
                yield json.loads(text)
            else:
                self.plain.append(text)


@asynccontextmanager
async def child(code: str, *arguments: str) -> AsyncIterator[Child]:
    """Runs `code` with `arguments`; killed at the end, if it still lives."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *arguments,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "services"), str(ROOT)])},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Child(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def configured(certs_dir: Path, trust_domain: str, **sections: Any) -> str:
    """A configuration as JSON, logging JSON."""
    mesh = {"trust_domain": trust_domain, "certs_dir": str(certs_dir)}
    return json.dumps({"mesh": mesh, "log": {"format": "json"}, **sections})
