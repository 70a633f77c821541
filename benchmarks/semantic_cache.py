"""What the answer cache's gate takes for one question: the learned gate beside plain cosine, on the half it never saw.

    python -m benchmarks.semantic_cache [--fillings 8]

Near misses are judged apart by kind: those that the tuning half has none of, and those of which it has other templates.
The bar: of near misses of unseen kinds, and of all, the upper end of the 95% interval (Clopper and Pearson 1934, both
sides) of the share accepted is at most 1%, where at least 30% of paraphrases are hits. Pairs of one template are no
independent draws, so how many templates had any near miss accepted stands beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence

from benchmarks.figures import Bar, verdict
from benchmarks.semantic import questions_test, questions_tuning
from benchmarks.semantic.template import Pair, pairs
from benchmarks.semantic.vectors import cosines

from chorus.store.gate import read_gate

SEED = 20261127
COSINES = (0.80, 0.85, 0.90, 0.95, 0.97, 0.99)
MOST_ACCEPTED, LEAST_HITS, LEAST_NEAR = 0.01, 0.30, 1000


def upper_bound(accepted: int, of: int, level: float = 0.95) -> float:
    """The upper end of the exact two-sided interval of a share."""
    if accepted >= of:
        return 1.0
    tail = (1.0 - level) / 2.0
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2.0
        if _at_most(accepted, of, share) > tail:
            low = share
        else:
            high = share
    return high


def _at_most(count: int, of: int, share: float) -> float:
    """The chance of at most `count` successes."""
    if share <= 0.0:
        return 1.0
    logs = (
        math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1) + k * math.log(share)
        + (of - k) * math.log1p(-share)
        for k in range(count + 1)
    )  # fmt: skip
    return sum(map(math.exp, logs))


def row(
    name: str, takes: Sequence[bool], found: Sequence[Pair], *, seen: frozenset[str]
) -> tuple[str, dict[str, float]]:
    """A line of the table, and its figures."""
    near = [(pair, took) for pair, took in zip(found, takes, strict=True) if not pair.same]
    unseen = [took for pair, took in near if pair.kind not in seen]
    hits = [took for pair, took in zip(found, takes, strict=True) if pair.same]
    templates = {pair.template for pair, took in near if took}
    figures = {
        "hits": sum(hits) / len(hits),
        "unseen": upper_bound(sum(unseen), len(unseen)),
        "all": upper_bound(sum(took for _, took in near), len(near)),
        "unseen_count": float(len(unseen)),
    }
    accepted = sum(took for _, took in near)
    line = (
        f"| {name} | {figures['hits']:.1%} | {sum(unseen)} of {len(unseen)} (<= {figures['unseen']:.2%}) "
        f"| {accepted} of {len(near)} (<= {figures['all']:.2%}) | {len(templates)} |"
    )
    return line, figures


def by_kind(found: Sequence[Pair], takes: Sequence[bool]) -> None:
    """Prints what the gate did with each kind."""
    counts: dict[tuple[bool, str], list[bool]] = defaultdict(list)
    for pair, took in zip(found, takes, strict=True):
        counts[pair.same, pair.kind].append(took)
    print("\n| kind | | accepted |\n|---|---|---|")
    for (same, kind), took in sorted(counts.items(), key=lambda item: (not item[0][0], item[0][1])):
        what = "paraphrase" if same else "near miss, " + ("seen" if kind in questions_test.SEEN_KINDS else "unseen")
        print(f"| {kind} | {what} | {sum(took)} of {len(took)} ({sum(took) / len(took):.1%}) |")


def check_apart() -> None:
    """Raises AssertionError where the halves share a template or the unseen kinds are not unseen."""
    tuning = {kind for template in questions_tuning.TEMPLATES for kind in template.near}
    test = {kind for template in questions_test.TEMPLATES for kind in template.near} - questions_test.SEEN_KINDS
    assert not {t.name for t in questions_tuning.TEMPLATES} & {t.name for t in questions_test.TEMPLATES}
    assert not {t.base for t in questions_tuning.TEMPLATES} & {t.base for t in questions_test.TEMPLATES}
    assert not tuning & test, tuning & test


def main() -> int:
    """Returns 0 where the bar is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/semantic_cache.py")
    parser.add_argument("--fillings", type=int, default=8, help="Ways in which each template's slots are filled.")
    parser.add_argument("--show", action="store_true", help="Print each near miss that was accepted.")
    options = parser.parse_args()
    check_apart()
    found = pairs(questions_test.TEMPLATES, fillings=options.fillings, seed=SEED)
    near, gate = cosines(found), read_gate()
    took = [gate.accepts(pair.first, pair.second, cosine) for pair, cosine in zip(found, near, strict=True)]
    seen = questions_test.SEEN_KINDS
    print("| accepts by | paraphrase hits | near misses of unseen kinds | all near misses | templates with any |")
    print("|---|---|---|---|---|")
    above: Callable[[float], list[bool]] = lambda least: [cosine >= least for cosine in near]  # noqa: E731
    for least in COSINES:
        print(row(f"cosine {least:.2f}", above(least), found, seen=seen)[0])
    line, figures = row("the gate", took, found, seen=seen)
    print(line)
    by_kind(found, took)
    if options.show:
        for pair, taken, cosine in zip(found, took, near, strict=True):
            if taken and not pair.same:
                print(f"  {pair.kind}: {pair.first} | {pair.second} (cosine {cosine:.3f})")
    return verdict(
        [
            Bar(f"at least {LEAST_NEAR} near misses of unseen kinds", figures["unseen_count"] >= LEAST_NEAR),
            Bar(f"unseen kinds: upper bound {figures['unseen']:.2%} <= 1%", figures["unseen"] <= MOST_ACCEPTED),
            Bar(f"all near misses: upper bound {figures['all']:.2%} <= 1%", figures["all"] <= MOST_ACCEPTED),
            Bar(f"paraphrase hits {figures['hits']:.1%} >= 30%", figures["hits"] >= LEAST_HITS),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
