"""This machine's private addresses, by which the other machines of a household reach it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from chorus.core.errors import ConfigError

# Networks between containers and virtual machines of this very machine: nobody else is on them.
_INTERNAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "vmnet", "lxc", "podman")


@dataclass(frozen=True, slots=True)
class LanAddress:
    """A private IPv4 address with the network that it is in."""

    interface: str
    ip: str
    network: str  # such as 192.168.1.0/24


def private_addresses() -> list[LanAddress]:
    """Returns this machine's private IPv4 addresses, the one that other machines most likely use first."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = _private({name: addresses for name, addresses in psutil.net_if_addrs().items() if name in up})
    preferred = _outgoing()
    return sorted(found, key=lambda address: (address.ip != preferred, address.interface))


def choose_address(wanted: str | None) -> LanAddress:
    """Returns the private address `wanted`, or the likeliest one. Raises ConfigError naming those there are."""
    found = private_addresses()
    if not found:
        raise ConfigError("this machine has no private IPv4 address, so no other machine of a household can reach it")
    if wanted is None:
        return found[0]
    for address in found:
        if address.ip == wanted:
            return address
    there = ", ".join(f"{address.ip} ({address.interface})" for address in found)
    raise ConfigError(f"{wanted} is no private address of this machine; there are {there}")


def _private(interfaces: Mapping[str, Sequence[Any]]) -> list[LanAddress]:
    found: list[LanAddress] = []
    for name, addresses in interfaces.items():
        if name.startswith(_INTERNAL):
            continue
        for address in addresses:
            if address.family is not socket.AF_INET:
                continue
            ip = ipaddress.IPv4Address(address.address)
            # Addresses shared behind a provider's translation (100.64.0.0/10) are those of household VPNs, too.
            if not (ip.is_global or ip.is_loopback or ip.is_link_local or ip.is_unspecified):
                network = ipaddress.IPv4Network(f"{ip}/{address.netmask or 32}", strict=False)
                found.append(LanAddress(name, str(ip), str(network)))
    return found


def _outgoing() -> str | None:
    """The address by which this machine would reach others; connecting a UDP socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address reserved for documentation
        except OSError:
            return None
        return str(probe.getsockname()[0])
