"""Bringing a model into the folder: resumable, verified, atomic, and by one process at a time.

A file is put together under `.partial/` and gets its name only when its digest and its GGUF head are found right. So
whatever interrupts a pull, nobody ever sees half a file, and the next pull goes on from what arrived.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chorus.core.errors import DownloadError, InvalidRequestError, ModelFileError
from chorus.models.catalog import Catalog, CatalogArtifact, CatalogFamily
from chorus.models.digest import sha256_of
from chorus.models.gguf import GgufInfo, artifact_of, inspect
from chorus.models.manifest import Manifest
from chorus.models.naming import GGUF_SUFFIX, family_of_file
from chorus.models.progress import ProgressCallback, PullPhase, Reporter
from chorus.models.sources import http
from chorus.models.sources.hub import hub_offer
from chorus.models.sources.offer import ImportMode, Offer, local_offer
from chorus.models.sources.ollama import ollama_offer
from chorus.models.sources.package import package_offer
from chorus.models.sources.source import (
    HubSource,
    OllamaSource,
    PackageSource,
    PathSource,
    Source,
    UrlSource,
    is_source,
    parse_source,
)
from chorus.models.store import ModelStore, StoredArtifact

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PullOptions:
    """What a caller may choose. `sha256` is the digest that the file must have, 64 lower-case hexadecimal digits.

    `hub_endpoint` and `ollama_folders` None are the usual ones. `allow_private`: a source that looks public may lead to
    private addresses.
    """

    mode: ImportMode = ImportMode.LINK
    sha256: str | None = None
    hub_endpoint: str | None = None
    ollama_folders: Sequence[Path] | None = None
    allow_private: bool = False


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be brought in, and from where."""

    sources: tuple[Source, ...]
    sha256: str | None
    entry: tuple[CatalogFamily, CatalogArtifact] | None


def pull(
    name_or_source: str,
    store: ModelStore,
    progress: ProgressCallback | None = None,
    *,
    catalog: Catalog | None = None,
    options: PullOptions | None = None,
) -> Path:
    """Brings a model into `store` and returns its file; one that is there already costs nothing.

    `name_or_source` is a name of the catalog or a source (see `sources.source`). May be called again after whatever
    went wrong; KeyboardInterrupt is fine at any moment. Raises UnknownModelError, InvalidRequestError, DownloadError,
    ModelFileError (not a model, or not the one expected), ConfigError (the folder).
    """
    return pull_artifact(name_or_source, store, progress, catalog=catalog, options=options).path


def pull_artifact(
    name_or_source: str,
    store: ModelStore,
    progress: ProgressCallback | None = None,
    *,
    catalog: Catalog | None = None,
    options: PullOptions | None = None,
) -> StoredArtifact:
    """As `pull`, with all that is known of the model."""
    catalog = catalog or Catalog.load()
    options = options or PullOptions()
    if options.sha256 is not None and not _SHA256.fullmatch(options.sha256):
        raise InvalidRequestError("sha256", "should be 64 lower-case hexadecimal digits")
    reporter = Reporter(progress)
    stored = _Pull(store, catalog, options, reporter).run(_wanted(name_or_source, catalog, options))
    reporter.report(PullPhase.DONE, stored.artifact.size_bytes, stored.artifact.size_bytes)
    return stored


def _wanted(text: str, catalog: Catalog, options: PullOptions) -> _Wanted:
    if is_source(text):
        source = parse_source(text)
        told = source.sha256 if isinstance(source, UrlSource) else None
        return _Wanted((source,), options.sha256 or told, None)
    family, artifact = catalog.find(text)
    return _Wanted(
        tuple(parse_source(source) for source in artifact.sources),
        options.sha256 or artifact.sha256,
        (family, artifact),
    )


