"""Messages put into one another as bytes, where building them anew as objects would cost more than sending them."""

from __future__ import annotations

_LENGTH_DELIMITED = 2


def nested(field_number: int, raw: bytes) -> bytes:
    """Returns the encoded message `raw` as the field of that number of another message.

    Encoded messages may be put one after the other: the fields of the later ones are merged into the earlier ones.
    (Protocol Buffers, Encoding: https://protobuf.dev/programming-guides/encoding/)
    """
    return _varint(field_number << 3 | _LENGTH_DELIMITED) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    """`value`, at least 0, in groups of seven bits, the lowest first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
