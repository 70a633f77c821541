"""Hypothesis strategies for any protobuf message, made from its descriptor."""

from __future__ import annotations

from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: st.one_of(
        st.text(max_size=20),
        # What a caller who knows the mesh would send, and what one who wants to break it would.
        st.sampled_from(["fake", "runner-1", "../../etc/passwd", "{", "root ::= (", "\x00", "a" * 3000]),
    ),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 3),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1) | st.integers(0, 3),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 12) | st.sampled_from([-1, 99, 2**31 - 1]),
}
_DEPTH = 6


def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Messages of that type with any fields set to anything, nested a few levels deep."""
    return _of_type(descriptor, _DEPTH)


@st.composite
def _of_type(draw: st.DrawFn, descriptor: Descriptor, depth: int) -> Message:
    message: Message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            keys = st.text(max_size=5)
            for key, value in draw(st.dictionaries(keys, st.text(max_size=5), max_size=2)).items():
                if field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING:
                    getattr(message, field.name)[key] = value
        elif field.message_type is not None:
            if depth == 0:
                continue
            inner = _of_type(field.message_type, depth - 1)
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(inner, max_size=2)))
            else:
                getattr(message, field.name).CopyFrom(draw(inner))
                getattr(message, field.name).SetInParent()  # present even where it is empty
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_SCALARS[field.type], max_size=3)))
        else:
            setattr(message, field.name, draw(_SCALARS[field.type]))
    return message
