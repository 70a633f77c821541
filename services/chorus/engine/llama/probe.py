"""A process of its own that measures: what llama.cpp aborts on ends it, and not whoever asked.

    python -m chorus.engine.llama.probe MODEL GPU_LAYERS

It loads the model and then answers each line of JSON on standard input with one on standard output; what else is
printed, by llama.cpp too, goes to standard error. It ends with its standard input, however deep in C it is, and takes
an unfinished file with it. Started and asked by `lab.Probe`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from chorus.core.errors import ChorusError
from chorus.core.fitting.memory import CacheType
from chorus.core.tuning.variant import Variant
from chorus.engine.llama import binding, ggml, log, measuring

_CALIBRATION_TOKENS = 64


def variant_of(told: Mapping[str, Any]) -> Variant:
    """A variant as `asdict` and JSON have left it."""
    return Variant(**{**told, "cache_type": CacheType(told["cache_type"])})


class _Prober:
    def __init__(self, path: Path, gpu_layers: int) -> None:
        self._path = path
        self.unfinished: Path | None = None
        with log.buffers() as buffers:
            self._model = binding.Model(path, offload=ggml.Offload.anywhere(gpu_layers))
        self._weights_bytes = measuring.needed_bytes(buffers)

    def facts(self) -> dict[str, Any]:
        """What the model is, and with what it runs."""
        return {
            "generates": self._model.generates,
            "trained_context": self._model.trained_context,
            "build": binding.build(),
            "offloads": binding.supports_gpu_offload(),
        }

    def calibrate(self, variant: Mapping[str, Any]) -> dict[str, Any]:
        """About how fast it reads, in tokens per second."""
        work = measuring.Workload(
            cells=4 * _CALIBRATION_TOKENS, streams=1, prompt_tokens=_CALIBRATION_TOKENS, seconds=0
        )
        return {"prefill": measuring.measure_speed(self._model, variant_of(variant), work).prefill}

    def speed(self, variant: Mapping[str, Any], work: Mapping[str, Any]) -> dict[str, Any]:
        """A sample."""
        workload = measuring.Workload(**work)
        return asdict(
            measuring.measure_speed(self._model, variant_of(variant), workload, weights_bytes=self._weights_bytes)
        )

    def quality(self, variant: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """A quality."""
        return {"blocks": measuring.measure_quality(self._model, variant_of(variant), tokens).blocks}

    def quantize(self, target: str, quantization: str, threads: int) -> dict[str, Any]:
        """Writes the model to `target` in another quantization."""
        self.unfinished = Path(target)
        began = time.perf_counter()
        binding.quantize(self._path, self.unfinished, quantization, threads=threads)
        self.unfinished = None
        return {"seconds": time.perf_counter() - began}


def main() -> int:
    """Answers until standard input ends."""
    # Whoever asked decides what an interrupt means, and closes this process's input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    prober: _Prober | None = None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        if prober is not None and prober.unfinished is not None:
            prober.unfinished.unlink(missing_ok=True)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()

    def answer(ask: Callable[[], dict[str, Any]]) -> None:
        try:
            told: dict[str, Any] = {"ok": ask()}
        except ChorusError as error:
            told = {"error": error.message}
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    def begin() -> dict[str, Any]:
        nonlocal prober
        prober = _Prober(Path(sys.argv[1]), int(sys.argv[2]))
        return prober.facts()

    answer(begin)
    while prober is not None:
        request = json.loads(lines.get())
        name = request.pop("do")
        answer(lambda name=name, request=request: getattr(prober, name)(**request))  # type: ignore[misc]
    return 1


if __name__ == "__main__":
    sys.exit(main())
