"""llama-cpp-python as a wheel built on this machine, kept and reused.

llama.cpp is compiled for the very CPU that builds it, so a kept wheel is keyed by everything that it depends on:
on another CPU it could die of an illegal instruction.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from console import SetupError, Step, elapsed
from llama_backend import Backend

_PACKAGE = "llama-cpp-python"
_BUILD_LIMIT_S = 2 * 3600.0
_FETCH_LIMIT_S = 1800.0
# Lines of /proc/cpuinfo that decide what code the compiler may write for this CPU (x86, then Arm).
_CPU_FIELDS = ("model name", "flags", "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features")
# A user's own flags change what is built.
_FLAG_VARIABLES = ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")

NO_COMPILER_ADVICE = (
    "Install a C and C++ compiler (Debian, Ubuntu: sudo apt-get install g++; Fedora: sudo dnf install gcc-c++; "
    "macOS: xcode-select --install) and run this again.\n"
    "A machine that only coordinates, or has Ollama, needs no llama.cpp: python3 tools/setup.py --no-llama"
)


@dataclass(frozen=True)
class Pin:
    """The one source release that is built: its version, and the lock's own lines for it (with the SHA-256)."""

    version: str
    requirement: str

    @property
    def sha256(self) -> str:
        return ",".join(sorted(re.findall(r"--hash=sha256:([0-9a-f]{64})", self.requirement)))


def split_lock(lock: str) -> tuple[Pin, str]:
    """Splits requirements/llama.txt into what is built here and the rest, which pip installs as it is.

    Raises SetupError if the lock doesn't pin the package by version and SHA-256.
    """
    entries = re.split(r"\n(?=[A-Za-z0-9])", lock)
    ours = [entry for entry in entries if entry.startswith(f"{_PACKAGE}==")]
    version = re.match(rf"{_PACKAGE}==([^\s;\\]+)", ours[0]) if ours else None
    if version is None or "--hash=sha256:" not in ours[0]:
        raise SetupError(
            f"requirements/llama.txt doesn't pin {_PACKAGE} by version and hash", advice="Run `make lock`."
        )
    return Pin(version[1], ours[0] + "\n"), "\n".join(entry for entry in entries if entry is not ours[0]) + "\n"


def cpu_identity(cpuinfo: str) -> str:
    """What of /proc/cpuinfo identifies the CPU: model and instruction sets, not its speed or its number."""
    fields: dict[str, set[str]] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in _CPU_FIELDS:
            # Sorted: kernels have printed the same flags in another order. A set: big.LITTLE has two kinds of core.
            fields.setdefault(name.strip(), set()).add(" ".join(sorted(value.split())))
    return "\n".join(f"{name}: {' | '.join(sorted(values))}" for name, values in sorted(fields.items()))


def key(inputs: Mapping[str, str]) -> str:
    """A short name for a set of inputs; equal only for equal inputs, whatever their order."""
    return hashlib.sha256(json.dumps(dict(sorted(inputs.items()))).encode()).hexdigest()[:24]


