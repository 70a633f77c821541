"""A model server behind HTTP, as one configures it: `KIND=URL`, checked once and never parsed again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_SHOULD_BE = "should be KIND=URL, such as ollama=http://127.0.0.1:11434 or openai=http://127.0.0.1:8000"
# Suffixes that no public name ends in: home networks, multicast DNS, clusters.
_HOUSEHOLD_SUFFIXES = (".localhost", ".local", ".lan", ".home", ".internal", ".intranet", ".home.arpa", ".ts.net")
_URL = re.compile(r"[\x21-\x7e]+")


class RemoteKind(StrEnum):
    """Which protocol a server speaks."""

    OLLAMA = "ollama"
    OPENAI = "openai"  # vLLM, llama-server and whoever else is compatible with it


_DEFAULT_URLS = {RemoteKind.OLLAMA: "http://127.0.0.1:11434"}


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """A server and its protocol. `url` has no slash at its end, and no `/v1`."""

    kind: RemoteKind
    url: str

    def __str__(self) -> str:
        return f"{self.kind}={self.url}"

    @property
    def host(self) -> str:
        """The host's name or address, without brackets."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_loopback(self) -> bool:
        """Whether the server runs on this machine."""
        ip = self._ip
        return self.host in ("localhost", "localhost.") if ip is None else ip.is_loopback

    @property
    def is_household(self) -> bool:
        """Whether the address is this machine's or a private network's. A name counts as public if it could be."""
        ip = self._ip
        if ip is not None:
            return not ip.is_global
        name = self.host.rstrip(".")
        return "." not in name or name.endswith(_HOUSEHOLD_SUFFIXES)

    @property
    def is_plaintext(self) -> bool:
        """Whether prompts cross a network without encryption on their way to it."""
        return self.url.startswith("http:") and not self.is_loopback

    @property
    def _ip(self) -> IPv4Address | IPv6Address | None:
        try:
            return ip_address(self.host.partition("%")[0])
        except ValueError:
            return None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the server that `text` spells; raises ValueError saying what is wrong with it, without repeating it.

        `ollama` alone is the one on this machine.
        """
        if "," in text:
            raise ValueError(
                "should be one server: a runner has one engine; start another runner, with a name and port of its own, "
                "for another server"
            )
        name, _, url = (part.strip() for part in text.partition("="))
        try:
            kind = RemoteKind(name.lower())
        except ValueError:
            raise ValueError(_SHOULD_BE) from None
        return cls(kind, _checked_url(url or _DEFAULT_URLS.get(kind, "")))

    @classmethod
    def _validate(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]  # a list of one server says the same
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        if not isinstance(value, str):
            raise ValueError(_SHOULD_BE)
        return cls.parse(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.to_string_ser_schema()
        )


def _checked_url(url: str) -> str:
    if not _URL.fullmatch(url):
        raise ValueError(_SHOULD_BE)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("the URL's address should be HOST or HOST:PORT, with an IPv6 host in brackets") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError("the URL should begin with http://HOST or https://HOST")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL should hold no user name or password; a key goes into runner.remote_api_key_file")
    if parts.query or parts.fragment:
        raise ValueError("the URL should hold no '?' or '#'; a key goes into runner.remote_api_key_file")
    return url.rstrip("?#").rstrip("/").removesuffix("/v1").rstrip("/")
