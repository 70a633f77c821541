"""The folder in which models are kept.

    FAMILY/FILE.gguf        the model; here only once it is whole and verified
    FAMILY/FILE.gguf.json   its manifest
    .partial/               files on their way in, and the locks of those who bring them

Files that somebody put there by hand are found as well, in the folder or one below; their digest is computed once and
remembered in the state folder. LoRA adapters are found in the same places, such as a folder `adapters`, and belong to
the models that they fit. The folder may be read-only, or shared between machines.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import platformdirs
from filelock import SoftFileLease, Timeout

from chorus.core.errors import ChorusError, ConfigError, DownloadError, ModelFileError, NotFoundError, UnknownModelError
from chorus.core.fleet.records import Artifact
from chorus.models.adapters import ADAPTER_KIND, AdapterInfo, belonging, read_adapter
from chorus.models.digest import DigestCache, Progress
from chorus.models.gguf import GgufInfo, artifact_of, inspect
from chorus.models.manifest import Manifest, manifest_path, read_manifest, write_manifest
from chorus.models.naming import GGUF_SUFFIX, checked_family, checked_file_name
from chorus.models.progress import PullPhase, Reporter

_PARTIAL = ".partial"
_LEASE_S = 30.0
_POLL_S = 0.5
_LONGEST_WAIT_S = 12 * 3600.0


_Stamped: TypeAlias = tuple[tuple[int, int, int], AdapterInfo]


def default_models_dir() -> Path:
    """`models` in the user's data folder, as the configuration's runner.models_dir is by default."""
    return platformdirs.user_data_path("chorus") / "models"


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """A model on this machine: what it is, where its file lies, what the file tells, and where it came from."""

    artifact: Artifact
    path: Path
    info: GgufInfo
    place: Path  # what stands for it in the folder; `path` itself, unless the file lies elsewhere
    source: str = ""

    @property
    def referenced(self) -> bool:
        """Whether the file lies outside the folder, and stays there when the model is removed."""
        return self.path != self.place


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A LoRA adapter on this machine, and the files of the models it belongs to."""

    info: AdapterInfo
    stamp: tuple[int, int, int]  # another one once the file is
    models: tuple[Path, ...]

    @property
    def place(self) -> Path:
        """Its file, in the folder."""
        return self.info.path


