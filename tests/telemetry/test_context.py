"""Request ids and trace contexts: what is accepted, what is replaced, what goes on to the next hop."""

from __future__ import annotations

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.telemetry import context

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{PARENT}-01"

hex_digits = "0123456789abcdef"
trace_ids = st.text(hex_digits, min_size=32, max_size=32).filter(lambda text: text.strip("0"))
span_ids = st.text(hex_digits, min_size=16, max_size=16).filter(lambda text: text.strip("0"))
request_ids = st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True)


@given(trace_ids, span_ids, st.integers(0, 3))
def test_traceparent_round_trips(trace_id: str, span_id: str, flags: int) -> None:
    parent = context.TraceParent(trace_id, span_id, flags)
    assert context.parse_traceparent(str(parent)) == parent


@given(st.text(max_size=80))
def test_any_text_is_a_traceparent_or_none(text: str) -> None:
    parsed = context.parse_traceparent(text)
    assert parsed is None or re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", str(parsed))


@pytest.mark.parametrize(
    "value",
    [
        "",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01\n",
        f"cc-{TRACE}-{PARENT}-01.more",
        f"00-{TRACE[:-1]}-{PARENT}-01",
    ],
)
def test_what_the_standard_calls_invalid_is_refused(value: str) -> None:
    assert context.parse_traceparent(value) is None


@pytest.mark.parametrize("value", [f"01-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-comes-later"])
def test_a_later_version_is_read_and_answered_as_ours(value: str) -> None:
    parsed = context.parse_traceparent(value)
    assert parsed is not None
    assert str(parsed) == HEADER


def test_reserved_flags_are_sent_as_zero() -> None:
    assert str(context.parse_traceparent(f"00-{TRACE}-{PARENT}-ff")) == f"00-{TRACE}-{PARENT}-03"


@given(request_ids, trace_ids, span_ids, st.integers(0, 3))
def test_a_hop_keeps_request_and_trace_and_becomes_the_parent(
    request_id: str, trace_id: str, span_id: str, flags: int
) -> None:
    header = str(context.TraceParent(trace_id, span_id, flags))
    hop = context.accept([("x-request-id", request_id), ("traceparent", header), ("tracestate", "a=1")])
    with context.bound(hop):
        sent = context.outgoing_metadata()
    following = context.accept(sent)
    assert (hop.request_id, hop.trace_id, hop.parent_span_id, hop.trace_flags) == (request_id, trace_id, span_id, flags)
    assert (following.request_id, following.trace_id, following.trace_flags) == (request_id, trace_id, flags)
    assert following.parent_span_id == hop.span_id
    assert following.tracestate == "a=1"
    assert len({span_id, hop.span_id, following.span_id}) == 3


@given(st.lists(st.tuples(st.sampled_from(["x-request-id", "traceparent", "tracestate"]), st.text() | st.binary())))
def test_any_metadata_gives_a_context_that_the_next_hop_accepts(metadata: list[tuple[str, str | bytes]]) -> None:
    accepted = context.accept(metadata)
    assert context.is_request_id(accepted.request_id)
    assert context.parse_traceparent(accepted.traceparent) is not None
    assert context.parse_tracestate([accepted.tracestate]) == accepted.tracestate


@pytest.mark.parametrize("bad", ["", "a" * 129, "with space", "naïve", "line\nbreak", "٣"])
def test_a_bad_request_id_is_replaced(bad: str) -> None:
    accepted = context.accept([("x-request-id", bad), ("traceparent", HEADER)], random_hex=lambda size: "ab" * size)
    assert accepted.request_id == "ab" * 16
    assert accepted.trace_id == TRACE


def test_metadata_names_are_read_in_any_case_and_values_as_bytes() -> None:
    accepted = context.accept([("X-Request-Id", b"from-bytes"), ("TraceParent", HEADER.encode())])
    assert (accepted.request_id, accepted.trace_id, accepted.sampled) == ("from-bytes", TRACE, True)


def test_two_traceparents_are_no_trace_and_drop_the_tracestate() -> None:
    accepted = context.accept([("traceparent", HEADER), ("traceparent", HEADER), ("tracestate", "a=1")])
    assert accepted.trace_id != TRACE
    assert accepted.tracestate == ""
    assert accepted.parent_span_id == ""


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (["rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"], "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (["a=1 , b=2", "c@vendor=3"], "a=1,b=2,c@vendor=3"),
        (["a=1,,b=2,"], "a=1,b=2"),
        (["a=1,a=2"], ""),
        (["A=1"], ""),
        (["a"], ""),
        (["a=b=c"], ""),
        ([",".join(f"k{n}=1" for n in range(33))], ""),
        ([], ""),
    ],
)
def test_tracestate(headers: list[str], expected: str) -> None:
    assert context.parse_tracestate(headers) == expected


def test_a_long_tracestate_loses_its_longest_members_then_the_last_ones() -> None:
    long, many = "long=" + "x" * 200, [f"k{n}={'y' * 90}" for n in range(5)]
    assert context.parse_tracestate([",".join([many[0], long, *many[1:]])]) == ",".join(many)
    assert context.parse_tracestate([",".join([*many, "l=" + "z" * 100])]) == ",".join(many)


async def test_each_task_has_its_own_context() -> None:
    async def handle(name: str, entered: asyncio.Barrier) -> tuple[str, str]:
        token = context.bind(context.new_context(name))
        await entered.wait()
        mine = context.current()
        context.reset(token)
        assert mine is not None
        return mine.request_id, dict(context.outgoing_metadata()).get("x-request-id", "none")

    barrier = asyncio.Barrier(2)
    first, second = await asyncio.gather(handle("one", barrier), handle("two", barrier))
    assert (first, second) == (("one", "none"), ("two", "none"))
    assert context.current() is None


def test_a_new_context_says_that_its_trace_id_is_random() -> None:
    fresh = context.new_context(sampled=True)
    assert fresh.traceparent == f"00-{fresh.trace_id}-{fresh.span_id}-03"
    assert context.new_context("no good").request_id != "no good"