class _Pull:
    """One pull. Sources are tried in order; the first that has the file is taken."""

    def __init__(self, store: ModelStore, catalog: Catalog, options: PullOptions, reporter: Reporter) -> None:
        self._store = store
        self._catalog = catalog
        self._options = options
        self._reporter = reporter

    def run(self, wanted: _Wanted) -> StoredArtifact:
        if wanted.entry is not None:
            family, artifact = wanted.entry
            present = self._present(family.name, artifact.file, wanted.sha256)
            if present is not None:
                return present
        problems: list[str] = []
        for source in wanted.sources:
            try:
                return self._from(source, wanted)
            except DownloadError as error:
                if len(wanted.sources) == 1:
                    raise
                problems.append(str(error))
        raise DownloadError("; ".join(problems))

    def _from(self, source: Source, wanted: _Wanted) -> StoredArtifact:
        self._reporter.report(PullPhase.RESOLVING, message=str(source))
        offer = self._offer(source, wanted)
        if wanted.sha256 and offer.sha256 and wanted.sha256 != offer.sha256:  # better known before 20 GB than after
            raise DownloadError(
                f"{source} has another version: its SHA-256 is {offer.sha256}, but should be {wanted.sha256}"
            )
        expected = wanted.sha256 or offer.sha256
        entry = wanted.entry or (self._catalog.find_digest(expected) if expected else None)
        file = entry[1].file if entry else _safe_name(offer.file)
        family = entry[0].name if entry else family_of_file(file)
        with self._store.exclusive(family, file, self._reporter):
            present = self._present(family, file, expected)
            if present is not None:
                return present
            if offer.local is not None and self._options.mode is ImportMode.REFERENCE:
                partial = offer.local
            else:
                partial = self._store.partial_path(family, file)
                offer.fetch(partial, self._reporter)
            sha256 = self._verified(partial, offer, expected)
            info = self._inspected(partial, source, offer)
            manifest = self._manifest(partial, sha256, info, family, file, source)
            if partial == offer.local:
                self._store.refer(manifest.model_copy(update={"location": partial}))
            else:
                self._store.commit(partial, manifest)
                http.record_path(partial).unlink(missing_ok=True)
        stored = self._store.lookup(family, file)
        if stored is None:
            raise DownloadError(f"{file} was removed by somebody right after it was pulled")
        return stored

    def _offer(self, source: Source, wanted: _Wanted) -> Offer:
        mode = self._options.mode
        file = wanted.entry[1].file if wanted.entry else None
        match source:
            case HubSource():
                options = self._options
                return hub_offer(source, endpoint=options.hub_endpoint, allow_private=options.allow_private)
            case UrlSource():
                size = wanted.entry[1].size_bytes if wanted.entry else None
                request = http.Download(
                    source.url, size_bytes=size, sha256=wanted.sha256, allow_private=self._options.allow_private
                )
                return Offer(
                    source.file,
                    lambda partial, reporter: http.download(request, partial, reporter),
                    size_bytes=size,
                    sha256=wanted.sha256,
                )
            case PackageSource():
                return package_offer(source, file, mode)
            case OllamaSource():
                return ollama_offer(source, mode, folders=self._options.ollama_folders)
            case PathSource():
                return local_offer(source.path, source.path.name, mode)

    def _present(self, family: str, file: str, expected: str | None) -> StoredArtifact | None:
        """The model, if it is here already and is the one wanted; a broken or other one will be replaced."""
        try:
            stored = self._store.lookup(family, file)
        except ModelFileError:
            return None
        if stored is None or (expected is not None and stored.artifact.sha256 != expected):
            return None
        return stored

    def _verified(self, partial: Path, offer: Offer, expected: str | None) -> str:
        """The digest of the file, which is the expected one. What was resumed and is wrong is fetched afresh once."""
        sha256 = self._digest(partial)
        if expected is None or sha256 == expected:
            return sha256
        if partial != offer.local:
            http.forget(partial)
            if offer.local is None:
                offer.fetch(partial, self._reporter)
                sha256 = self._digest(partial)
                if sha256 == expected:
                    return sha256
                http.forget(partial)
        raise ModelFileError(
            f"{offer.file} has the SHA-256 {sha256}, but should have {expected}; it was altered, or is another version",
            metadata={"sha256": sha256, "expected_sha256": expected},
        )

    def _digest(self, path: Path) -> str:
        return sha256_of(path, lambda done, total: self._reporter.report(PullPhase.VERIFYING, done, total))

    def _inspected(self, partial: Path, source: Source, offer: Offer) -> GgufInfo:
        try:
            return inspect(partial)
        except ModelFileError as error:
            if partial != offer.local:
                http.forget(partial)
            problem = str(error).removeprefix(f"{partial}").lstrip(": ")
            raise ModelFileError(f"{source}: {problem}") from error

    def _manifest(self, partial: Path, sha256: str, info: GgufInfo, family: str, file: str, source: Source) -> Manifest:
        entry = self._catalog.find_digest(sha256)
        artifact = artifact_of(info, sha256, family=family, file_name=file, tags=entry[0].tags if entry else None)
        try:
            stat = partial.stat()
        except OSError as error:
            raise DownloadError(f"{partial} is gone: {error.strerror or error}") from error
        return Manifest(
            family=family,
            file=file,
            sha256=sha256,
            size_bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            source=str(source),
            license=entry[0].license if entry else artifact.license,
            tier=entry[0].tier if entry else artifact.tier,
            tags=artifact.tags,
        )


def _safe_name(file: str) -> str:
    """A file's name made fit for the folder: what people call their files has spaces and brackets in it."""
    stem = file[: -len(GGUF_SUFFIX)] if file.lower().endswith(GGUF_SUFFIX) else file
    cleaned = re.sub(r"\.{2,}", ".", _UNSAFE.sub("-", stem)).strip("-._")[:180]
    return f"{cleaned or 'model'}{GGUF_SUFFIX}"
