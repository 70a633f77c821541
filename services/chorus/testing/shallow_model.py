"""A model of fewer layers, cut from a whole one: the same vocabulary at a fraction of the cost, and nonsense for text.

What a test asks of an engine's bookkeeping (batches, memory, streams) doesn't depend on what the model says.
"""

from __future__ import annotations

import struct
from pathlib import Path

import gguf


def cut_layers(source: Path, target: Path, layers: int) -> None:
    """Writes the GGUF file `source` to `target` with its first `layers` blocks alone.

    Its metadata is copied as it is but for the count of blocks, which must be a uint32 as llama.cpp writes it.
    """
    reader = gguf.GGUFReader(source)
    tensors = [tensor for tensor in reader.tensors if _block(tensor.name) < layers]
    first_info = min(tensor.field.offset for tensor in reader.tensors)
    header = bytearray(reader.data[:first_info].tobytes())
    struct.pack_into("<Q", header, 8, len(tensors))
    (count,) = (field for name, field in reader.fields.items() if name.endswith(".block_count"))
    assert count.types == [gguf.GGUFValueType.UINT32]
    struct.pack_into("<I", header, count.offset + 8 + len(count.name) + 4, layers)  # after length, name and type
    place = 0
    for tensor in tensors:
        info = tensor.field
        length = sum(part.nbytes for part in info.parts)
        header += reader.data[info.offset : info.offset + length - 8].tobytes() + struct.pack("<Q", place)
        place += _padded(tensor.n_bytes, reader.alignment)
    with target.open("wb") as file:
        file.write(header.ljust(_padded(len(header), reader.alignment), b"\0"))
        for tensor in tensors:
            data = tensor.data.tobytes()
            file.write(data.ljust(_padded(len(data), reader.alignment), b"\0"))


def _block(name: str) -> int:
    """The block that a tensor is of; -1 for those outside of all."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _padded(size: int, alignment: int) -> int:
    return -size % alignment + size
