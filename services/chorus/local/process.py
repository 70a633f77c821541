"""One child process: started with its own log, ended politely or not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from chorus.local.lifeline import SUPERVISOR_ENV
from chorus.local.plan import ProcessPlan
from chorus.local.state import ProcessRef

_LOG_MAX_BYTES = 16 << 20
_TAIL_BYTES = 8192


class Child:
    """A running process of the mesh."""

    def __init__(self, process: asyncio.subprocess.Process, ref: ProcessRef | None) -> None:
        self._process = process
        self.ref = ref

    @classmethod
    async def start(cls, plan: ProcessPlan) -> Child:
        """Starts the service that `plan` describes; what it says goes to its log. Raises OSError."""
        log = _open_log(plan.log_file)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "chorus.cli.main",
                plan.role.value,
                "--config",
                str(plan.config_file),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(os.environ),
                # Ctrl-C in the terminal is for the supervisor, which then ends its children in order.
                start_new_session=True,
            )
        finally:
            os.close(log)
        return cls(process, ProcessRef.of(process.pid))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def wait(self) -> str:
        """Waits until it has ended; returns how, for people."""
        return describe_end(await self._process.wait())

    async def stop(self, grace_s: float) -> bool:
        """Asks it to end, and ends it after `grace_s`. Returns whether it ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
            return False
        return True

    def kill(self) -> None:
        """Ends it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def describe_end(code: int) -> str:
    """How a process with this return code ended, for people."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def log_tail(path: Path, lines: int) -> list[str]:
    """Returns the last lines of a log; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def _open_log(path: Path) -> int:
    """Opens for appending; what grew long over earlier lives is set aside first, one generation of it."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_MAX_BYTES:
            path.replace(path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The supervisor's own, without what configures Chorus: the process has that in its file, which would lose."""
    kept = {
        name: value
        for name, value in environ.items()
        if not (name.startswith("CHORUS_") and ("__" in name or name == "CHORUS_CONFIG"))
        # How a command keeps gRPC's core silent; a service hears from it whom TLS refused.
        and (name, value) != ("GRPC_VERBOSITY", "NONE")
    }
    return kept | {SUPERVISOR_ENV: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
