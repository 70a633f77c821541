"""A supervised process does not outlive its supervisor, however that one ends.

The supervisor names itself in the child's environment, and the child ties itself to it first thing: on Linux by asking
the kernel for a signal at the parent's death (prctl PR_SET_PDEATHSIG), which needs no cooperation from either process
later; elsewhere by looking now and then whether its parent is still the same. The child does this, and not the parent
between fork and exec, because running Python there is unsafe in a process with threads, as every one with gRPC is.

PR_SET_PDEATHSIG is about the parent's thread that forked; the supervisor forks from its main thread alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

SUPERVISOR_ENV = "CHORUS_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1
_LOOK_INTERVAL_S = 0.5


def follow_supervisor(environ: Mapping[str, str]) -> None:
    """Ties this process to the supervisor named in `environ`; does nothing where none is.

    SIGKILL, not a polite signal: the supervisor stops its children politely itself, so if it has gone without doing so,
    nobody is left to see to it that they end.
    """
    text = environ.get(SUPERVISOR_ENV, "")
    if not text.isdigit():
        return
    supervisor = int(text)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_look_after, args=(supervisor,), name="lifeline", daemon=True).start()
    if os.getppid() != supervisor:  # it died before we were tied to it
        os._exit(1)


def _look_after(supervisor: int) -> None:
    while os.getppid() == supervisor:
        time.sleep(_LOOK_INTERVAL_S)
    os._exit(1)
