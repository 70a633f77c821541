"""Messages put into one another as bytes are the messages that objects would have made."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chorus.api.registry.v1 import registry_pb2 as pb
from chorus.wire.nesting import nested


@given(st.lists(st.integers(0, 300).map("x".__mul__), max_size=4), st.sampled_from([1, 15, 16, 2047, 2048, 2**29 - 1]))
def test_nested_bytes_are_nested_messages(names: list[str], unknown: int) -> None:
    removals = [pb.Removal(runner_id=name, incarnation=len(name)) for name in names]
    raw = b"".join(nested(pb.Delta.REMOVALS_FIELD_NUMBER, removal.SerializeToString()) for removal in removals)
    assert pb.Delta.FromString(raw) == pb.Delta(removals=removals)
    whole = pb.DirectoryEvent.FromString(nested(pb.DirectoryEvent.DELTA_FIELD_NUMBER, raw))
    assert whole == pb.DirectoryEvent(delta=pb.Delta(removals=removals))
    # A field that a reader doesn't know is passed over, however large its number is.
    assert pb.Removal.FromString(nested(unknown, raw) if unknown > 3 else b"").runner_id == ""
