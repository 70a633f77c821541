"""Several processes that pull the same, one of which may die or fall asleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import chorus
from chorus.models.progress import PullPhase, PullProgress, Reporter
from chorus.models.pull import pull
from chorus.models.store import ModelStore
from tests.models.file_server import FileServer, ServedFile
from tests.models.tiny import write_model

PULL = """
import sys
from pathlib import Path
from chorus.models.pull import pull
from chorus.models.store import ModelStore
store = ModelStore.open(Path(sys.argv[2]), state_dir=Path(sys.argv[3]))
print(pull(sys.argv[1], store, lambda report: print(report.phase, flush=True)), flush=True)
"""
HOLD = """
import sys
from pathlib import Path
from chorus.models.store import ModelStore
store = ModelStore.open(Path(sys.argv[2]), state_dir=Path(sys.argv[3]))
with store.exclusive("m", "m.gguf", lease_s=float(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


class Processes:
    """Python processes on one models folder, which all end with the test."""

    def __init__(self, tmp_path: Path) -> None:
        self._arguments = [str(tmp_path / "models"), str(tmp_path / "state")]
        self._all: list[subprocess.Popen[str]] = []

    def start(self, program: str, argument: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(Path(chorus.__file__).parents[1])}
        process = subprocess.Popen(
            [sys.executable, "-c", program, argument, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._all.append(process)
        return process

    def end(self) -> None:
        for process in self._all:
            process.kill()
            process.communicate(timeout=30)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    started = Processes(tmp_path)
    yield started
    started.end()


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_model(tmp_path / "source.gguf", filler=2_000_000).read_bytes()


@pytest.fixture
def slow(server: FileServer, content: bytes) -> ServedFile:
    """Served up to its middle; the rest once the gate is opened."""
    return server.add("/m.gguf", content, gate=threading.Event(), gate_after=len(content) // 2)


def opened(served: ServedFile) -> None:
    assert served.gate is not None
    served.gate.set()


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for got in process.stdout:
        if got.strip() == line:
            return
    pytest.fail(f"the process ended without saying {line!r}")


def test_a_second_puller_waits_and_finds_the_finished_file(
    server: FileServer, slow: ServedFile, content: bytes, processes: Processes, store: ModelStore
) -> None:
    url = f"{server.url}/m.gguf"
    first = processes.start(PULL, url)
    assert slow.reached_gate.wait(60)
    second = processes.start(PULL, url)
    wait_for(second, "waiting")
    assert store.artifacts() == [], "half a file has no name"
    opened(slow)
    results = [process.communicate(timeout=60)[0].strip().splitlines()[-1] for process in (first, second)]
    assert results == [str(store.directory / "m" / "m.gguf")] * 2
    assert (first.returncode, second.returncode) == (0, 0)
    assert (store.directory / "m" / "m.gguf").read_bytes() == content
    assert len(server.requests) == 1, "it was downloaded once"


def test_one_that_is_killed_leaves_its_place_and_its_part_to_the_next(
    server: FileServer, slow: ServedFile, content: bytes, processes: Processes, store: ModelStore
) -> None:
    url = f"{server.url}/m.gguf"
    first = processes.start(PULL, url)
    assert slow.reached_gate.wait(60)
    partial = store.partial_path("m", "m.gguf")
    wait_for(first, "downloading")
    first.kill()
    first.wait(60)
    have = partial.stat().st_size
    opened(slow)
    assert pull(url, store).read_bytes() == content
    assert server.ranges("/m.gguf") == [None, f"bytes={have}-"] if have else [None, None]


def test_ctrl_c_leaves_a_part_to_go_on_from(
    server: FileServer, slow: ServedFile, content: bytes, processes: Processes, store: ModelStore
) -> None:
    url = f"{server.url}/m.gguf"
    first = processes.start(PULL, url)
    assert slow.reached_gate.wait(60)
    wait_for(first, "downloading")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    have = store.partial_path("m", "m.gguf").stat().st_size
    assert 0 < have < len(content)
    opened(slow)
    assert pull(url, store).read_bytes() == content
    assert server.ranges("/m.gguf") == [None, f"bytes={have}-"]


def test_the_place_of_one_that_sleeps_passes_on(processes: Processes, store: ModelStore) -> None:
    sleeper = processes.start(HOLD, "1.0")
    wait_for(sleeper, "held")
    sleeper.send_signal(signal.SIGSTOP)  # it lives, but renews nothing: a closed laptop, or another machine that died
    waited: list[PullProgress] = []
    with store.exclusive("m", "m.gguf", Reporter(waited.append), lease_s=1.0):
        assert waited
        assert {report.phase for report in waited} == {PullPhase.WAITING}
        assert str(sleeper.pid) in waited[0].message
    sleeper.send_signal(signal.SIGCONT)


def test_one_whose_place_was_taken_is_told_to_stop(store: ModelStore) -> None:
    reporter = Reporter()
    with store.exclusive("m", "m.gguf", reporter, lease_s=0.3):
        store.partial_path("m", "m.gguf").with_suffix(".lock").unlink()
        assert reporter.stop.wait(60)


def test_different_files_do_not_wait_for_each_other(processes: Processes, store: ModelStore) -> None:
    holder = processes.start(HOLD, "30")
    wait_for(holder, "held")
    with store.exclusive("m", "other.gguf", lease_s=30):
        pass
