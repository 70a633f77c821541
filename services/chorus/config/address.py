"""Where to listen and whom to dial, as values that are checked once and never parsed again."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Host names of containers hold underscores, which DNS resolvers accept though the standard for host names does not.
_HOST_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_IPV6_TEXT = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")  # the part after % is a network interface
_PORT = re.compile(r"[0-9]{1,5}")


def is_dns_label(text: str) -> bool:
    """Whether `text` is one lower-case DNS label, as every service's name is: it becomes part of its certificate."""
    return _DNS_LABEL.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class _Address(ABC):
    """What both kinds share. `host` is a DNS name or an IP address without brackets."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        """`HOST:PORT`, an IPv6 host in brackets: what gRPC and HTTP libraries take."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The host as an IP address, or None where it is a name."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    @property
    def is_wildcard(self) -> bool:
        """Whether the host means every interface (`0.0.0.0`, `::`): good for listening, useless for dialling."""
        ip = self.ip
        return ip is not None and ip.is_unspecified

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        ip = self.ip
        return self.host.lower() == "localhost" if ip is None else ip.is_loopback

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self:
        """Returns the address that `text` spells; raises ValueError saying what is wrong with it."""

    @classmethod
    def _validate(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ValueError("should be text such as '127.0.0.1:7101'")
        return cls.parse(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.to_string_ser_schema()
        )


@dataclass(frozen=True, slots=True)
class ListenAddress(_Address):
    """An address to listen on: `HOST:PORT`. Port 0 lets the system choose a free one."""

    def __str__(self) -> str:
        return self.authority

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the address that `text` spells; raises ValueError saying what is wrong with it."""
        host, port = _split(text.strip(), lowest_port=0)
        return cls(host, port)


@dataclass(frozen=True, slots=True)
class Endpoint(_Address):
    """A service to dial: `NAME@HOST:PORT`, NAME being the one in its certificate; `HOST:PORT` where that is implied."""

    name: str | None = None

    def __str__(self) -> str:
        return self.authority if self.name is None else f"{self.name}@{self.authority}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the endpoint that `text` spells; raises ValueError saying what is wrong with it."""
        before, at, address = text.strip().rpartition("@")
        if at and not is_dns_label(before):
            raise ValueError("the name before '@' should be 1 to 63 lower-case letters, digits and dashes")
        host, port = _split(address, lowest_port=1)
        return cls(host, port, before if at else None)

    def named(self, default: str) -> Endpoint:
        """Returns this endpoint with a name: its own, or else `default`."""
        return self if self.name is not None else replace(self, name=default)


def _split(text: str, *, lowest_port: int) -> tuple[str, int]:
    host, colon, port_text = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or (text.startswith("[") and not bracketed):
        raise ValueError("should be HOST:PORT")
    if not host:
        raise ValueError("the host is missing; 0.0.0.0 means every interface")
    if not _PORT.fullmatch(port_text) or not lowest_port <= int(port_text) <= 65535:
        raise ValueError(f"the port should be a number from {lowest_port} to 65535")
    if bracketed:
        host = host[1:-1]
        if not _IPV6_TEXT.fullmatch(host) or not _is_ip(host, IPv6Address):
            raise ValueError("what stands in brackets should be an IPv6 address")
    elif ":" in host:
        raise ValueError("an IPv6 address should stand in brackets, as in [::1]:7101")
    elif not _is_ip(host, IPv4Address) and not _is_host_name(host):
        raise ValueError("the host should be a DNS name or an IP address")
    return host, int(port_text)


def _is_ip(text: str, family: type[IPv4Address] | type[IPv6Address]) -> bool:
    try:
        family(text)
    except ValueError:
        return False
    return True


def _is_host_name(text: str) -> bool:
    labels = text.removesuffix(".").split(".")
    # A last label of digits alone would be a mistyped IPv4 address.
    return len(text) <= 253 and all(map(_HOST_LABEL.fullmatch, labels)) and not labels[-1].isdigit()
