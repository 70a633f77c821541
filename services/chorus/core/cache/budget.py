"""How often a semantic hit is generated anyway and compared, so that wrong ones stay within a budget.

After vCache (Schroeder et al. 2025, arXiv 2502.03771): each entry has a belief of its own about how often a hit of it
is right, starts from what the gate was measured to do, and learns by exploring. With the chance p that a hit is right
(its lower end, to be safe) and the budget d of wrong answers, a share t of would-be hits is explored, so that
t + (1 - t) p >= 1 - d: what is explored is right by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """`wrong`: the share of wrong answers that is allowed; `least`: the share of would-be hits explored at least.

    The prior is that of `prior_weight` comparisons of which `prior_wrong` were wrong.
    """

    wrong: float = 0.02
    least: float = 0.02
    prior_weight: float = 200.0
    prior_wrong: float = 1.0

    def chance_right(self, right: int, wrong: int) -> float:
        """That the next hit of an entry is right, after so many comparisons: a standard deviation under the mean."""
        good = self.prior_weight - self.prior_wrong + right
        bad = self.prior_wrong + wrong * _SURPRISE
        count = good + bad
        mean = good / count
        return max(0.0, mean - math.sqrt(mean * (1.0 - mean) / (count + 1.0)))

    def explored_share(self, right: int, wrong: int) -> float:
        """Which share of an entry's would-be hits is to be generated anyway, 0 to 1."""
        chance = self.chance_right(right, wrong)
        if 1.0 - chance <= self.wrong:
            return self.least
        return min(1.0, max(self.least, (1.0 - self.wrong - chance) / (1.0 - chance)))

    def explores(self, right: int, wrong: int, draw: float) -> bool:
        """Whether this one is; `draw` is from [0, 1)."""
        return draw < self.explored_share(right, wrong)


_SURPRISE = 10.0
"""What a wrong hit of an entry weighs beside a right one: its question draws near misses, on average or not."""
