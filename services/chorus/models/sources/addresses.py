"""Whom a download may reach: who offers a public address must not lead into somebody's own network.

A link that looks public could have this machine ask its router, a cloud's metadata service or a neighbour, by its DNS
entry or a redirect. So every host on the way must have public addresses alone, unless the caller named a private
place himself, as by an address, or has allowed it.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.request

import httpx

from chorus.core.errors import DownloadError

_PROXIES = {"http", "https", "all"}
_OWN_ZONES = (".local", ".lan", ".home.arpa", ".internal", ".localhost")


class AddressGuard:
    """Looks at every request of one download of `url`, and at who has answered it."""

    def __init__(self, url: str, *, allow_private: bool) -> None:
        self._origin = httpx.URL(url).host
        self._allowed = allow_private or names_a_private_place(self._origin)

    def check_request(self, request: httpx.Request) -> None:
        """Raises DownloadError where the request would go to an address that is not public."""
        if self._allowed:
            return
        for address in _addresses(request.url.host):
            self._check(request.url.host, address)

    def check_response(self, response: httpx.Response) -> None:
        """Raises DownloadError where the answer came from such an address: a name may have another one each time."""
        stream = response.extensions.get("network_stream")
        # Through a proxy it is the proxy who answers, whose address is the administrator's choice.
        if self._allowed or stream is None or urllib.request.getproxies().keys() & _PROXIES:
            return
        peer = stream.get_extra_info("server_addr")
        if peer is not None:
            self._check(response.url.host, peer[0])

    def _check(self, host: str, address: str) -> None:
        if not is_public(address):
            way = "" if host == self._origin else f" leads to {host}, which"
            raise DownloadError(
                f"{self._origin}{way} has the private address {address}; not asked. If that is meant, --allow-private"
            )


def names_a_private_place(host: str) -> bool:
    """Whether a host as somebody wrote it can only be one of his own network."""
    try:
        return not is_public(str(ipaddress.ip_address(host.strip("[]"))))
    except ValueError:
        name = host.lower().removesuffix(".")
        return "." not in name or name.endswith(_OWN_ZONES)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


def _addresses(host: str) -> set[str]:
    """The addresses that a name has now; none where it has none, which the request itself will find out."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return set()