@dataclass(frozen=True, slots=True)
class BrokenFile:
    """A file in the folder that can't be used, and why."""

    place: Path
    problem: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All that the folder holds."""

    artifacts: tuple[StoredArtifact, ...]
    broken: tuple[BrokenFile, ...]
    adapters: tuple[StoredAdapter, ...] = ()

    def adapters_of(self, stored: StoredArtifact) -> tuple[StoredAdapter, ...]:
        """The adapters that belong to a model."""
        return tuple(adapter for adapter in self.adapters if stored.path in adapter.models)


class ModelStore:
    """A models folder. Holds nothing open; several processes may use one folder, also over a network file system."""

    def __init__(self, directory: Path, digests: DigestCache) -> None:
        self.directory = directory
        self._digests = digests
        self._infos: dict[Path, tuple[tuple[int, int, int], GgufInfo]] = {}
        self._adapters: dict[Path, _Stamped] = {}

    @classmethod
    def open(cls, directory: Path | None = None, *, state_dir: Path | None = None) -> ModelStore:
        """Opens a folder, which need not exist yet; by default the user's own.

        Raises ConfigError where the path is something else than a folder.
        """
        directory = (directory or default_models_dir()).absolute()
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"{directory} should be a folder for models, but is a file")
        state = state_dir or platformdirs.user_state_path("chorus")
        return cls(directory, DigestCache(state / "digests.sqlite"))

    # --- what is there ----------------------------------------------------------------------------------------------

    def artifacts(self, progress: Progress | None = None) -> list[StoredArtifact]:
        """Every sound model, by family and name. Computes digests that aren't known, which can take a while."""
        return list(self.scan(progress).artifacts)

    def scan(self, progress: Progress | None = None) -> Listing:
        """Everything in the folder, what is broken included."""
        found: list[StoredArtifact] = []
        broken: list[BrokenFile] = []
        adapters: list[_Stamped] = []
        for file in self._files():
            try:
                adapter = self._known_adapter(file)
                stored = None if adapter is not None else self._stored(file, progress)
            except ChorusError as error:
                if error.metadata.get("kind") == ADAPTER_KIND:
                    adapter, stored = self._adapter(file, broken), None
                else:
                    broken.append(BrokenFile(file, str(error)))
                    continue
            if stored is not None:
                found.append(stored)
            if adapter is not None:
                adapters.append(adapter)
        found.sort(key=lambda stored: (stored.artifact.family, stored.artifact.name, str(stored.path)))
        placed = self._placed(adapters, found, broken)
        return Listing(tuple(found), tuple(broken), placed)

    def find(self, name: str) -> StoredArtifact:
        """Finds a model by artifact name, file name, family or `family:quantization`, in any case of letters.

        A family stands for the first of its artifacts. Raises UnknownModelError that names what there is.
        """
        wanted = name.strip().lower()
        stored = self.artifacts()
        for matches in (_is_artifact, _is_family):
            for candidate in stored:
                if matches(candidate.artifact, wanted):
                    return candidate
        there_are = ", ".join(candidate.artifact.name for candidate in stored) or "none yet"
        raise UnknownModelError(f"no model {name[:100]!r} in {self.directory}; there are: {there_are}")

    def lookup(self, family: str, file_name: str) -> StoredArtifact | None:
        """The model of exactly this family and file, or None. Raises ModelFileError where it is there but broken."""
        file = self.path_for(family, file_name)
        return self._stored(file, None) if file.exists() or manifest_path(file).exists() else None

    def path_for(self, family: str, file_name: str) -> Path:
        """Where a file has its place. Raises InvalidRequestError for names that aren't plain."""
        return self.directory / checked_family(family) / checked_file_name(file_name)

    # --- bringing in and taking out ---------------------------------------------------------------------------------

    def partial_path(self, family: str, file_name: str) -> Path:
        """Where a file is put together before it has its name. The folder exists afterwards."""
        final = self.path_for(family, file_name)
        partial = self.directory / _PARTIAL / f"{final.parent.name}--{final.name}.part"
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{partial.parent} can't be made: {error.strerror or error}") from error
        return partial

    @contextlib.contextmanager
    def exclusive(
        self, family: str, file_name: str, reporter: Reporter | None = None, *, lease_s: float = _LEASE_S
    ) -> Iterator[None]:
        """Holds the right to bring in this file; waits while another process, also on another machine, holds it.

        The right is a lease: its holder renews it every third of `lease_s`, and one that wasn't renewed for so long
        passes to the next in line, so a machine that died blocks nobody for longer. Where a holder only seemed dead,
        `reporter.stop` is set in it. Until it looks, two may write the same bytes to the same places, and what comes
        of it is verified. Raises DownloadError after 12 hours.
        """
        reporter = reporter or Reporter()
        lock = self.partial_path(family, file_name).with_suffix(".lock")
        lease = SoftFileLease(
            lock, lease_duration=lease_s, poll_interval=_POLL_S, on_compromise=lambda _: reporter.stop.set()
        )
        waited = 0.0
        while True:
            try:
                lease.acquire(timeout=_POLL_S)
                break
            except Timeout:
                waited += _POLL_S
                if waited > _LONGEST_WAIT_S:
                    raise DownloadError(
                        f"another process has been pulling {file_name} for hours; if there is none, remove {lock}"
                    ) from None
                reporter.report(
                    PullPhase.WAITING, message=f"another process (pid {lease.pid or '?'}) is pulling {file_name}"
                )
            except OSError as error:
                raise ConfigError(f"{lock} can't be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            lease.release()

    def commit(self, partial: Path, manifest: Manifest) -> Path:
        """Gives a whole, verified file its name. The manifest comes first, so nobody sees the file without it."""
        final = self.path_for(manifest.family, manifest.file)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _sync_file(partial)
            write_manifest(manifest_path(final), manifest)
            partial.replace(final)
            _sync_directory(final.parent)
        except OSError as error:
            raise DownloadError(f"{final} can't be written: {error.strerror or error}") from error
        return final

    def refer(self, manifest: Manifest) -> Path:
        """Records a verified file that stays where it is (`manifest.location`)."""
        if manifest.location is None:
            raise ModelFileError("a reference needs the location of its file")
        final = self.path_for(manifest.family, manifest.file)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(manifest_path(final), manifest)
            _sync_directory(final.parent)
        except OSError as error:
            raise DownloadError(f"{final.parent} can't be written: {error.strerror or error}") from error
        return manifest.location

    def remove(self, entry: StoredArtifact | StoredAdapter | BrokenFile) -> tuple[Path, ...]:
        """Removes what stands for a model or an adapter in the folder; returns the files that went.

        A referenced file stays. Raises NotFoundError where nothing is left to remove, ConfigError where it can't be.
        """
        place = entry.place
        if ".." in place.parts or place.parent not in (self.directory, self.directory / place.parent.name):
            raise NotFoundError(f"{place} is not in the models folder {self.directory}")
        removed = []
        try:
            for path in (place, manifest_path(place)):
                if path.is_symlink() or path.exists():
                    path.unlink()
                    removed.append(path)
        except OSError as error:
            raise ConfigError(f"{place} can't be removed: {error.strerror or error}") from error
        if not removed:
            raise NotFoundError(f"{place.name} is gone already")
        if place.parent != self.directory:
            with contextlib.suppress(OSError):  # other files of the family may be left
                place.parent.rmdir()
        self._digests.forget(place)
        return tuple(removed)

    # --- within -----------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        """The files of models, and the places of those referenced."""
        if not self.directory.is_dir():
            return []
        files: set[Path] = set()
        try:
            folders = [self.directory, *(entry for entry in self.directory.iterdir() if entry.is_dir())]
            for folder in folders:
                if folder.name.startswith("."):
                    continue
                for entry in folder.iterdir():
                    if entry.name.startswith("."):
                        continue
                    if entry.name.lower().endswith(GGUF_SUFFIX):
                        files.add(entry)
                    elif entry.name.lower().endswith(f"{GGUF_SUFFIX}.json"):
                        files.add(entry.with_suffix(""))
        except OSError as error:
            raise ConfigError(f"the models folder {self.directory} can't be read: {error.strerror or error}") from error
        return sorted(files)

    def _stored(self, file: Path, progress: Progress | None) -> StoredArtifact | None:
        """What lies at `file`; None for the manifest of a pull that was interrupted before its last step."""
        try:
            return self._stored_file(file, progress)
        except OSError as error:
            raise ModelFileError(f"{file} can't be read: {error.strerror or error}") from error

    def _stored_file(self, file: Path, progress: Progress | None) -> StoredArtifact | None:
        manifest = read_manifest(manifest_path(file))
        path = file
        if manifest is not None and manifest.location is not None:
            path = manifest.location
            if not path.exists():
                raise ModelFileError(f"{file.name} refers to {path}, which is gone; remove the model or bring it back")
        elif not path.exists():
            return None
        info = self._inspect(path)
        sha256 = self._digest(path, manifest, progress)
        artifact = artifact_of(info, sha256, file_name=file.name)
        if manifest is not None:
            artifact = replace(
                artifact,
                family=manifest.family,
                tags=manifest.tags,
                tier=manifest.tier,
                license=manifest.license or info.license,
            )
        return StoredArtifact(artifact, path, info, file, manifest.source if manifest else str(path))

    def _known_adapter(self, file: Path) -> _Stamped | None:
        """What was read of an adapter before, where the file is still the same."""
        known = self._adapters.get(file)
        if known is not None:
            with contextlib.suppress(OSError):
                if known[0] == _stamp_of(file):
                    return known
            del self._adapters[file]
        return None

    def _adapter(self, file: Path, broken: list[BrokenFile]) -> _Stamped | None:
        try:
            checked_file_name(file.name)
            stamp = _stamp_of(file)
            info = read_adapter(file)
        except (ChorusError, OSError) as error:
            broken.append(BrokenFile(file, str(error)))
            return None
        self._adapters[file] = known = (stamp, info)
        return known

    @staticmethod
    def _placed(
        adapters: list[_Stamped], found: list[StoredArtifact], broken: list[BrokenFile]
    ) -> tuple[StoredAdapter, ...]:
        """Each adapter with its models; one that has none, or a name that is taken there, counts as broken."""
        families = {stored.path: stored.artifact.family for stored in found}
        taken: dict[tuple[Path, str], Path] = {}
        placed = []
        for stamp, info in adapters:
            try:
                models = [model.path for model in belonging(info, [stored.info for stored in found], families)]
            except ChorusError as error:
                broken.append(BrokenFile(info.path, str(error)))
                continue
            first = next((taken[model, info.name] for model in models if (model, info.name) in taken), None)
            if first is not None:
                broken.append(BrokenFile(info.path, f"{first} has this name already; give one of them another"))
                continue
            taken.update({(model, info.name): info.path for model in models})
            placed.append(StoredAdapter(info, stamp, tuple(models)))
        return tuple(placed)

    def _inspect(self, path: Path) -> GgufInfo:
        key = _stamp_of(path)
        known = self._infos.get(path)
        if known is None or known[0] != key:
            known = self._infos[path] = (key, inspect(path))
        return known[1]

    def _digest(self, path: Path, manifest: Manifest | None, progress: Progress | None) -> str:
        if manifest is None:
            return self._digests.sha256(path, progress)
        if manifest.describes(path.stat()):
            return manifest.sha256
        # Copied or touched, or altered: only its content tells.
        sha256 = self._digests.sha256(path, progress)
        if sha256 != manifest.sha256:
            raise ModelFileError(f"{path} is not what was pulled (its SHA-256 differs); remove it and pull it again")
        return sha256


def _stamp_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced or written to: its size, time and number. Raises OSError."""
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _is_artifact(artifact: Artifact, wanted: str) -> bool:
    name = artifact.name.lower()
    return wanted in (name, name + GGUF_SUFFIX, f"{artifact.family}:{artifact.quantization}".lower())


def _is_family(artifact: Artifact, wanted: str) -> bool:
    return artifact.family.lower() == wanted


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    # Some network file systems can't sync a directory; the rename is then as durable as they make it.
    with contextlib.suppress(OSError):
        _sync_file(path)
