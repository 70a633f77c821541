"""A thousand unequal nodes under 20,000 requests a second, simulated: where do requests wait, and who draws them?

    make bench ONLY=simulation

The coordinator's own decision (the pure core, as it runs in production) beside round robin, least loaded and the better
of two by load, on the same arrivals and the same troubles: from second 3 on, 5% of the nodes answer everything with an
instant error, 5% are five times as slow, and 2% die at second 5. Times are simulated; what is real is the decision.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from random import Random

from figures import Bar, percentile, verdict
from processes import machine, say

from chorus.sim import Chorus, LeastLoaded, Outcome, Plan, Policy, RoundRobin, Trouble, TwoChoices, make_fleet, simulate

_POLICIES: dict[str, Callable[[Random], Policy]] = {
    "round robin": RoundRobin,
    "least loaded": LeastLoaded,
    "better of two": TwoChoices,
    "Chorus": Chorus,
}
_BUSY = 0.7  # of what the fleet can decode, with all its nodes well
_SHARE_BAR = 0.02


def run(nodes: int, rate: float, seconds: float) -> int:
    """Simulates and prints; returns an exit status."""
    troubles = [
        (3.0, seconds, Trouble.FAILS, 0.05),
        (3.0, seconds, Trouble.SLOW, 0.05),
        (5.0, seconds + 60.0, Trouble.DEAD, 0.02),
    ]
    found: dict[str, Outcome] = {}
    capacity = make_fleet(nodes, Random(1)).tokens_per_second
    plan = Plan(seconds=seconds, requests_per_second=rate, tokens=_BUSY * capacity / rate)
    print(
        f"{machine()}; {nodes} nodes, {rate:.0f} requests a second of {plan.tokens:.0f} tokens, for {seconds:.0f} s.\n"
    )
    for name, policy in _POLICIES.items():
        began = time.monotonic()
        found[name] = simulate(make_fleet(nodes, Random(1), troubles), plan, policy)
        say(f"{name}: simulated in {time.monotonic() - began:.0f} s")
    print("| policy | answered | failed | whole answer p50 | p99 | on failing nodes | on slow nodes | attempts |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seen in found.items():
        p50, p99 = (percentile(seen.waits_s, share) for share in (0.5, 0.99))
        failing, slow = seen.share_on(Trouble.FAILS), seen.share_on(Trouble.SLOW)
        print(
            f"| {name} | {seen.answered} | {seen.failed} | {p50:.2f} s | {p99:.2f} s | {failing:.2%} | {slow:.2%} "
            f"| {seen.attempts / max(seen.asked, 1):.3f} |"
        )
    ours = found.pop("Chorus")
    p99 = percentile(ours.waits_s, 0.99)
    best = min(percentile(other.waits_s, 0.99) for other in found.values())
    return verdict(
        [
            Bar(f"{ours.share_on(Trouble.FAILS):.2%} went to failing nodes, less than {_SHARE_BAR:.0%}",
                ours.share_on(Trouble.FAILS) < _SHARE_BAR),
            Bar(f"{ours.failed} requests failed", ours.failed == 0),
            Bar(f"p99 {p99 / best:.2f}x that of the best of the others, less than 1", p99 < best),
        ]
    )  # fmt: skip


def main() -> int:
    """Reads the command line; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20_000.0, help="requests a second (20000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="simulated seconds (10)")
    arguments = parser.parse_args()
    try:
        return run(arguments.nodes, arguments.rate, arguments.seconds)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
