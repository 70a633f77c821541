"""How well the complexity of a prompt is told, on templates and prompts that nothing was learnt from.

    python -m benchmarks.complexity fit    learns from the tuning half, and writes core/ensemble/complexity_learned.py
    python -m benchmarks.complexity        the tables, from the test half

Prompts of one template are alike, so a template counts once, and intervals are over templates.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from benchmarks.complexity_prompts import Labelled, test, tuning

from chorus.core.ensemble.complexity import complexity_of, features
from chorus.core.ensemble.records import Complexity
from chorus.eval.statistics import Interval, paired_difference

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
LEVELS = list(Complexity)
_LEARNED = Path(__file__).parent.parent / "services/chorus/core/ensemble/complexity_learned.py"
_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
_STEPS = 1200
# The rule that was there before: by length, and by words that ask for several steps.
_MANY_STEPS = re.compile(
    r"\b(?:prove|derive|design|analy[sz]e|compare|explain why|step by step|implement|refactor|evaluate|strategy)\b",
    re.IGNORECASE,
)


def main() -> None:
    """Does what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("fit", "report"), default="report")
    arguments = parser.parse_args()
    tune, held_out = tuning(), test()
    if arguments.what == "fit":
        _write(tune)
    else:
        _report(tune, held_out)


def plain_rule(text: str) -> Complexity:
    """See above."""
    words, steps = len(text.split()), len(set(map(str.lower, _MANY_STEPS.findall(text))))
    return LEVELS[min((words > 60) + (words > 400) + min(steps, 2), 3)]


# --- learning -------------------------------------------------------------------------------------------------------


def _rows(prompts: Sequence[Labelled]) -> Floats:
    return np.array([features(prompt.text) for prompt in prompts])


def _labels(prompts: Sequence[Labelled]) -> Ints:
    return np.array([LEVELS.index(prompt.level) for prompt in prompts])


def fit(rows: Floats, labels: Ints, penalty: float) -> Floats:
    """Weights by level and feature: logistic regression, ridge on all but the first feature, by a bounded Newton's
    method (D. Böhning, 1992): the Hessian is bounded from above once, so that each step goes down."""
    count, size = len(LEVELS), rows.shape[1]
    target = np.eye(count)[labels]
    ridge = np.full(size, penalty)
    ridge[0] = 1e-3
    bound = np.linalg.inv(0.5 * rows.T @ rows + np.diag(ridge))
    weights = np.zeros((count, size))
    for _ in range(_STEPS):
        scores = rows @ weights.T
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        weights += ((target - chances).T @ rows - ridge * weights) @ bound
    return weights


def _penalty(prompts: Sequence[Labelled], rows: Floats) -> tuple[float, float]:
    """The penalty that tells most of templates which were left out, and what share that is: ten folds of templates."""
    labels = _labels(prompts)
    names = list(dict.fromkeys(prompt.template for prompt in prompts))
    folds = np.array([names.index(prompt.template) % 10 for prompt in prompts])

    def right(penalty: float) -> float:
        hits = np.zeros(len(prompts))
        for fold in range(10):
            out = folds == fold
            weights = fit(rows[~out], labels[~out], penalty)
            hits[out] = (rows[out] @ weights.T).argmax(1) == labels[out]
        return float(hits.mean())

    return max(((penalty, right(penalty)) for penalty in _PENALTIES), key=lambda found: found[1])


def _write(tune: Sequence[Labelled]) -> None:
    rows = _rows(tune)
    penalty, share = _penalty(tune, rows)
    weights = fit(rows, _labels(tune), penalty)
    lines = [f"    Complexity.{level.name}: {tuple(round(float(w), 3) for w in weights[place])},\n"
             for place, level in enumerate(LEVELS)]  # fmt: skip
    _LEARNED.write_text(
        f'"""What `complexity` knows. Written by `python -m benchmarks.complexity fit`, from {len(tune)} prompts."""'
        "\n\n"
        "from collections.abc import Mapping\n\nfrom chorus.core.ensemble.records import Complexity\n\n"
        f"WEIGHTS: Mapping[Complexity, tuple[float, ...]] = {{\n{''.join(lines)}}}\n"
        '"""By level, one for each of `complexity.FEATURES`."""\n',
        encoding="utf-8",
    )
    print(f"penalty {penalty}: {100 * share:.1f}% of templates left out; now: ruff format {_LEARNED}")


# --- tables ---------------------------------------------------------------------------------------------------------


def _report(tune: Sequence[Labelled], held_out: Sequence[Labelled]) -> None:
    majority = max(LEVELS, key=lambda level: sum(prompt.level is level for prompt in tune))
    told = {
        "always the commonest": [majority for _ in held_out],
        "the rule that was there": [plain_rule(prompt.text) for prompt in held_out],
        "features": [complexity_of(prompt.text) for prompt in held_out],
    }
    written = np.array([prompt.template == prompt.text for prompt in held_out])
    print(f"{len(held_out)} prompts of {len(_names(held_out))} templates; learnt from {len(tune)} others.\n")
    print("| | of all | of templates | single prompts | to the rule that was there | at most one level off |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    right = {name: _right(levels, held_out, 0) for name, levels in told.items()}
    for name, levels in told.items():
        shares = [_of_templates(right[name], held_out, chosen) for chosen in (np.ones_like(written), ~written, written)]
        gain = _of_templates(right[name] - right["the rule that was there"], held_out, np.ones_like(written))
        near = _of_templates(_right(levels, held_out, 1), held_out, np.ones_like(written))
        print(f"| {name} | {' | '.join(map(str, shares))} | {gain} | {near} |")
    _confusion(told["features"], held_out)


def _names(prompts: Sequence[Labelled]) -> list[str]:
    return list(dict.fromkeys(prompt.template for prompt in prompts))


def _right(levels: Sequence[Complexity], prompts: Sequence[Labelled], most_off: int) -> Floats:
    return np.array([
        float(abs(LEVELS.index(level) - LEVELS.index(prompt.level)) <= most_off)
        for level, prompt in zip(levels, prompts, strict=True)
    ])  # fmt: skip


def _of_templates(scores: Floats, prompts: Sequence[Labelled], chosen: npt.NDArray[np.bool_]) -> Interval:
    """The mean over templates of the mean over a template's prompts."""
    templates = np.array([prompt.template for prompt in prompts])
    means = [float(scores[templates == name].mean()) for name in dict.fromkeys(templates[chosen])]
    return paired_difference(means, [0.0] * len(means))


def _confusion(levels: Sequence[Complexity], prompts: Sequence[Labelled]) -> None:
    print(f"\n| prompts, by what they are | {' | '.join(f'taken as {level}' for level in LEVELS)} |")
    print("| --- |" + " ---: |" * len(LEVELS))
    for actual in LEVELS:
        taken = [level for level, prompt in zip(levels, prompts, strict=True) if prompt.level is actual]
        print(f"| {actual} | {' | '.join(str(taken.count(level)) for level in LEVELS)} |")


if __name__ == "__main__":
    main()
