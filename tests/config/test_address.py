"""Addresses: what parses, what is refused, and that text and value are two forms of one thing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.config import Endpoint, ListenAddress

names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
host_names = st.from_regex(r"[A-Za-z]([A-Za-z0-9_-]{0,20}[A-Za-z0-9])?(\.[A-Za-z][a-z0-9]{0,9}){0,3}", fullmatch=True)
hosts = host_names | st.ip_addresses().map(str)


@given(st.builds(Endpoint, hosts, st.integers(1, 65535), names | st.none()))
def test_an_endpoint_round_trips(endpoint: Endpoint) -> None:
    assert Endpoint.parse(str(endpoint)) == endpoint


@given(st.builds(ListenAddress, hosts, st.integers(0, 65535)))
def test_a_listen_address_round_trips(address: ListenAddress) -> None:
    assert ListenAddress.parse(str(address)) == address


@given(st.text(max_size=40) | st.from_regex(r"[a-z@\[\]:.0-9%-]{0,30}", fullmatch=True))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        endpoint = Endpoint.parse(text)
    except ValueError:
        return
    assert Endpoint.parse(str(endpoint)) == endpoint
    assert 1 <= endpoint.port <= 65535


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("localhost", "HOST:PORT"),
        (":7101", "host is missing"),
        ("localhost:", "port should be a number from 1"),
        ("localhost:0", "port should be a number from 1"),
        ("localhost:65536", "port should be"),
        ("localhost:٣", "port should be"),
        ("::1:7101", "in brackets"),
        ("[::1]", "HOST:PORT"),
        ("[localhost]:1", "IPv6 address"),
        ("[fe80::1%eth0;x]:1", "IPv6 address"),
        ("300.1.1.1:80", "DNS name or an IP address"),
        ("a b:80", "DNS name or an IP address"),
        ("Not-A-Name@localhost:80", "name before '@'"),
        ("@localhost:80", "name before '@'"),
        ("http://localhost:80", "in brackets"),
    ],
)
def test_a_bad_endpoint_says_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Endpoint.parse(text)


def test_an_endpoint_keeps_its_own_name() -> None:
    assert str(Endpoint.parse("h:1").named("registry")) == "registry@h:1"
    assert str(Endpoint.parse("b@h:1").named("registry")) == "b@h:1"


@pytest.mark.parametrize(
    ("text", "wildcard", "loopback"),
    [
        ("0.0.0.0:0", True, False),
        ("[::]:1", True, False),
        ("127.0.0.2:1", False, True),
        ("[::1]:1", False, True),
        ("LocalHost:1", False, True),
        ("192.168.1.2:1", False, False),
        ("attic.lan:1", False, False),
    ],
)
def test_what_an_address_reaches(text: str, wildcard: bool, loopback: bool) -> None:
    address = ListenAddress.parse(text)
    assert (address.is_wildcard, address.is_loopback) == (wildcard, loopback)
