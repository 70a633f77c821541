"""What becomes of a message to a webhook."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.core.events.deliveries import (
    FIRST_PAUSE_S,
    LONGEST_ASKED_S,
    LONGEST_PAUSE_S,
    TRIES,
    Again,
    Arrived,
    GivenUp,
    fate_of,
)

RNG = random.Random(1)


@pytest.mark.parametrize("status", [200, 202, 204])
def test_it_arrived(status: int) -> None:
    assert fate_of(status, TRIES, rng=RNG) == Arrived()


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 410, 413])
def test_an_answer_that_would_be_the_same_again_ends_it(status: int) -> None:
    assert fate_of(status, 1, rng=RNG, retry_after_s=1.0) == GivenUp()


@pytest.mark.parametrize("status", [None, 408, 425, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again_and_not_for_ever(status: int | None) -> None:
    assert all(isinstance(fate_of(status, tries, rng=RNG), Again) for tries in range(1, TRIES))
    assert fate_of(status, TRIES, rng=RNG) == GivenUp()


@given(st.integers(1, TRIES - 1), st.integers(), st.none() | st.floats(-1, 1e6))
def test_the_pause_doubles_within_bounds_and_obeys_the_receiver(tries: int, seed: int, asked_s: float | None) -> None:
    fate = fate_of(503, tries, rng=random.Random(seed), retry_after_s=asked_s)
    assert isinstance(fate, Again)
    whole = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1))
    assert whole / 2 <= fate.pause_s <= max(whole, min(asked_s or 0.0, LONGEST_ASKED_S))
    assert fate.pause_s >= min(asked_s or 0.0, LONGEST_ASKED_S)
