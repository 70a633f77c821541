"""The small JSON file beside each model file that tells what it is and that it was verified."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chorus.core.errors import ModelFileError
from chorus.core.fleet.records import Tier

SUFFIX = ".json"
_MAX_BYTES = 1 << 20


class Manifest(BaseModel):
    """What is known of a stored file. `location` is set where the file itself lies outside the folder.

    `sha256` holds for the file as long as its size and its time of change are those recorded here.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer Chorus may have written more

    version: int = 1
    family: str
    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: int
    mtime_ns: int
    source: str = ""
    license: str = ""
    tier: Tier
    tags: tuple[str, ...] = ()
    location: Path | None = None

    def describes(self, stat: os.stat_result) -> bool:
        """Whether a file with this `stat` is unchanged since it was verified."""
        return stat.st_size == self.size_bytes and stat.st_mtime_ns == self.mtime_ns


def manifest_path(file: Path) -> Path:
    """Where the manifest of a stored file lies."""
    return file.with_name(file.name + SUFFIX)


def read_manifest(path: Path) -> Manifest | None:
    """Returns the manifest at `path`, or None where there is none. Raises ModelFileError where it is damaged."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelFileError(f"{path} is too large for a manifest; remove it")
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise ModelFileError(f"{path} is damaged; remove it and pull the model again") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(manifest.model_dump_json(indent=2, exclude_none=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
