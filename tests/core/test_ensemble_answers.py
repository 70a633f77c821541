"""Which answers say the same."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.ensemble.answers import normalise, same_answer
from chorus.core.ensemble.records import Member, Strategy
from chorus.core.ensemble.strategies import STRATEGIES
from tests.core.ensemble_world import World, task_of

EQUAL = """
Paris. | paris
**Paris** | paris
***Paris*** | _Paris_
`Paris` | "Paris"
“Paris”! | (Paris)
# Paris | - Paris
**New York** | new york
**Answer:** Paris | Paris
The answer is **42**. | 42
The answer is: −5 | -5
Paris, France | Paris (France)
x>3 | x > 3
3–5 | 3 - 5
$5$ | \\(5\\)
```x = 1``` | x=1
1,200 | 1200
well-known | well known
don't | don’t
Ｐａｒｉｓ | Paris
巴黎。 | 巴黎
राम। | राम
😀 | 😀
❤️ | ❤
+ | +
"""
UNLIKE = """
x > 3 | x < 3
x >= 3 | x <= 3
a==b | a!=b
x=1 | x≠1
p∧q | p∨q
!x | x
A+ | A-
A | A-
A | A*
Na+ | Na-
C | C++
C++ | C#
2*3 | 2/3
a - b | a + b
3 - 5 | 5 - 3
−5 | 5
- 5 | 5
(2 + 3) * 4 | 2 + (3 * 4)
O(n^2) | O(n*2)
10² | 102
1.5 | 15
12:30 | 1230
5% | 5
का | की
दिन | दीन
ไม่ | ไม้
😀 | 😢
... | ?
"""


def pairs(table: str) -> list[tuple[str, ...]]:
    return [tuple(line.split(" | ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("first", "second"), pairs(EQUAL))
def test_form_alone_makes_no_difference(first: str, second: str) -> None:
    assert same_answer(first, second)


@pytest.mark.parametrize(("first", "second"), pairs(UNLIKE))
def test_what_says_something_else_is_another_answer(first: str, second: str) -> None:
    assert not same_answer(first, second)


@settings(max_examples=60)
@given(st.text(max_size=12), st.sampled_from(["é", "Ä", "ो", "ไม่", "が", "ệ"]))
def test_how_unicode_writes_it_makes_no_difference(text: str, letter: str) -> None:
    composed, taken_apart = (unicodedata.normalize(form, text + letter) for form in ("NFC", "NFD"))
    assert normalise(composed) == normalise(taken_apart)
    assert same_answer(composed, composed)


def test_each_answer_is_looked_at_once() -> None:
    """Comparing all with all, as often as one comes in, held the event loop up for half a minute."""
    members = [Member(f"m{number}", "m") for number in range(20)]
    normalise.cache_clear()
    world = World(
        task_of(Strategy.VOTE, members), STRATEGIES[Strategy.VOTE], lambda ask: f"A long answer of {ask.part_id}"
    )
    world.run()
    assert normalise.cache_info().misses == len(members)
