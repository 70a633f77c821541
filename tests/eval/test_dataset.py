"""Datasets: what is written is read back, and what is wrong is named by its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.errors import InvalidRequestError
from chorus.eval.dataset import Item, read_dataset, write_dataset

_TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)
_ITEMS = st.builds(
    Item, id=_TEXT, prompt=_TEXT, answers=st.lists(_TEXT, min_size=1, max_size=2).map(tuple), family=_TEXT,
    stop=st.lists(_TEXT, max_size=1).map(tuple), chat=st.booleans(),
)  # fmt: skip


@given(st.lists(_ITEMS, min_size=1, max_size=4, unique_by=lambda item: item.id))
@settings(max_examples=30)
def test_what_is_written_is_read_back(items: list[Item]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        write_dataset(path, items)
        assert read_dataset(path) == items


def test_short_forms(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(
        '{"question": "2 + 2?", "answer": 4}\n\n{"prompt": "A:", "answers": ["a"], "choices": ["a", "b"]}\n'
    )
    first, second = read_dataset(path)
    assert (first.id, first.chat, first.answers) == ("1", True, ("4",))
    assert (second.id, second.chat, second.choices) == ("3", False, ("a", "b"))


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("3", "no object"),
        ("{}", "either a prompt or a question"),
        ('{"prompt": "a", "question": "b", "answer": "c"}', "either a prompt or a question"),
        ('{"prompt": "a"}', "no answers"),
        ('{"prompt": 3, "answer": "a"}', "prompt must be text"),
        ('{"prompt": "a", "answer": "a", "answers": "a"}', "list of texts"),
        ('{"prompt": "a", "answer": "a", "choices": ["b"]}', "none of which"),
        ('{"prompt": "a", "answer": "a", "aswer": "b"}', "aswer"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InvalidRequestError, match=word) as caught:
        read_dataset(path)
    assert "items.jsonl:2" in caught.value.message


def test_no_items_and_no_file(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for path, word in ((empty, "no items"), (tmp_path / "none.jsonl", "can't be read")):
        with pytest.raises(InvalidRequestError, match=word):
            read_dataset(path)
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": "x", "prompt": "a", "answer": "b"}\n' * 2)
    with pytest.raises(InvalidRequestError, match="both have the id x"):
        read_dataset(twice)
