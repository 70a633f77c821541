"""How many refusals become entries: all are counted, and a flood of them is a few lines."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.core.audit.refusals import Refusals

MINUTE_S = 60.0
STEPS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("qs"), st.sampled_from([0.0, 1.0, 30.0, 61.0])))


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_every_refusal_is_in_an_entry_or_in_the_next_and_there_is_one_a_minute(
    steps: list[tuple[str, str, float]],
) -> None:
    refusals, now = Refusals(), 0.0
    asked, told, last = dict[tuple[str, str], int](), dict[tuple[str, str], int](), dict[tuple[str, str], float]()
    for caller, reason, later_s in steps:
        now += later_s
        kind = (caller, reason)
        asked[kind] = asked.get(kind, 0) + 1
        before = refusals.unnoted(caller, reason, now)
        if before is None:
            assert now < last[kind] + MINUTE_S
            continue
        told[kind] = told.get(kind, 0) + before + 1
        assert told[kind] == asked[kind]
        assert now >= last.get(kind, -MINUTE_S) + MINUTE_S
        last[kind] = now


def test_a_flood_of_callers_is_not_remembered_without_bound() -> None:
    refusals = Refusals()
    assert all(refusals.unnoted(f"caller-{number}", "QUOTA_EXCEEDED", 0.0) == 0 for number in range(1_001))
    assert refusals.unnoted("caller-0", "QUOTA_EXCEEDED", 0.0) == 0  # forgotten
    assert refusals.unnoted("caller-1000", "QUOTA_EXCEEDED", 0.0) is None
