"""What `chorus tune` found best, kept for each model and machine, and read when a runner loads the model.

    tuning/SHA256.MACHINE.json   in the user's data folder

A machine is known by what decides its speed (`core.tuning.variant.machine_identity`), so a folder shared by unequal
machines holds what each of them needs. What another version of llama.cpp was measured with is not used.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chorus.core.errors import ConfigError
from chorus.core.fitting.memory import CacheType

_SUFFIX = ".json"
_MAX_BYTES = 1 << 20


class Tuning(BaseModel):
    """How a model runs best on a machine. Speeds are tokens per second, of all streams together.

    `instead` is the SHA-256 of an artifact of the same family that was made from this one and runs better; empty
    where there is none. `perplexity_change` is relative to the model untuned.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer Chorus may have written more

    version: int = 1
    model: str
    family: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    machine: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    cpu: str
    llama_build: str
    offload: bool
    tuned_at: str
    threads: Annotated[int, Field(ge=1, le=1024)]
    batch_tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    micro_batch_tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    cache_type: CacheType
    streams: int
    prefill: float
    decode_one: float
    decode_many: float
    gain: float
    perplexity_change: float = 0.0
    instead: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a tuning must have been measured on to be of use here."""

    identity: str
    llama_build: str
    offload: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A tuning to go by, or None; and why one that is there is not used, else empty."""

    tuning: Tuning | None
    ignored: str = ""


def default_tuning_dir() -> Path:
    """`tuning` in the user's data folder."""
    return platformdirs.user_data_path("chorus") / "tuning"


class TuningFolder:
    """The folder of tunings; it need not exist. Holds nothing open."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or default_tuning_dir()

    def all(self) -> list[Tuning]:
        """Every readable tuning, of other machines too, by model."""
        read = [self._read(path) for path in self._paths("*")]
        return sorted((tuning for tuning in read if tuning), key=lambda tuning: (tuning.model, tuning.tuned_at))

    def find(self, sha256: str, machine: Machine) -> Found:
        """The tuning of a model on this machine. Never raises: a model runs untuned as well."""
        path = self._path(sha256, machine.identity)
        tuning = self._read(path)
        if tuning is None:
            others = [other for other in self._paths(sha256) if other != path]
            if path.exists():
                return Found(None, f"{path} is damaged; remove it")
            return Found(None, "it was tuned on another machine" if others else "")
        if tuning.llama_build != machine.llama_build:
            return Found(None, f"it was tuned with llama.cpp {tuning.llama_build}, and this is {machine.llama_build}")
        if tuning.offload != machine.offload:
            return Found(None, f"it was tuned {'with' if tuning.offload else 'without'} a graphics device")
        return Found(tuning)

    def keep(self, tuning: Tuning) -> Path:
        """Writes a tuning, whole or not at all, in place of what was known. Raises ConfigError."""
        path = self._path(tuning.sha256, tuning.machine)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.write(tuning.model_dump_json(indent=2).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror or error}") from error
        return path

    def forget(self, tuning: Tuning) -> None:
        """Removes a tuning; one that is gone already is fine. Raises ConfigError where it can't be removed."""
        path = self._path(tuning.sha256, tuning.machine)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{path} can't be removed: {error.strerror or error}") from error

    def _path(self, sha256: str, machine: str) -> Path:
        return self.directory / f"{sha256}.{machine}{_SUFFIX}"

    def _paths(self, sha256: str) -> list[Path]:
        with contextlib.suppress(OSError):
            return sorted(path for path in self.directory.glob(f"{sha256}.*{_SUFFIX}") if not path.name.startswith("."))
        return []

    def _read(self, path: Path) -> Tuning | None:
        try:
            if path.stat().st_size > _MAX_BYTES:
                return None
            return Tuning.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
