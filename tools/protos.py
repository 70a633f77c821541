"""Generates services/chorus/api/ from protos/; `--check` says whether what is committed is what would be generated.

Messages, services and type stubs lie at the package path of their proto, so `from chorus.api.runner.v1 import
runner_pb2` works as it stands. Only a proto with a service gets `_pb2_grpc` files.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path, PurePosixPath

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
_PROTOS = ROOT / "protos"
_OUT = ROOT / "services"
_PACKAGE = PurePosixPath("chorus/api")  # everything below it is generated
_DIFF_LINES = 40


def generate(protos: Path, package: PurePosixPath) -> dict[PurePosixPath, bytes]:
    """Everything that `protos` generates: content by path below the source root. Exits if protoc refuses a file."""
    sources = sorted(path.relative_to(protos).as_posix() for path in protos.rglob("*.proto"))
    if not sources:
        sys.exit(f"no .proto file below {protos}")
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        descriptors = scratch / "descriptors.bin"
        _protoc(protos, sources, [f"--descriptor_set_out={descriptors}"])
        files = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes()).file
        serving = [file.name for file in files if file.service]
        out = scratch / "out"
        out.mkdir()
        _protoc(protos, sources, [f"--python_out={out}", f"--mypy_out=quiet:{out}"])
        if serving:
            _protoc(protos, serving, [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"])
        made = {PurePosixPath(path.relative_to(out).as_posix()): path.read_bytes() for path in _files(out)}
    for path in [path for path in made if package not in path.parents]:
        sys.exit(f"{path} lies outside {package}: a proto's directory must be its package")
    for directory in {
        parent for path in made for parent in path.parents if parent == package or package in parent.parents
    }:
        made[directory / "__init__.py"] = b""
    return made


def _protoc(protos: Path, sources: list[str], outputs: list[str]) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    well_known = resources.files("grpc_tools") / "_proto"
    if protoc.main(["protoc", f"-I{protos}", f"-I{well_known}", *plugins, *outputs, *sources]) != 0:
        sys.exit("protoc refused the protos; its own message stands above")


def _files(root: Path) -> Iterable[Path]:
    return (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def write(made: dict[PurePosixPath, bytes], out: Path, package: PurePosixPath) -> tuple[int, int]:
    """Writes what changed below `out`, removes what nothing generates any more; returns how many of each."""
    stale = [path for path in _files(out / package) if PurePosixPath(path.relative_to(out).as_posix()) not in made]
    for path in stale:
        path.unlink()
    for directory in sorted((path for path in (out / package).rglob("*") if path.is_dir()), reverse=True):
        if directory.name != "__pycache__" and all(child.name == "__pycache__" for child in directory.iterdir()):
            for cached in directory.rglob("*.pyc"):
                cached.unlink()
            for empty in [*directory.iterdir(), directory]:
                empty.rmdir()
    written = 0
    for name, content in made.items():
        path = out / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written += 1
    return written, len(stale)


def differences(made: dict[PurePosixPath, bytes], out: Path, package: PurePosixPath) -> list[str]:
    """Lines that say how what lies below `out` differs from what would be generated; none if it doesn't."""
    there = {PurePosixPath(path.relative_to(out).as_posix()): path.read_bytes() for path in _files(out / package)}
    lines = [f"missing: {name}" for name in sorted(made.keys() - there.keys())]
    lines += [f"not generated from any proto: {name}" for name in sorted(there.keys() - made.keys())]
    for name in sorted(name for name in made.keys() & there.keys() if made[name] != there[name]):
        old, new = (text.decode(errors="replace").splitlines() for text in (there[name], made[name]))
        diff = list(difflib.unified_diff(old, new, f"{name} (committed)", f"{name} (generated)", lineterm="", n=1))
        lines += [line[:160] for line in diff[:_DIFF_LINES]]
        lines += [f"... and {len(diff) - _DIFF_LINES} more lines"] if len(diff) > _DIFF_LINES else []
    return lines


def main() -> int:
    """Returns 0, or 1 if `--check` found a difference."""
    parser = argparse.ArgumentParser(prog="tools/protos.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if services/chorus/api/ isn't up to date"
    )
    options = parser.parse_args()
    made = generate(_PROTOS, _PACKAGE)
    if options.check:
        if lines := differences(made, _OUT, _PACKAGE):
            print("\n".join(lines))
            print(f"services/{_PACKAGE} is not what protos/ generates; run `make protos` and commit it")
            return 1
        return 0
    written, removed = write(made, _OUT, _PACKAGE)
    print(f"services/{_PACKAGE}: {len(made)} files, {written} written, {removed} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
