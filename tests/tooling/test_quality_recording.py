"""What the quality benchmark reads of a recording."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import quality_record
from hypothesis import given
from hypothesis import strategies as st

LINES = st.lists(st.fixed_dictionaries({"id": st.sampled_from("abcde"), "text": st.text(max_size=5)}))


@given(LINES, st.text(alphabet='{"id', max_size=5))
def test_each_item_counts_once_as_it_was_recorded_first(lines: list[dict[str, str]], cut_off: str) -> None:
    written = "".join(json.dumps(line) + "\n" for line in lines) + cut_off
    found = quality_record.lines_of(written)
    first: dict[str, dict[str, str]] = {}
    for line in reversed(lines):
        first[line["id"]] = line
    assert {line["id"]: line for line in found} == first
    assert len(found) == len(first)
    assert [line["id"] for line in found] == list(dict.fromkeys(line["id"] for line in lines))


def test_nothing_is_recorded_yet(tmp_path: Path) -> None:
    assert quality_record.read(tmp_path / "none.jsonl") == []
