"""A model of fewer layers, cut from a whole one: the same vocabulary at a fraction of the cost, and nonsense for text.

What a test asks of an engine's bookkeeping (batches, memory, streams) doesn't depend on what the model says.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGUFValueType

_HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, fields of metadata
_ALIGNMENT = 32
_SIZES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the file lists it: its entry without the offset at its end, and that offset."""

    name: bytes
    entry: bytes
    offset: int


def cut_layers(source: Path, target: Path, layers: int) -> None:
    """Writes the GGUF file `source`, a sound one, to `target` with its first `layers` blocks alone.

    Its metadata is copied as it is but for the count of blocks.
    """
    data = source.read_bytes()
    magic, version, tensor_count, field_count = _HEADER.unpack_from(data)
    head = bytearray(data[: _HEADER.size])
    at = _HEADER.size
    for _ in range(field_count):
        key, value_at = _text(data, at)
        kind = GGUFValueType(struct.unpack_from("<I", data, value_at)[0])
        end = _end(data, value_at + 4, kind)
        value = struct.pack("<I", layers) if key.endswith(b".block_count") else data[value_at + 4 : end]
        head += data[at : value_at + 4] + value
        at = end
    tensors = []
    for _ in range(tensor_count):
        name, dimensions_at = _text(data, at)
        end = dimensions_at + 4 + 8 * struct.unpack_from("<I", data, dimensions_at)[0] + 4
        tensors.append(_Tensor(name, data[at:end], struct.unpack_from("<Q", data, end)[0]))
        at = end + 8
    first = at + -at % _ALIGNMENT
    offsets = sorted(tensor.offset for tensor in tensors)
    ends = dict(zip(offsets, [*offsets[1:], len(data) - first], strict=True))
    kept = [tensor for tensor in tensors if _block(tensor.name) < layers]
    _HEADER.pack_into(head, 0, magic, version, len(kept), field_count)
    body = bytearray()
    for tensor in kept:
        head += tensor.entry + struct.pack("<Q", len(body))
        body += data[first + tensor.offset : first + ends[tensor.offset]]
        body += bytes(-len(body) % _ALIGNMENT)
    target.write_bytes(head + bytes(-len(head) % _ALIGNMENT) + body)


def _text(data: bytes, at: int) -> tuple[bytes, int]:
    """The string at a place, and the place after it."""
    start = at + 8
    end = start + struct.unpack_from("<Q", data, at)[0]
    return data[start:end], end


def _end(data: bytes, at: int, kind: GGUFValueType) -> int:
    """The place after a value of that kind."""
    if kind in _SIZES:
        return at + _SIZES[kind]
    if kind is GGUFValueType.STRING:
        return _text(data, at)[1]
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if (size := _SIZES.get(GGUFValueType(item))) is not None:
        return at + size * int(count)
    for _ in range(count):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
    return at


def _block(name: bytes) -> int:
    """The block that a tensor is of; -1 for those outside of all."""
    return int(name.split(b".")[1]) if name.startswith(b"blk.") else -1
