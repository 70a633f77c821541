"""The audit chain: whatever is done to a log of it is found, and a log that nobody touched is whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.audit import Deed, DeedKind
from chorus.core.audit.chain import FIRST, Head, Report, append, digest, read, verify
from chorus.core.errors import InvalidRequestError

FACTS = st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers() | st.booleans(), max_size=2)
DEEDS = st.builds(
    Deed,
    at=st.floats(0, 4e9, allow_nan=False),
    by=st.text(max_size=8),
    kind=st.sampled_from(DeedKind),
    target=st.text(max_size=8),
    facts=FACTS,
)
LOGS = st.lists(DEEDS, min_size=1, max_size=6)


def written(deeds: list[Deed]) -> tuple[list[bytes], list[Head]]:
    """The lines of a log, and its head after each of them."""
    head, lines, heads = Head(), [], []
    for deed in deeds:
        head, line = append(head, deed)
        lines.append(line)
        heads.append(head)
    return lines, heads


def check(lines: list[bytes], head: Head | None, known: Head | None = None) -> Report:
    return verify([("log", lines)], head=head, known=known)


@given(LOGS, st.integers(0, 8))
def test_a_log_that_nobody_touched_is_whole_however_it_is_cut_into_files(deeds: list[Deed], cut: int) -> None:
    lines, heads = written(deeds)
    report = verify([("a", lines[:cut]), ("b", lines[cut:])], head=heads[-1], known=heads[0])
    assert report.problems == []
    assert (report.count, report.head) == (len(deeds), heads[-1])
    assert [read(line).deed for line in lines] == deeds


@given(LOGS, st.data())
def test_any_change_of_a_byte_is_found(deeds: list[Deed], data: st.DataObject) -> None:
    lines, heads = written(deeds)
    whole = bytearray(b"".join(lines))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    assert check(bytes(whole).splitlines(keepends=True), heads[-1]).problems


@given(LOGS, st.data())
def test_any_entry_taken_out_or_told_twice_is_found(deeds: list[Deed], data: st.DataObject) -> None:
    lines, heads = written(deeds)
    at = data.draw(st.integers(0, len(lines) - 1))
    assert check(lines[:at] + lines[at + 1 :], heads[-1]).problems
    assert check([*lines[: at + 1], *lines[at:]], heads[-1]).problems


@given(LOGS.filter(lambda deeds: len(deeds) > 1), st.data())
def test_any_other_order_is_found(deeds: list[Deed], data: st.DataObject) -> None:
    lines, heads = written(deeds)
    order = data.draw(st.permutations(range(len(lines))).filter(lambda order: order != sorted(order)))
    assert check([lines[index] for index in order], heads[-1]).problems


@given(LOGS, DEEDS, st.data())
def test_who_writes_all_of_it_anew_is_found_by_an_entry_noted_elsewhere(
    deeds: list[Deed], forged: Deed, data: st.DataObject
) -> None:
    lines, heads = written(deeds)
    at = data.draw(st.integers(0, len(lines) - 1))
    anew, new_heads = written([*deeds[:at], forged, *deeds[at + 1 :]])
    report = check(anew, new_heads[-1])
    assert report.problems == []
    noted = check(anew, new_heads[-1], known=heads[-1])
    assert bool(noted.problems) == (anew != lines)


@given(LOGS, st.data())
def test_files_may_lie_in_an_archive_if_the_entry_before_is_known(deeds: list[Deed], data: st.DataObject) -> None:
    lines, heads = written(deeds)
    at = data.draw(st.integers(1, len(lines)))
    kept = lines[at:]
    assert check(kept, heads[-1], known=heads[at - 1]).problems == [] or not kept
    if kept:
        assert check(kept, heads[-1]).problems
        wrong = Head(at, "f" * 64)
        assert check(kept, heads[-1], known=wrong).problems


@given(LOGS, st.data())
def test_a_torn_last_line_is_found_and_said(deeds: list[Deed], data: st.DataObject) -> None:
    lines, heads = written(deeds)
    torn = lines[-1][: data.draw(st.integers(1, len(lines[-1]) - 1))]
    before = heads[-2] if len(heads) > 1 else Head()
    [problem] = check([*lines[:-1], torn], before).problems
    assert f"torn after {len(torn)} bytes" in problem.what
    assert problem.line == len(lines)


def test_a_missing_head_is_said() -> None:
    lines, _ = written([Deed(1.0, "kim", DeedKind.CACHE_CLEARED)])
    [problem] = check(lines, None).problems
    assert "is missing" in problem.what


@given(st.binary(max_size=60))
def test_no_line_crashes_the_reader(line: bytes) -> None:
    report = check([line.replace(b"\n", b"") + b"\n"], None)
    assert report.problems


def test_kinds_of_a_later_version_are_read() -> None:
    _, line = append(Head(), Deed(1.0, "kim", "moon.landed"))
    assert read(line).deed.kind == "moon.landed"


def test_heads_are_printed_and_read() -> None:
    head = Head(12, digest(b"x"))
    assert Head.parse(str(head)) == head
    for wrong in ("", "12", "x:" + FIRST, "1:" + "g" * 64, "²:" + FIRST):
        with pytest.raises(InvalidRequestError, match="NUMBER:SHA256"):
            Head.parse(wrong)
