"""llama-server for benchmarks and tests: built from the pinned sources, linked to the installed wheel's own libraries.

    .venv/bin/python tools/llama_server.py           builds it unless it is kept, and says where it is
    .venv/bin/python tools/llama_server.py --path    prints where it is kept; exit status 1 where it isn't

llama.cpp's kernels are not built again: server and runner load the very same files, so what is compared is the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import llama_backend
import llama_wheel
from console import SetupError, Step, step

ROOT = Path(__file__).resolve().parent.parent
_NAME = "llama-server"
_RECIPE = Path(__file__).with_name("llama_server.cmake")
_SOURCES = "vendor/llama.cpp/"
_BUILD_LIMIT_S = 3600.0
_TRY_LIMIT_S = 60.0


def libraries(pin: llama_wheel.Pin) -> list[Path]:
    """llama.cpp's libraries in the installed wheel, under the names that they look for each other by.

    Raises SetupError where that wheel isn't installed for this Python.
    """
    spec = importlib.util.find_spec("llama_cpp")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    advice = "Run `make setup`, then this with .venv/bin/python."
    if not folders:
        raise SetupError("llama-cpp-python is not installed for this Python", advice=advice)
    version = importlib.metadata.version("llama-cpp-python")
    if version != pin.version:
        raise SetupError(f"llama-cpp-python {version} is installed and {pin.version} is pinned", advice=advice)
    folder = Path(folders[0]) / "lib"
    found = sorted({*folder.glob("lib*.so.0"), *folder.glob("lib*.0.dylib")}) or sorted(folder.glob("lib*.dylib"))
    if not found:
        raise SetupError(f"the installed wheel has no libraries in {folder}", advice=advice)
    return found


def inputs_of(running: Mapping[str, str], shared: list[Path]) -> dict[str, str]:
    """What names a kept server: what names a wheel, the libraries that it is linked to, and how it is built."""
    return {
        **running,
        **{library.name: _sha256(library) for library in shared},
        "recipe": _sha256(_RECIPE),
    }


def kept(place: Path) -> Path | None:
    """The program in a key's folder. Folders appear whole, by one rename."""
    program = place / _NAME
    return program if program.exists() else None


def place_of() -> tuple[Path, llama_wheel.Pin, llama_backend.Backend, dict[str, str], list[Path]]:
    """Where the server for this machine and this .venv belongs, and what it is made from. Raises SetupError."""
    lock = ROOT / "requirements" / "llama.txt"
    pin, _ = llama_wheel.split_lock(lock.read_text(encoding="utf-8"))
    backend = llama_backend.pick(llama_backend.look(), os.environ.get(llama_backend.VARIABLE))
    shared = libraries(pin)
    inputs = inputs_of(llama_wheel.building_inputs(llama_wheel.running_inputs(pin, backend), backend), shared)
    name = f"{_NAME}-{pin.version}-{backend.name}-{llama_wheel.key(inputs)}"
    return llama_wheel.cache_directory() / name, pin, backend, inputs, shared


def server(current: Step) -> tuple[Path, bool]:
    """The program, built if none is kept; True beside it if it was built now. Raises SetupError if it can't be."""
    place, pin, backend, inputs, shared = place_of()
    with llama_wheel.alone(place, current):
        if found := kept(place):
            return found, False
        for left in place.parent.glob(f"{place.name}.building-*"):  # by a build that was killed; we hold its lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f"{place.name}.building-", dir=place.parent, ignore_cleanup_errors=True
        ) as scratch:
            ready = _build(pin, backend, Path(scratch), shared, current)
            (ready / "built-for.json").write_text(json.dumps(inputs, indent=2) + "\n", encoding="utf-8")
            if place.exists():  # without a program in it: left by hand
                shutil.rmtree(place)
            ready.rename(place)
        found = kept(place)
        assert found is not None
        return found, True


def _build(
    pin: llama_wheel.Pin, backend: llama_backend.Backend, scratch: Path, shared: list[Path], current: Step
) -> Path:
    """Builds into a folder of `scratch`: the program with the libraries beside it."""
    programs = llama_wheel.build_tools(ROOT / "requirements" / "build.txt", scratch, current)
    environment = llama_wheel.build_environment(programs, scratch)
    archive = llama_wheel.fetch_source(pin, programs, scratch, environment, current)
    current.say("unpacking its source")
    sources = _unpack(archive, scratch / "source")
    shutil.copyfile(_RECIPE, sources / "CMakeLists.txt")
    build = scratch / "build"
    current.say("configuring")
    definitions = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DWHEEL_LIBRARIES={shared[0].parent}",
        f"-DWHEEL_VERSION={pin.version}",
        *backend.cmake_flags,
        *os.environ.get("CMAKE_ARGS", "").split(),
    ]
    configure: list[str | Path] = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        sources,
        "-B",
        build,
        "--no-warn-unused-cli",
        *definitions,
    ]
    current.run([programs / "cmake", *configure[1:]], limit_s=300, env=environment, advice=_ADVICE)
    current.say("building")
    make: list[str | Path] = ["--build", build, "--target", _NAME]
    current.run([programs / "cmake", *make], limit_s=_BUILD_LIMIT_S, env=environment, advice=_ADVICE)
    ready = scratch / "ready"
    ready.mkdir()
    shutil.copy2(build / "bin" / _NAME, ready / _NAME)
    for library in shared:
        shutil.copy2(library, ready / library.name)
    current.say("trying it")
    current.run([ready / _NAME, "--version"], limit_s=_TRY_LIMIT_S, advice=_ADVICE)
    return ready


_ADVICE = "The log's first error says why. " + llama_wheel.NO_COMPILER_ADVICE.partition("\n")[0]


def _unpack(archive: Path, target: Path) -> Path:
    """Unpacks llama.cpp's own sources out of the source package; returns their folder."""
    with tarfile.open(archive) as package:
        members = [member for member in package if f"/{_SOURCES}" in f"{member.name}/"]
        package.extractall(target, members=members, filter="data")
    top = members[0].name.partition("/")[0] if members else ""
    sources = target / top / _SOURCES
    if not (sources / "CMakeLists.txt").exists():
        raise SetupError(f"{archive.name} carries no llama.cpp in {_SOURCES}")
    return sources


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Returns 0, or 1 where there is no server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", action="store_true", help="print where it is kept; build nothing")
    arguments = parser.parse_args()
    try:
        if arguments.path:
            found = kept(place_of()[0])
            if found is not None:
                print(found)
            return 0 if found is not None else 1
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log, step("llama-server", log) as current:
            program, built = server(current)
            current.result(f"{'built and kept' if built else 'kept'}: {program}")
    except SetupError as error:
        for line in error.tail:
            print(f"        | {line}")
        print(f"\nllama-server: {error}.\n{error.advice}".rstrip())
        return 1
    except KeyboardInterrupt:
        return 130
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        print(f"\nllama-server: {type(error).__name__}: {error}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
