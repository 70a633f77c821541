"""Files of the Hugging Face hub: found and authorised by its own client, downloaded by ours, which resumes."""

from __future__ import annotations

import os
import re

from chorus.core.errors import DownloadError
from chorus.models.sources.http import Download, download
from chorus.models.sources.offer import Offer
from chorus.models.sources.source import HubSource

_METADATA_TIMEOUT_S = 20.0
_MAX_FILES_NAMED = 12
_SHA256 = re.compile(r"[0-9a-f]{64}")


def hub_offer(source: HubSource, *, endpoint: str | None = None, allow_private: bool = False) -> Offer:
    """Asks the hub for size, digest and commit of a file. `endpoint` None is the hub, or $HF_ENDPOINT; `allow_private`
    as `Download` has it.

    The login of huggingface_hub ($HF_TOKEN, or `hf auth login`) is used where there is one. Raises DownloadError.
    """
    # The import alone takes a third of a second, which only those who ask the hub should pay.
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token = get_token()
    try:
        url = hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=endpoint)
        metadata = get_hf_file_metadata(url, token=token, timeout=_METADATA_TIMEOUT_S, endpoint=endpoint)
    except GatedRepoError as error:
        raise DownloadError(
            f"{source.repo} wants its licence accepted first: do so at https://huggingface.co/{source.repo}, "
            "then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{source.repo} has no revision {source.revision!r}") from error
    except EntryNotFoundError as error:
        raise DownloadError(
            f"{source.repo} has no file {source.file!r}{_files_there(source, endpoint, token)}"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"the hub has no repository {source.repo!r}, or it is private") from error
    except Exception as error:  # versions of huggingface_hub differ in the HTTP client whose errors come through
        raise DownloadError(f"the Hugging Face hub can't be asked for {source}: {_first_line(error)}") from error
    pinned = source.revision if metadata.commit_hash is None else metadata.commit_hash
    # The ETag of a large file is its SHA-256; that of a small one is a Git hash, which says nothing here.
    sha256 = metadata.etag if metadata.etag is not None and _SHA256.fullmatch(metadata.etag) else None
    wanted = Download(
        url=hf_hub_url(source.repo, source.file, revision=pinned, endpoint=endpoint),
        headers={} if token is None else {"Authorization": f"Bearer {token}"},
        size_bytes=metadata.size,
        sha256=sha256,
        # A hub of one's own is where somebody has put it.
        allow_private=allow_private or endpoint is not None or "HF_ENDPOINT" in os.environ,
    )
    return Offer(
        source.file.rsplit("/", 1)[-1],
        lambda partial, reporter: download(wanted, partial, reporter),
        size_bytes=metadata.size,
        sha256=sha256,
    )


def _files_there(source: HubSource, endpoint: str | None, token: str | None) -> str:
    """The model files that there are instead; empty where even that can't be asked."""
    from huggingface_hub import HfApi

    try:
        names = HfApi(endpoint=endpoint, token=token).list_repo_files(source.repo, revision=source.revision)
    except Exception:  # it was a courtesy
        return ""
    models = sorted(name for name in names if name.lower().endswith(".gguf"))
    if not models:
        return "; it has no .gguf files at all"
    more = f" and {len(models) - _MAX_FILES_NAMED} more" if len(models) > _MAX_FILES_NAMED else ""
    return f"; it has {', '.join(models[:_MAX_FILES_NAMED])}{more}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
