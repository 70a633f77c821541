#!/usr/bin/env python3
"""Makes this checkout ready to run: .venv, the locked packages, llama.cpp for this machine, the default model.

Standard library alone, so that any Python 3 can start it; Python 3.11 or newer runs it. Every step remembers what it
was made from (`.venv/chorus-setup.json`), so a second run does nothing, in a fraction of a second.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# This file alone must be readable by an old Python: what it imports is for 3.11 and newer.
_TOOLS = Path(__file__).resolve().parent
_ADVICE = """chorus needs Python 3.11 or newer; this is {}.{}, and no newer one is on PATH.
Debian 12, Ubuntu 24.04 and later: sudo apt-get install python3 python3-venv
Fedora: sudo dnf install python3.12    macOS: brew install python@3.12    with uv: uv python install 3.12"""


def newer_python() -> str:
    """A Python that is new enough, from PATH; ends the process with advice where there is none."""
    for name in ("python3.13", "python3.12", "python3.11", "python3.14"):
        found = shutil.which(name)
        # One that is on PATH need not run: version managers put a shim there for every version that they know.
        if (
            found
            and subprocess.call([found, "-c", "import venv"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
        ):
            return found
    sys.exit(_ADVICE.format(*sys.version_info[:2]))


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever has only an older one learns it here
        python = newer_python()
        os.execv(python, [python, *sys.argv])  # noqa: S606 - no shell is meant
    sys.path.insert(0, str(_TOOLS))
    from install import main

    sys.exit(main(sys.argv[1:], root=str(_TOOLS.parent)))
