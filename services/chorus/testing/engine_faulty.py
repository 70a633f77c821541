"""llama.cpp with faults on demand, as `chorus runner` hosts it (`runner.engine = "faulty"`): for tests of survival.

Before each batch the file that `CHORUS_FAULT_FILE` names is looked for. Where there is one it is removed, so that only
one batch of one process meets it, and what it says happens in place of the batch.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from chorus.config import RunnerSettings
from chorus.runner.engines import HostedEngine, llama_engine

FAULT_FILE_ENV = "CHORUS_FAULT_FILE"
HANG, ABORT, DIE = "hang", "abort", "die"
"""What the file may say: a call into C that never returns, the process's end by SIGABRT, an exception that nobody
expects; or a number, which is llama.cpp's answer to the batch."""


def make_faulty_engine(settings: RunnerSettings) -> HostedEngine:
    """The engine of the configuration, with the faults."""
    from chorus.engine.llama.context import Context

    path = Path(os.environ[FAULT_FILE_ENV])
    decode = Context.decode

    def decode_or_not(self: Context, count: int) -> int:
        fault = take_fault(path)
        return decode(self, count) if fault is None else happen(fault)

    Context.decode = decode_or_not  # type: ignore[method-assign]
    return llama_engine(settings)


def take_fault(path: Path) -> str | None:
    """What the file says, if there is one; it is gone then."""
    try:
        text = path.read_text("utf-8").strip()
        path.unlink()
    except FileNotFoundError:
        return None
    return text


def happen(fault: str) -> int:
    """Lets it happen; returns llama.cpp's answer where that is the fault."""
    if fault == HANG:
        while True:
            ctypes.CDLL(None).pause()  # in C, without the interpreter's lock, as llama.cpp is
    if fault == ABORT:
        os.abort()
    if fault == DIE:
        raise RuntimeError("told to die")
    return int(fault)