def running_inputs(pin: Pin, backend: Backend, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What decides whether an installed wheel still fits this machine. Starts no process."""
    return {
        "version": pin.version,
        "sdist_sha256": pin.sha256,
        "backend": backend.name,
        "cmake_flags": " ".join(backend.cmake_flags),
        **{name: environment[name] for name in _FLAG_VARIABLES if environment.get(name)},
        "python": f"{sys.implementation.cache_tag}",
        "platform": sysconfig.get_platform(),
        "libc": " ".join(platform.libc_ver()),
        "cpu": cpu_identity(_cpuinfo()),
    }


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        return path.read_text(encoding="utf-8", errors="replace")
    return f"model name: {platform.processor()} {platform.machine()}"


def _compiler() -> str:
    """The C++ compiler that CMake will take. Raises SetupError if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise SetupError("no C++ compiler was found, and llama.cpp is built from source", advice=NO_COMPILER_ADVICE)


def _says(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{argv[0]} doesn't run: {error}", advice=NO_COMPILER_ADVICE) from error
    return " ".join(done.stdout.split())


def building_inputs(running: Mapping[str, str], backend: Backend) -> dict[str, str]:
    """`running_inputs` and the compilers' versions: what names a kept wheel. Raises SetupError without a compiler."""
    inputs = {**running, "compiler": _says([_compiler(), "--version"])}
    if backend.nvcc:
        inputs["nvcc"] = _says([backend.nvcc, "--version"])
        if smi := shutil.which("nvidia-smi"):  # built for the GPUs that are here
            inputs["gpus"] = _says([smi, "--query-gpu=compute_cap", "--format=csv,noheader"])
    return inputs


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this user's wheels are kept, for every checkout alike."""
    home = environment.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "chorus" / "wheels"


@contextmanager
def alone(place: Path, step: Step) -> Iterator[None]:
    """Holds the lock of one kept build, so that two checkouts don't both make it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _BUILD_LIMIT_S
    with Path(f"{place}.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SetupError(f"another setup has held {lock.name} for {elapsed(_BUILD_LIMIT_S)}") from None
                step.say("another setup is building it; waiting for that one")
                time.sleep(1.0)
        yield


def kept(place: Path) -> Path | None:
    """The wheel in a key's directory. Directories appear whole, by one rename, so a wheel there is a whole one."""
    return next(iter(sorted(place.glob("*.whl"))), None)


def wheel(pin: Pin, backend: Backend, build_lock: Path, running: Mapping[str, str], step: Step) -> tuple[Path, bool]:
    """The wheel for this machine, built if none is kept; True beside it if it was built now.

    `build_lock` pins what builds it (requirements/build.txt). Raises SetupError if it can't be built.
    """
    inputs = building_inputs(running, backend)
    place = cache_directory() / f"{_PACKAGE}-{pin.version}-{backend.name}-{key(inputs)}"
    with alone(place, step):
        if found := kept(place):
            return found, False
        for left in place.parent.glob(f"{place.name}.building-*"):  # by a build that was killed; we hold its lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f"{place.name}.building-", dir=place.parent, ignore_cleanup_errors=True
        ) as scratch:
            built = _build(pin, backend, build_lock, Path(scratch), step)
            ready = Path(scratch) / "ready"
            ready.mkdir()
            built.rename(ready / built.name)
            (ready / "built-for.json").write_text(json.dumps(inputs, indent=2) + "\n", encoding="utf-8")
            if place.exists():  # without a wheel in it: left by hand
                shutil.rmtree(place)
            ready.rename(place)
        found = kept(place)
        assert found is not None
        return found, True


def build_tools(build_lock: Path, scratch: Path, step: Step) -> Path:
    """Makes a virtual environment in `scratch` with what `build_lock` pins; returns the folder of its programs."""
    step.say("getting the build tools")
    step.run([sys.executable, "-I", "-m", "venv", scratch / "venv"], limit_s=300)
    programs = scratch / "venv" / "bin"
    install: list[str | Path] = ["install", "--require-hashes", "--only-binary=:all:", "--no-deps", "-r", build_lock]
    step.run([*_pip(programs), *install], limit_s=_FETCH_LIMIT_S)
    return programs


def build_environment(programs: Path, scratch: Path) -> dict[str, str]:
    """The environment of a build: its programs first, and temporary files in `scratch`, which goes as a whole."""
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TMPDIR": str(scratch),
    }


def fetch_source(pin: Pin, programs: Path, scratch: Path, environment: Mapping[str, str], step: Step) -> Path:
    """Downloads the pinned source package into `scratch`, its hash checked; returns the archive."""
    requirement = scratch / "sdist.txt"
    requirement.write_text(pin.requirement, encoding="utf-8")
    step.say("fetching its source")
    fetch = ["download", "--no-deps", "--no-build-isolation", "--require-hashes", f"--no-binary={_PACKAGE}"]
    step.run(
        [*_pip(programs), *fetch, "--dest", scratch / "sdist", "-r", requirement],
        limit_s=_FETCH_LIMIT_S,
        env=environment,
        advice="If the network broke off, run this again.",
    )
    return next((scratch / "sdist").glob("*.tar.gz"))


def _pip(programs: Path) -> list[str | Path]:
    return [programs / "python", "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]


def _build(pin: Pin, backend: Backend, build_lock: Path, scratch: Path, step: Step) -> Path:
    programs = build_tools(build_lock, scratch, step)
    environment = {
        **build_environment(programs, scratch),
        # The user's own flags come last and win.
        "CMAKE_ARGS": " ".join([*backend.cmake_flags, os.environ.get("CMAKE_ARGS", "")]).strip(),
        "CMAKE_GENERATOR": "Ninja",
    }
    if backend.nvcc:
        environment.setdefault("CUDACXX", backend.nvcc)
    source = fetch_source(pin, programs, scratch, environment, step)
    step.say("configuring")
    # pip's wheel cache is keyed by the source's address alone: it would hand over a wheel made with other flags.
    make = ["wheel", "-v", "--no-cache-dir", "--no-index", "--no-deps", "--no-build-isolation"]
    step.run(
        [*_pip(programs), *make, "--wheel-dir", scratch / "wheel", source],
        limit_s=_BUILD_LIMIT_S,
        env=environment,
        advice=_build_advice(backend),
    )
    return next((scratch / "wheel").glob("*.whl"))


def _build_advice(backend: Backend) -> str:
    if backend.name == "cpu":
        return "The log's first error says why. " + NO_COMPILER_ADVICE
    return (
        "The log's first error says why. To go on without the GPU: CHORUS_LLAMA_BACKEND=cpu make setup\n"
        f"({backend.name} was picked because {backend.why}.)"
    )
