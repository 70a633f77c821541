"""Whether a bandit that picks model and strategy pays: its regret in simulation, and over recorded answers.

    python benchmarks/learning.py          seconds; wants what `benchmarks/quality.py record` has recorded

Recorded answers tell how every way would have fared with every item, so that what a bandit would have earned is known,
whatever it picks. It starts with nothing, meets the items of the test half in an order drawn anew in each run, and is
told of the way that it picked alone. Its reward is whether the answer is right: a user who rates every answer, rightly.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import platformdirs
import quality_items
import quality_record
from quality import LARGE, SMALL, Line, auto, cascade, greedy, vocabulary, vote

from chorus.core.ensemble.bandit import Bandit, Way
from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.records import Strategy
from chorus.core.ensemble.weighing import kind_of
from chorus.eval.dataset import Item
from chorus.eval.scoring import is_right
from chorus.eval.statistics import paired_difference

SEED = 20261126
RUNS = 200
_STEPS = 4000
_CONTEXTS, _WAYS = 6, 5

Floats = npt.NDArray[np.float64]
WAYS = (
    Way(Strategy.ROUTE, SMALL),
    Way(Strategy.ROUTE, LARGE),
    Way(Strategy.CASCADE),
    Way(Strategy.VOTE),
    Way(Strategy.AUTO),
)


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, default=platformdirs.user_cache_path("chorus") / "quality.jsonl")
    arguments = parser.parse_args()
    _simulated()
    families = quality_items.families(vocabulary())
    items = {item.id: item for own in families.values() for item in own}
    lines = [line for line in quality_record.read(arguments.recording) if line["id"] in items]
    _replayed([line for line in lines if line["split"] == "test"], items)


def _simulated() -> None:
    """Ways whose worth is drawn for each context; regret is what the best way there would have earned more."""
    regrets = {"bandit": np.zeros(_STEPS), "one context for all": np.zeros(_STEPS), "at random": np.zeros(_STEPS)}
    runs = 20
    ways = [Way(Strategy.ROUTE, str(number)) for number in range(_WAYS)]
    for run in range(runs):
        rng = Random(SEED + run)
        worth = [[rng.betavariate(3, 3) for _ in ways] for _ in range(_CONTEXTS)]
        bandits = {"bandit": Bandit(), "one context for all": Bandit()}
        for step in range(_STEPS):
            place = rng.randrange(_CONTEXTS)
            luck = rng.random()
            regrets["at random"][step] += max(worth[place]) - worth[place][rng.randrange(_WAYS)]
            for name, bandit in bandits.items():
                context = str(place) if name == "bandit" else ""
                way = bandit.choose(context, ways, rng)
                own = worth[place][ways.index(way)]
                bandit.learn(context, way, float(luck < own))
                regrets[name][step] += max(worth[place]) - own
    quarters = [_STEPS // 4 * place for place in range(5)]
    print(
        f"Simulated: {_CONTEXTS} contexts, {_WAYS} ways, {_STEPS} answers, {runs} runs. Regret an answer, in points.\n"
    )
    print(f"| | {' | '.join(f'answers {a + 1}-{b}' for a, b in pairwise(quarters))} |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, regret in regrets.items():
        shares = [100 * regret[a:b].mean() / runs for a, b in pairwise(quarters)]
        print(f"| {name} | {' | '.join(f'{share:.1f}' for share in shares)} |")


def _replayed(test: Sequence[Line], items: Mapping[str, Item]) -> None:
    if not test:
        raise SystemExit("nothing is recorded: python benchmarks/quality.py record")
    answered = (
        partial(greedy, SMALL),
        partial(greedy, LARGE),
        cascade,
        partial(vote, {SMALL: 5, LARGE: 5}),
        partial(auto, LEARNED, items),
    )
    right = np.array([[float(is_right(of(line).text, line["answers"])) for of in answered] for line in test])
    families = [line["family"] for line in test]
    contexts = {
        "bandit, by kind of question": [kind_of(items[line["id"]].prompt, LEARNED.kinds) for line in test],
        "bandit, told the task": families,
        "bandit, no context": [""] * len(test),
    }
    rows = {f"{way.strategy} {way.model}".strip(): right[:, place] for place, way in enumerate(WAYS)}
    rows |= {name: _earned(right, own) for name, own in contexts.items()}
    best = np.zeros(len(test))
    for family in set(families):
        own = np.array([other == family for other in families])
        best[own] = right[own][:, right[own].mean(0).argmax()]
    print(f"\nReplayed: {len(test)} items of the test half, {RUNS} orders; right, and to `auto` as it is.\n")
    print("| | right | to auto | regret to the best way of each task |\n| --- | ---: | ---: | ---: |")
    for name, scores in rows.items():
        gain = paired_difference(list(scores), list(right[:, -1]), strata=families) if name != "auto" else ""
        print(f"| {name} | {100 * scores.mean():.1f} | {gain} | {100 * (best - scores).mean():.1f} |")


def _earned(right: Floats, contexts: Sequence[str]) -> Floats:
    """The mean over runs of what each item was answered with."""
    total = np.zeros(len(right))
    for run in range(RUNS):
        rng, bandit = Random(SEED + run), Bandit()
        for place in rng.sample(range(len(right)), len(right)):
            way = bandit.choose(contexts[place], WAYS, rng)
            reward = float(right[place, WAYS.index(way)])
            bandit.learn(contexts[place], way, reward)
            total[place] += reward
    return total / RUNS


if __name__ == "__main__":
    main()
