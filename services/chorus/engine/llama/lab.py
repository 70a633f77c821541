"""Asking processes that measure (`probe`): each has one file loaded, and what kills it is an error like any other."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from chorus.core.errors import EngineError
from chorus.core.tuning.figures import Quality
from chorus.core.tuning.variant import Sample, Variant
from chorus.engine.llama.measuring import Workload

_LOADED_PER_FILE_BYTE = 2.2  # a repacked model is in memory twice while it is loaded
_GRACE_S = 5.0


class Probe:
    """One process with one file loaded. Close it, or use it as a context manager."""

    def __init__(self, path: Path, *, gpu_layers: int) -> None:
        """Starts it and waits until the file is loaded. Raises `EngineError` where that fails."""
        self.path = path
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        command = [sys.executable, "-m", "chorus.engine.llama.probe", str(path), str(gpu_layers)]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, encoding="utf-8"
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions: IO[str] = self._process.stdin
        self._answers: IO[str] = self._process.stdout
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def calibrate(self, variant: Variant) -> float:
        """About how many tokens per second it reads."""
        return float(self._ask("calibrate", variant=asdict(variant))["prefill"])

    def speed(self, variant: Variant, work: Workload) -> Sample:
        """See `measuring.measure_speed`."""
        return Sample(**self._ask("speed", variant=asdict(variant), work=asdict(work)))

    def quality(self, variant: Variant, tokens: int) -> Quality:
        """See `measuring.measure_quality`."""
        return Quality(tuple(self._ask("quality", variant=asdict(variant), tokens=tokens)["blocks"]))

    def quantize(self, target: Path, quantization: str, *, threads: int) -> float:
        """See `binding.quantize`. Returns the seconds that it took."""
        asked = self._ask("quantize", target=str(target), quantization=quantization, threads=threads)
        return float(asked["seconds"])

    def close(self) -> None:
        """Ends the process, whatever it is doing. May be called twice."""
        process = self._process
        if process.poll() is None:
            with contextlib.suppress(OSError):
                self._questions.close()  # its sign to end, and to remove what is unfinished
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (self._questions, self._answers, self._stderr):
            with contextlib.suppress(OSError):
                stream.close()

    def _ask(self, what: str, **arguments: Any) -> Mapping[str, Any]:
        try:
            self._questions.write(json.dumps({"do": what, **arguments}) + "\n")
            self._questions.flush()
        except (OSError, ValueError):
            raise EngineError(self._last_words()) from None
        return self._answer()

    def _answer(self) -> Mapping[str, Any]:
        line = self._answers.readline()
        if not line:
            raise EngineError(self._last_words())
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise EngineError(told["error"])
        answer: Mapping[str, Any] = told["ok"]
        return answer

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def _last_words(self) -> str:
        code = self._process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return f"llama.cpp ended the process that measured it, {how}" + (f": {lines[-1][:200]}" if lines else "")


class Lab:
    """Keeps a probe for each file that is measured, as many at a time as memory allows: loading takes a while."""

    def __init__(self, *, gpu_layers: int) -> None:
        self._gpu_layers = gpu_layers
        self._probes: dict[Path, Probe] = {}

    def probe(self, path: Path) -> Probe:
        """The probe of a file, started if need be. Raises `EngineError`."""
        known = self._probes.get(path)
        if known is not None and known.alive:
            return known
        self.dismiss(path)
        if psutil.virtual_memory().available < _LOADED_PER_FILE_BYTE * path.stat().st_size:
            self.close()
        self._probes[path] = probe = Probe(path, gpu_layers=self._gpu_layers)
        return probe

    def dismiss(self, path: Path) -> None:
        """Ends the probe of a file, if there is one."""
        probe = self._probes.pop(path, None)
        if probe is not None:
            probe.close()

    def close(self) -> None:
        """Ends every probe."""
        for path in list(self._probes):
            self.dismiss(path)
