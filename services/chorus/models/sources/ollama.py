"""Models that Ollama has on this machine: its manifests name blobs by their SHA-256, and the model's blob is GGUF."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from chorus.core.errors import DownloadError
from chorus.models.sources.offer import ImportMode, Offer, local_offer
from chorus.models.sources.source import OllamaSource

_MODEL_LAYER = "application/vnd.ollama.image.model"
_MAX_MANIFEST_BYTES = 1 << 20


def ollama_folders() -> list[Path]:
    """Where Ollama keeps models, the likeliest first: $OLLAMA_MODELS, the user's own, and that of its Linux service."""
    named = os.environ.get("OLLAMA_MODELS")
    usual = [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    return [Path(named).expanduser()] if named else usual


def ollama_offer(source: OllamaSource, mode: ImportMode, *, folders: Sequence[Path] | None = None) -> Offer:
    """Finds the model in the first of `folders` that has it. Raises DownloadError that names what there is."""
    folders = ollama_folders() if folders is None else folders
    for folder in folders:
        manifest = folder / "manifests" / source.host / source.namespace / source.name / source.tag
        try:
            if manifest.stat().st_size > _MAX_MANIFEST_BYTES:
                raise DownloadError(f"{manifest} is too large for a manifest of Ollama's")
            text = manifest.read_text(encoding="utf-8")
        except OSError:
            continue
        sha256 = _model_digest(text, manifest)
        return local_offer(folder / "blobs" / f"sha256-{sha256}", _file_name(source), mode, sha256=sha256)
    there_are = ", ".join(ollama_models(folders)) or "no models"
    raise DownloadError(
        f"Ollama has no {source.name}:{source.tag} in {' or '.join(map(str, folders))}; there are: {there_are}"
    )


def ollama_models(folders: Sequence[Path] | None = None) -> list[str]:
    """The models that Ollama has on this machine, as `ollama list` names them; empty where there is no Ollama."""
    names = []
    for folder in ollama_folders() if folders is None else folders:
        root = folder / "manifests"
        for manifest in sorted(root.glob("*/*/*/*")):
            host, namespace, name, tag = manifest.relative_to(root).parts
            prefix = "" if namespace == "library" else f"{namespace}/"
            if host != "registry.ollama.ai":
                prefix = f"{host}/{namespace}/"
            names.append(f"{prefix}{name}:{tag}")
    return names


def _model_digest(text: str, manifest: Path) -> str:
    try:
        for layer in json.loads(text)["layers"]:
            if layer["mediaType"] == _MODEL_LAYER:
                kind, _, digest = layer["digest"].partition(":")
                if kind == "sha256" and len(digest) == 64 and set(digest) <= set("0123456789abcdef"):
                    return str(digest)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise DownloadError(f"{manifest} names no model file; is it an Ollama manifest?")


def _file_name(source: OllamaSource) -> str:
    return f"{source.name}.gguf" if source.tag == "latest" else f"{source.name}-{source.tag}.gguf"
