"""Writes what Chorus is installed from as a CycloneDX bill of materials (JSON, version 1.6), from the locks alone.

    python tools/sbom.py > chorus.cdx.json

Each package has its version and the SHA-256 of every file that the lock lets pass. The same locks give the same bytes:
there is no time in it, and its serial number follows from its content. Other locks than those of a running system
(base.txt, llama.txt) can be named.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parent.parent
_RUNTIME = ("base", "llama")
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)(?:\s*;\s*(.*?))?\s*\\?$")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Pin:
    """One package of a lock; `marker` says where it is installed, empty for everywhere."""

    name: str
    version: str
    marker: str
    sha256s: tuple[str, ...]


def pins(lock: str) -> Iterator[Pin]:
    """The packages of a lock's text. Raises ValueError where one has no hash."""
    for entry in re.split(r"\n(?=\S)", lock):
        found = _PIN.match(entry.partition("\n")[0])
        if entry.startswith("#") or found is None:
            continue
        sums = tuple(sorted(_HASH.findall(entry)))
        if not sums:
            raise ValueError(f"{found[1]} has no hash")
        yield Pin(found[1].lower().replace("_", "-"), found[2], (found[3] or "").strip(), sums)


def bill(packages: Iterable[Pin], *, name: str, version: str) -> str:
    """The bill of materials of a program that is installed from these, as CycloneDX JSON."""
    own = Component(name=name, version=version, type=ComponentType.APPLICATION, bom_ref=name)
    bom = Bom()
    bom.metadata.component = own
    components = []
    for pin in sorted(set(packages), key=lambda one: (one.name, one.version)):
        purl = PackageURL("pypi", None, pin.name, pin.version)
        components.append(
            Component(
                name=pin.name,
                version=pin.version,
                type=ComponentType.LIBRARY,
                bom_ref=purl.to_string(),
                purl=purl,
                properties=[
                    *(Property(name="chorus:sha256", value=digest) for digest in pin.sha256s),
                    *([Property(name="chorus:marker", value=pin.marker)] if pin.marker else []),
                ],
                # CycloneDX allows one sum of each kind, and a package has one file for each platform.
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=pin.sha256s[0])] if len(pin.sha256s) == 1 else [],
            )
        )
    bom.components.update(components)
    bom.register_dependency(own, components)
    content = "\n".join(f"{one.bom_ref.value} {sorted(str(p.value) for p in one.properties)}" for one in components)
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, content)
    bom.metadata.timestamp = None  # type: ignore[assignment]  # so that the same locks give the same bytes
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def main() -> int:
    """Prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("locks", nargs="*", default=_RUNTIME, metavar="LOCK", help="of requirements/: base, llama, ...")
    named: list[str] = parser.parse_args().locks
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    try:
        texts = [(ROOT / "requirements" / f"{lock}.txt").read_text("utf-8") for lock in named]
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}")
    found = [pin for text in texts for pin in pins(text)]
    sys.stdout.write(bill(found, name=project["name"], version=project["version"]))
    return 0


def _fail(text: str) -> int:
    sys.stderr.write(f"sbom: {text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
