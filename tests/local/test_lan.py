"""Which of a machine's addresses other machines of a household reach."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from chorus.core.errors import ConfigError
from chorus.local import lan


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop: cable, radio that is off, a VPN, containers, a public address, and loopback."""

    def ipv4(address: str, netmask: str = "255.255.255.0") -> SimpleNamespace:
        return SimpleNamespace(family=socket.AF_INET, address=address, netmask=netmask)

    addresses = {
        "lo": [ipv4("127.0.0.1", "255.0.0.0")],
        "eth0": [ipv4("192.168.7.20"), SimpleNamespace(family=socket.AF_INET6, address="fe80::1", netmask=None)],
        "wlan0": [ipv4("192.168.8.21")],
        "ppp0": [ipv4("93.184.216.34", "255.255.255.255")],
        "tailscale0": [ipv4("100.101.102.103", "255.192.0.0")],
        "docker0": [ipv4("172.17.0.1", "255.255.0.0")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(
        psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=name != "wlan0") for name in addresses}
    )
    monkeypatch.setattr(lan, "_outgoing", lambda: "192.168.7.20")


@pytest.mark.usefixtures("interfaces")
def test_private_addresses_of_interfaces_that_are_up_the_likeliest_first() -> None:
    assert lan.private_addresses() == [
        lan.LanAddress("eth0", "192.168.7.20", "192.168.7.0/24"),
        lan.LanAddress("tailscale0", "100.101.102.103", "100.64.0.0/10"),
    ]
    assert lan.choose_address(None).ip == "192.168.7.20"
    assert lan.choose_address("100.101.102.103").interface == "tailscale0"


@pytest.mark.usefixtures("interfaces")
@pytest.mark.parametrize("wanted", ["172.17.0.1", "93.184.216.34", "127.0.0.1", "192.168.8.21"])
def test_no_other_address_is_served(wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"there are 192\.168\.7\.20 \(eth0\), 100\.101"):
        lan.choose_address(wanted)


def test_a_machine_without_a_private_address_cannot_serve_a_household(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    with pytest.raises(ConfigError, match="no private IPv4 address"):
        lan.choose_address(None)
