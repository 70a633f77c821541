"""Reading the head of a GGUF file that may be anything: truncated, corrupt, or made to do harm.

`gguf.GGUFReader` trusts a file's counts and lengths, returns short arrays where the file ends early, and builds Python
objects for every string of a vocabulary (10 s and 700 MB for 262,144 tokens). The subclass here checks every length
against the file before anything is read or allocated, and steps over the elements of long arrays.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import GGUFReader, ReaderField

from chorus.core.errors import ModelFileError

_MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIQQ")
_VERSIONS = (2, 3)
# Far above any model there is, and low enough that a hostile count costs neither memory nor minutes.
_MAX_FIELDS = 65_536
_MAX_TENSORS = 1_000_000
_MAX_ELEMENTS = 1 << 24
_MAX_DIMENSIONS = 4
_SHORT_ARRAY = 1024
_LEAST_FIELD_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the file describes it."""

    name: str
    type_name: str  # such as `Q4_K`
    shape: tuple[int, ...]
    element_count: int
    size_bytes: int


class GgufHead:
    """The metadata and the tensor list of a GGUF file; holds none of the file open."""

    def __init__(self, fields: OrderedDict[str, Any], tensors: tuple[TensorInfo, ...]) -> None:
        self._fields = fields
        self.tensors = tensors

    def text(self, key: str) -> str | None:
        """A string, or None where the key is missing. Raises ModelFileError where it is something else."""
        field = self._fields.get(key)
        if field is None:
            return None
        if field.types != [GGUFValueType.STRING]:
            raise ModelFileError(f"{key} should be text, but is {_type_names(field)}")
        return bytes(field.parts[-1]).decode("utf-8", "replace")

    def real(self, key: str) -> float | None:
        """A number of the GGUF type float32, or None where the key is missing."""
        field = self._fields.get(key)
        if field is None:
            return None
        if field.types != [GGUFValueType.FLOAT32]:
            raise ModelFileError(f"{key} should be a number of type float32, but is {_type_names(field)}")
        return float(field.contents())

    def integers(self, key: str) -> tuple[int, ...]:
        """A whole number as a tuple of one, or an array of them; empty where the key is missing."""
        field = self._fields.get(key)
        if field is None:
            return ()
        if self.length(key) > _MAX_FIELDS:
            raise ModelFileError(f"{key} has {self.length(key)} elements, so the file is damaged")
        contents = field.contents()
        values = contents if isinstance(contents, list) else [contents]
        if field.types[-1] in (GGUFValueType.STRING, GGUFValueType.FLOAT32, GGUFValueType.FLOAT64):
            raise ModelFileError(f"{key} should be a whole number, but is {_type_names(field)}")
        return tuple(int(value) for value in values)

    def integer(self, key: str) -> int | None:
        """A whole number, or None where the key is missing."""
        values = self.integers(key)
        if len(values) > 1:
            raise ModelFileError(f"{key} should be one number, but is {len(values)}")
        return values[0] if values else None

    def texts(self, key: str) -> tuple[str, ...]:
        """A short array of strings; empty where the key is missing, is no such array, or is a long one."""
        field = self._fields.get(key)
        if field is None or field.types != [GGUFValueType.ARRAY, GGUFValueType.STRING]:
            return ()
        return tuple(bytes(field.parts[index]).decode("utf-8", "replace") for index in field.data)

    def length(self, key: str) -> int:
        """How many elements an array has; 0 where the key is missing or no array."""
        field = self._fields.get(key)
        if field is None or field.types[:1] != [GGUFValueType.ARRAY]:
            return 0
        return int(field.parts[4][0])  # after the key's length, the key, the type and the elements' type

    def keys_with_prefix(self, prefix: str) -> tuple[str, ...]:
        """The keys that begin so."""
        return tuple(key for key in self._fields if key.startswith(prefix))


def read_head(path: Path, *, vocabulary: bool = False) -> GgufHead:
    """Reads the metadata and the tensor list of a GGUF file of version 2 or 3. `vocabulary` looks at every token too.

    Raises ModelFileError where the file can't be read, is not GGUF, is damaged, or ends before its tensors do. The file
    is memory-mapped meanwhile, so it must not be truncated by others; files being downloaded have other names.
    """
    try:
        _check_header(path)
        reader = _BoundedReader(path)
        if vocabulary and reader.repeated(_TOKENS):
            raise ModelFileError("two tokens of its vocabulary are the same, so the file is damaged; download it again")
        return GgufHead(reader.fields, tuple(reader.tensor_infos))
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}", metadata={"path": str(path)}) from error
    except OSError as error:
        raise ModelFileError(
            f"{path} can't be read: {error.strerror or error}", metadata={"path": str(path)}
        ) from error
    except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
        raise ModelFileError(
            f"{path} is damaged: its metadata makes no sense; download it again", metadata={"path": str(path)}
        ) from error


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if head[:4] != _MAGIC:
        raise ModelFileError("this is not a GGUF file; a model for llama.cpp is one file that ends in .gguf")
    if len(head) < _HEADER.size:
        raise ModelFileError("the file ends within its header; download it again")
    _, version, tensors, fields = _HEADER.unpack(head)
    if version & 0xFFFF == 0:
        raise ModelFileError("the file is for big-endian machines, which this one is not")
    if version not in _VERSIONS:
        raise ModelFileError(f"GGUF version {version} is not one that is understood ({_VERSIONS[0]} or {_VERSIONS[1]})")
    if tensors > _MAX_TENSORS or fields > _MAX_FIELDS:
        raise ModelFileError(f"the header claims {tensors} tensors and {fields} metadata fields, so it is damaged")


