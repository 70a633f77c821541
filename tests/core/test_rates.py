"""How often something happened lately."""

from __future__ import annotations

import pytest

from chorus.core.fleet.rates import Rate


def test_a_steady_rate_is_found_and_fades_once_it_ends() -> None:
    rate = Rate(window_s=10.0)
    assert rate.per_s(0.0) == 0.0
    for moment in range(1000):
        rate.note(moment / 4)
    assert rate.per_s(249.75) == pytest.approx(4.0, rel=0.02)
    assert rate.per_s(259.75) == pytest.approx(4.0 / 2.718, rel=0.02)
    assert rate.per_s(1e6) == pytest.approx(0.0, abs=1e-9)
