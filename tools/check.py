"""Runs every check that needs no test: style, types, layers, generated code, protos, locks.

All of them run, whichever fails; the last lines say which did.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 600.0


@dataclass(frozen=True)
class Check:
    """`fix` is what to do when it fails, where one command does it."""

    name: str
    argv: tuple[str, ...]
    fix: str = ""


def checks(release: str | None) -> list[Check]:
    """Every check, the quick ones first; `release` is the last release's tag."""
    scripts = Path(sysconfig.get_path("scripts"))
    ruff, buf, python = str(scripts / "ruff"), str(scripts / "buf"), sys.executable
    found = [
        Check("style", (ruff, "check", "--quiet", "--output-format=concise", "."), "make format"),
        Check("format", (ruff, "format", "--quiet", "--diff", "."), "make format"),
        Check("locks", (python, "tools/lock.py", "--check"), "make lock"),
        Check("protos", (buf, "lint")),
        Check("generated code", (python, "tools/protos.py", "--check"), "make protos"),
        Check("layers", (str(scripts / "lint-imports"),)),
        Check("types", (str(scripts / "mypy"), "services/chorus", "tools")),
    ]
    if release:
        against = f"{_git('rev-parse', '--git-common-dir')}#format=git,tag={release}"  # in a linked worktree, too
        found.insert(4, Check(f"protos compatible with {release}", (buf, "breaking", "--against", against)))
    return found


def last_release() -> str | None:
    """The newest release tag (v1.2.3) that this commit descends from; None before the first one, or without git."""
    return _git("describe", "--tags", "--abbrev=0", "--match", "v[0-9]*") or None


def _git(*words: str) -> str:
    """What git prints; nothing where it fails or isn't there."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)  # noqa: S607
    except OSError:
        return ""
    return done.stdout.strip()


def passes(check: Check) -> bool:
    """Runs one check and prints its line, and below it what it printed if it failed."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            check.argv,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
            check=False,
        )
        good, printed = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        good, printed = False, f"still running after {error.timeout:.0f} s; stopped it"
    print(f"  {'ok' if good else 'FAIL':<5} {check.name} ({time.monotonic() - began:.1f} s)", flush=True)
    if not good:
        print("".join(f"        {line}\n" for line in printed.rstrip().splitlines()), end="", flush=True)
    return good


def main() -> int:
    """Returns 0 if every check passed, else 1."""
    release = last_release()
    every = checks(release)
    if release is None:
        print("  --    no release tag yet: nothing for the protos to stay compatible with")
    failed = [check for check in every if not passes(check)]
    if not failed:
        print(f"All {len(every)} checks passed.")
        return 0
    print(f"\n{len(failed)} of {len(every)} checks failed:")
    for check in failed:
        print(f"  {check.name}{f': {check.fix} may fix it' if check.fix else ''}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