class _BoundedReader(GGUFReader):  # type: ignore[misc]
    """The package's reader, with every length checked. Overrides methods that the package calls internal, so the
    supported versions of it are pinned in pyproject.toml."""

    def __init__(self, path: Path) -> None:
        self.tensor_infos: list[TensorInfo] = []
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        needed = np.dtype(dtype).itemsize * int(count)
        if needed > len(self.data) - offset:
            raise ModelFileError("the file ends before its metadata does; download it again")
        return super()._get(offset, dtype, count, override_order)

    def _build_fields(self, offs: int, count: int) -> int:
        self._room_for(count, _LEAST_FIELD_BYTES, offs, "metadata fields")
        return int(super()._build_fields(offs, count))

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[Any]]:
        self._room_for(count, _LEAST_TENSOR_BYTES, offs, "tensors")
        end, fields = super()._build_tensor_info(offs, count)
        return int(end), fields

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != GGUFValueType.ARRAY:
            scalar: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return scalar
        item_type, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        count, item = int(length[0]), GGUFValueType(item_type[0])
        start = orig_offs + 12
        if count > _MAX_ELEMENTS:
            raise ModelFileError(f"an array of the metadata claims {count} elements, so it is damaged")
        if item is GGUFValueType.ARRAY:
            raise ModelFileError("the metadata has arrays of arrays, which no model has")
        types = [GGUFValueType.ARRAY, item]
        if item is not GGUFValueType.STRING:
            values = self._get(start, self.gguf_scalar_to_np[item], count)  # a view of the file, no copy
            return 12 + int(values.nbytes), [item_type, length, values], [2], types
        self._room_for(count, 8, start, "strings")
        if count <= _SHORT_ARRAY:
            parts: list[Any] = [item_type, length]
            indexes: list[int] = []
            for _ in range(count):
                size, value = self._get_str(start)
                indexes.append(len(parts) + 1)
                parts += [size, value]
                start += 8 + int(value.nbytes)
            return start - orig_offs, parts, indexes, types
        place = np.array([start], dtype=np.uint64)  # where the strings begin: they are read only if somebody asks
        return self._end_of_strings(start, count) - orig_offs, [item_type, length, place], [], types

    def repeated(self, key: str) -> bool:
        """Whether an array of strings holds one twice, as C reads them: up to a zero byte. Empty ones don't count."""
        field = self.fields.get(key)
        if field is None or field.types != [GGUFValueType.ARRAY, GGUFValueType.STRING]:
            return False
        count = int(field.parts[4][0])
        if field.data or not count:
            texts = [bytes(field.parts[index]) for index in field.data]
        else:
            texts = self._strings(int(field.parts[5][0]), count)
        if any(b"\0" in text for text in texts):
            texts = [text.partition(b"\0")[0] for text in texts]
        return len(set(texts) - {b""}) + texts.count(b"") < count

    def _strings(self, start: int, count: int) -> list[bytes]:
        data = bytes(self.data[start : self._end_of_strings(start, count)])
        length_at, offset, texts = struct.Struct("<Q").unpack_from, 0, []
        for _ in range(count):
            begin = offset + 8
            offset = begin + length_at(data, offset)[0]
            texts.append(data[begin:offset])
        return texts

    def _end_of_strings(self, start: int, count: int) -> int:
        """Steps over `count` strings, looking at nothing but their lengths."""
        data, size, length_at = memoryview(self.data), len(self.data), struct.Struct("<Q").unpack_from
        offset = start
        for _ in range(count):
            if offset + 8 > size:
                break
            offset += 8 + length_at(data, offset)[0]
        else:
            if offset <= size:
                return offset
        raise ModelFileError("the file ends before its metadata does; download it again")

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        names: set[str] = set()
        for field in fields:
            _, _, _, dimensions, raw_type, offset = field.parts
            shape = tuple(int(dimension) for dimension in dimensions)
            info = _tensor_info(field.name, shape, int(raw_type[0]))
            if info.name in names:
                raise ModelFileError(f"two tensors are called {info.name[:80]!r}, so the file is damaged")
            names.add(info.name)
            end = start_offs + int(offset[0]) + info.size_bytes
            if end > len(self.data):
                raise ModelFileError(
                    f"the file is truncated: it has {len(self.data)} bytes, but its tensors need at least {end}; "
                    "download it again"
                )
            self.tensor_infos.append(info)

    def _room_for(self, count: int, each: int, offset: int, what: str) -> None:
        if int(count) * each > len(self.data) - offset:
            raise ModelFileError(f"the file is too short for the {int(count)} {what} that it claims; download it again")


def _tensor_info(name: str, shape: tuple[int, ...], raw_type: int) -> TensorInfo:
    if len(shape) > _MAX_DIMENSIONS:
        raise ModelFileError(f"tensor {name[:80]!r} has {len(shape)} dimensions, so the file is damaged")
    try:
        quantization = GGMLQuantizationType(raw_type)
    except ValueError:
        raise ModelFileError(
            f"tensor {name[:80]!r} is stored in a way (type {raw_type}) that this version doesn't know; "
            "the file is damaged or made for a newer llama.cpp"
        ) from None
    block_elements, block_bytes = GGML_QUANT_SIZES[quantization]
    elements = math.prod(shape)
    if shape and shape[0] % block_elements:
        raise ModelFileError(f"tensor {name[:80]!r} has rows of {shape[0]}, no multiple of {block_elements}")
    return TensorInfo(name, quantization.name, shape, elements, elements // block_elements * block_bytes)


def _type_names(field: Any) -> str:
    return " of ".join(kind.name.lower() for kind in field.types)
