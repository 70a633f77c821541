"""Metrics over real HTTP: scraped, probed, refused, stopped."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from chorus.core.errors import ConfigError
from chorus.telemetry.metrics import RpcMetrics, new_registry
from chorus.telemetry.metrics_server import MetricsServer


@pytest.fixture
def registry() -> CollectorRegistry:
    return new_registry(service="registry", version="1")


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(
        verify=False
    ) as client:  # reading the CAs, for plain HTTP, would take longer than all these tests
        yield client


@pytest.fixture
def server(registry: CollectorRegistry) -> Iterator[MetricsServer]:
    with MetricsServer(registry, host="127.0.0.1", port=0) as server:
        yield server


def ended(connection: socket.socket) -> bool:
    """Whether the other side closes the connection, with or without ceremony, and says nothing before."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def url(server: MetricsServer, path: str = "/metrics") -> str:
    return f"http://127.0.0.1:{server.port}{path}"


def test_a_scrape(http: httpx.Client, registry: CollectorRegistry, server: MetricsServer) -> None:
    RpcMetrics(registry, ["/s/m"]).call_finished("/s/m", "OK", "", 0.01)
    response = http.get(url(server))
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    (sample,) = (sample for sample in families["chorus_rpc_requests"].samples if sample.name.endswith("_total"))
    assert (sample.labels, sample.value) == ({"method": "s/m", "code": "OK"}, 1)


def test_a_scrape_as_prometheus_asks_for_it(http: httpx.Client, server: MetricsServer) -> None:
    response = http.get(url(server), headers={"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_a_probe(http: httpx.Client, registry: CollectorRegistry) -> None:
    healthy = True
    with MetricsServer(registry, host="127.0.0.1", port=0, healthy=lambda: healthy) as server:
        assert http.get(url(server, "/-/healthy")).status_code == 200
        healthy = False
        assert http.get(url(server, "/-/healthy?full=1")).status_code == 503


def test_another_path_is_not_found(http: httpx.Client, server: MetricsServer) -> None:
    assert http.get(url(server, "/")).status_code == 404
    assert http.get(url(server, "/metrics/../etc/passwd")).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"])
def test_nothing_but_get_is_answered(http: httpx.Client, server: MetricsServer, method: str) -> None:
    response = http.request(method, url(server))
    assert (response.status_code, response.headers["allow"]) == (405, "GET")


def test_a_port_that_is_taken_is_an_error_of_the_configuration(registry: CollectorRegistry) -> None:
    with MetricsServer(registry, host="127.0.0.1", port=0) as first:
        second = MetricsServer(registry, host="127.0.0.1", port=first.port, key="registry.metrics_listen")
        with pytest.raises(ConfigError) as caught:
            second.start()
    assert str(caught.value).startswith(f"registry.metrics_listen = '127.0.0.1:{first.port}': cannot listen there:")
    second.stop()


def test_a_host_that_is_not_ours_is_an_error_of_the_configuration(registry: CollectorRegistry) -> None:
    with pytest.raises(ConfigError, match="cannot listen there"):
        MetricsServer(registry, host="192.0.2.1", port=0).start()


def test_ipv6_where_there_is_any(http: httpx.Client, registry: CollectorRegistry) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        try:
            probe.bind(("::1", 0) if socket.has_ipv6 else ("127.0.0.1", 0))
            host, shown = ("::1", "[::1]") if socket.has_ipv6 else ("127.0.0.1", "127.0.0.1")
        except OSError:
            host, shown = "127.0.0.1", "127.0.0.1"
    with MetricsServer(registry, host=host, port=0) as server:
        assert http.get(f"http://{shown}:{server.port}/-/healthy").text == "ok\n"


def test_a_collector_that_fails_is_a_failed_scrape(
    http: httpx.Client, registry: CollectorRegistry, server: MetricsServer
) -> None:
    class Broken:
        def describe(self) -> list[GaugeMetricFamily]:
            return []

        def collect(self) -> list[GaugeMetricFamily]:
            raise RuntimeError("inside")

    registry.register(Broken())
    response = http.get(url(server))
    assert response.status_code == 500
    assert "inside" not in response.text


def test_stopping_waits_for_nobody_and_frees_the_port(http: httpx.Client, registry: CollectorRegistry) -> None:
    server = MetricsServer(registry, host="127.0.0.1", port=0)
    server.start()
    port = server.port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as idle:
        idle.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")  # and no end
        http.get(url(server)).raise_for_status()  # by now the idle one has a thread
        server.stop()
        assert ended(idle)
    server.stop()
    assert [thread for thread in threading.enumerate() if thread.name == "metrics-server"] == []
    with MetricsServer(registry, host="127.0.0.1", port=port) as again:
        assert again.port == port


def test_a_server_can_be_started_again(http: httpx.Client, registry: CollectorRegistry) -> None:
    server = MetricsServer(registry, host="127.0.0.1", port=0)
    for _ in range(2):
        with server:
            assert http.get(url(server)).status_code == 200


def test_connections_are_bounded(server: MetricsServer) -> None:
    def dial() -> socket.socket:
        return socket.create_connection(("127.0.0.1", server.port), timeout=10)

    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(dial())
        assert ended(stack.enter_context(dial()))


def test_what_is_no_http_harms_nobody(http: httpx.Client, server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01\x00\xa5 this is no HTTP\r\n\r\n")
        assert raw.recv(10_000)
    assert http.get(url(server, "/-/healthy")).status_code == 200


def test_values_are_those_of_the_moment(http: httpx.Client, registry: CollectorRegistry, server: MetricsServer) -> None:
    gauge = Gauge("chorus_test_value", "A value.", registry=registry)
    for value in (1, 2):
        gauge.set(value)
        assert f"chorus_test_value {value}.0\n" in http.get(url(server)).text
