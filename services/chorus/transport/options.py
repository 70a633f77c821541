"""How connections behave: what both ends of every channel of the mesh agree on.

gRPC's own defaults are made for many requests between data centres. Here a machine may vanish without a word, and a
stream may be silent for minutes while a long prompt is read, so both ends ping, and both ends allow it.
"""

from __future__ import annotations

from collections.abc import Iterable

Options = tuple[tuple[str, str | int], ...]

REQUEST_MAX_BYTES = 16 * 1024 * 1024
"""The longest request: several images, or a prompt beyond any context. Decoding one holds up the event loop, by up to
0.2 s for each MB."""
RESPONSE_MAX_BYTES = 64 * 1024 * 1024
"""The longest response: 2,048 vectors of 4,096 components are half of it."""

CALLS_PER_CALLER = 4096
"""So many calls one caller has open at a server, unless it is configured otherwise."""
_METADATA_BYTES = 16 * 1024

SLOW_READER_S = 30.0
"""So long a message waits for its reader, unless it is configured otherwise."""

PING_INTERVAL_MS = 10_000
PING_TIMEOUT_MS = 5_000
_CONNECT_TIMEOUT_MS = 5_000
_HANDSHAKE_TIMEOUT_MS = 10_000
_WINDOW_BYTES = 1024 * 1024

_BOTH: Options = (
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    # This is the one that counts (tried with 1.85.1): without it a peer that stands still, with its connection open, is
    # given up after a minute, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Every message that comes would be answered with a ping, to measure how much fits on the way and open the window
    # accordingly: a system call and a wake-up at both ends, a third of what a small message costs. The window is open
    # from the beginning instead, for what 10 ms of a gigabit network hold.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
)
_CLIENT: Options = (
    ("grpc.max_send_message_length", REQUEST_MAX_BYTES),
    ("grpc.max_receive_message_length", RESPONSE_MAX_BYTES),
    # A peer that was restarted is found within a second. The "minimum" is the time given to one attempt to connect.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", _CONNECT_TIMEOUT_MS),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # A channel is one connection to one peer: nothing is balanced, shared with another channel, or sent through a
    # proxy.
    ("grpc.lb_policy_name", "pick_first"),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
_SERVER: Options = (
    ("grpc.max_receive_message_length", REQUEST_MAX_BYTES),
    ("grpc.max_send_message_length", RESPONSE_MAX_BYTES),
    # From the first one on calls are refused, more and more of them the more they hold; beyond the second all are.
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
    # Two servers on one port would share its connections at random; the second is refused instead.
    ("grpc.so_reuseport", 0),
    # A client that pings faster than this, counted thrice, is sent away: half of what ours do leaves room for jitter.
    # (The C macro says MIN_RECV_PING_INTERVAL; the option that is often written after it does nothing.)
    ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS // 2),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_MS),
)

OPEN_LIMITS: Options = (
    ("grpc.max_receive_message_length", 64 * 1024),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 8),
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_connection_age_ms", 60_000),
)
"""Of a listener that anybody may call: a request there is a kilobyte, and an answer is all that a caller wants."""

CALLER_LIMITS: Options = (
    ("grpc.max_concurrent_streams", 256),
    ("grpc.max_connection_idle_ms", 300_000),
)
"""Of the listener for callers with keys: it may be open to the world, so that connections nobody uses are closed."""


def client_options(extra: Iterable[tuple[str, str | int]] = ()) -> Options:
    """Returns the options of a channel; `extra` ones come last, and so win."""
    return _merged((*_BOTH, *_CLIENT, *extra))


def server_options(extra: Iterable[tuple[str, str | int]] = ()) -> Options:
    """Returns the options of a server; `extra` ones come last, and so win."""
    return _merged((*_BOTH, *_SERVER, *extra))


def idle_limit(seconds: float) -> Options:
    """Returns the options of a server that closes connections without an open call after that time."""
    return (("grpc.max_connection_idle_ms", int(seconds * 1000)),)


def _merged(options: Iterable[tuple[str, str | int]]) -> Options:
    return tuple(dict(options).items())
