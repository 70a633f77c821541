"""Events of the mesh over the wire: what goes in comes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.api.events.v1 import events_pb2 as pb
from chorus.core import events as core
from chorus.core.errors import InvalidRequestError
from chorus.wire.mesh_events import (
    decode_event,
    decode_event_filter,
    decode_told,
    encode_event,
    encode_event_filter,
    encode_told,
    event_json,
)
from tests.wire.strategies import text, uint32, uint64

subjects = st.builds(core.Subject, *[text] * 6)
rates = st.floats(0, 1e6)
seconds = st.integers(0, 10**6).map(lambda halves: halves / 2)  # no rounding on the way
details = st.one_of(
    st.builds(core.RunnerJoined, uint64, text, st.booleans()),
    st.builds(core.RunnerLost, uint64),
    st.builds(core.AttemptFailed, uint32, text, text, st.booleans()),
    st.builds(core.AttemptHedged, uint32, seconds),
    st.builds(core.AttemptResumed, uint32, text, seconds, uint32),
    st.builds(core.RequestAdmitted, queue_s=seconds),
    st.builds(core.RequestRefused, reason=text, message=text, retry_after_s=st.none() | seconds, queue_s=seconds),
    st.builds(core.RequestSubstituted, text, text),
    st.builds(core.LoadAsked, figure=rates),
    st.builds(
        core.RequestFinished,
        reason=text,
        message=text,
        attempts=uint32,
        queue_s=seconds,
        first_token_s=st.none() | seconds,
        total_s=seconds,
        prompt_tokens=uint32,
        cached_tokens=uint32,
        output_tokens=uint32,
        tokens_per_second=rates,
    ),
)
without_detail = st.sampled_from(sorted(set(core.EventKind) - set(core.KIND_OF.values())))
events = st.one_of(
    st.builds(
        lambda number, at, subject, detail: core.Event(number, at, core.KIND_OF[type(detail)], subject, detail),
        uint64,
        st.integers(0, 4 * 10**9).map(float),
        subjects,
        details,
    ),
    st.builds(core.Event, uint64, st.integers(0, 4 * 10**9).map(float), without_detail, subjects),
)
cursors = st.builds(core.Cursor, uint64, uint64)


@given(events)
def test_an_event(event: core.Event) -> None:
    message = pb.Event.FromString(encode_event(event).SerializeToString())
    assert decode_event(message) == event
    assert event_json(event)["kind"] == f"EVENT_KIND_{event.kind.name}"


@given(
    st.one_of(
        st.builds(core.Batch, cursors, st.lists(events, min_size=1, max_size=3).map(tuple)),
        st.builds(core.Lost, cursors, st.sampled_from(core.LostReason), uint64),
        st.builds(core.Bookmark, cursors),
    )
)
def test_a_message_of_a_watch(told: core.Told) -> None:
    assert decode_told(pb.WatchedEvents.FromString(encode_told(told).SerializeToString())) == told


@given(st.builds(core.EventFilter, st.frozensets(st.sampled_from(core.EventKind)), text, text, text, text))
def test_a_filter_whose_reader_the_server_says(condition: core.EventFilter) -> None:
    assert decode_event_filter(encode_event_filter(condition), reader=condition.reader) == condition


def test_every_detail_has_its_kind_and_its_field() -> None:
    fields = {field.name for field in pb.Event.DESCRIPTOR.oneofs_by_name["detail"].fields}
    assert fields == {str(kind) for kind in core.KIND_OF.values()}


def test_what_is_of_a_newer_version() -> None:
    assert decode_event(pb.Event(kind=999)) is None  # type: ignore[arg-type]
    newer = pb.WatchedEvents(cursor=pb.Cursor(epoch=1, sequence=2))
    newer.batch.events.add(kind=999)  # type: ignore[arg-type]
    assert decode_told(newer) == core.Bookmark(core.Cursor(1, 2))
    with pytest.raises(InvalidRequestError, match="999"):
        decode_event_filter(pb.EventFilter(kinds=[999]), reader="")  # type: ignore[list-item]
