"""What strategies are worth on small tasks that small models can partly do, each figure with its 95% interval.

    python benchmarks/quality.py record    what two models say to each item: 90 minutes of CPU; may be broken off, and
                                           goes on where it was
    python benchmarks/quality.py compose   what judge and refine make of those answers, on a sample
    python benchmarks/quality.py fit       learns from the tuning half, and writes core/ensemble/learned.py
    python benchmarks/quality.py           the tables, from the test half

The items are made by script (`quality_items.py`); two families of them are never tuned on.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
import platformdirs
import quality_compose
import quality_items
import quality_record
import structlog
from quality_fit import Fitter

from chorus.core.ensemble.answers import same_answer
from chorus.core.ensemble.confidence import confidence_of
from chorus.core.ensemble.learned import LEARNED
from chorus.core.ensemble.records import Answer, Strategy
from chorus.core.ensemble.steps import Task, best_agreed
from chorus.core.ensemble.weighing import Learned, best_weighed
from chorus.core.generation import GenerationRequest, TextPrompt
from chorus.engine.llama.binding import Model
from chorus.eval.dataset import Item
from chorus.eval.scoring import is_right
from chorus.eval.statistics import Interval, calibration_error, clopper_pearson, not_worse, paired_difference
from chorus.testing.packaged_models import gemma_path, smollm2_path

SMALL, LARGE = "smollm2-135m-instruct", "gemma-3-270m"
PENALTY, AGAIN = 1.0, 0.0  # by leaving each family of the tuning half out in turn
MARGIN = 0.3  # by leaving a quarter of the tuning half out in turn: the clearest gain over the best model of each task
THRESHOLD = 0.75
_LEARNED = Path(__file__).parent.parent / "services/chorus/core/ensemble/learned.py"

Line = Mapping[str, Any]
Answered = Callable[[Line], Answer]


def main() -> None:
    """Does what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("record", "compose", "fit", "report"), default="report")
    parser.add_argument("--recording", type=Path, default=platformdirs.user_cache_path("chorus") / "quality.jsonl")
    parser.add_argument("--most", type=int, default=1600, help="items of a family that are recorded")
    parser.add_argument("--sample", type=int, default=120, help="items of a family that are judged and refined")
    parser.add_argument("--skip", type=int, default=0, help="leave so many items out that were recorded first")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    families = quality_items.families(vocabulary())
    if arguments.what == "record":
        items = [item for own in families.values() for item in own[: arguments.most]]
        arguments.recording.parent.mkdir(parents=True, exist_ok=True)
        models = {SMALL: smollm2_path(), LARGE: gemma_path()}
        quality_record.record(models, items, arguments.recording, threads=arguments.threads)
        return
    items_by_id = {item.id: item for own in families.values() for item in own}
    recorded = quality_record.read(arguments.recording)[arguments.skip :]
    lines = [line for line in recorded if line["id"] in items_by_id]
    if not lines:
        raise SystemExit(f"nothing is recorded at {arguments.recording}: python benchmarks/quality.py record")
    tune, test = ([line for line in lines if line["split"] == split] for split in ("tune", "test"))
    prompts = {line["id"]: items_by_id[line["id"]].prompt for line in lines}
    composed = arguments.recording.with_stem(f"{arguments.recording.stem}_composed")
    if arguments.what == "compose":
        sample = quality_compose.sampled(test, arguments.sample, seed=quality_items.SEED)
        asyncio.run(quality_compose.record(_drafting(), sample, prompts, composed))
    elif arguments.what == "fit":
        _write(Fitter(tune, prompts), len(tune))
    else:
        _report(tune, test, items_by_id)
        _composed([line for line in test if line["id"] in (told := quality_compose.read(composed))], told, items_by_id)


def vocabulary() -> list[str]:
    """SmolLM2's tokens, of which items are made."""
    model = Model(smollm2_path(), vocabulary_only=True)
    pieces = [model.written(token_id).decode("utf-8", "replace") for token_id in range(model.vocabulary_size)]
    model.close()
    return pieces


def _write(fitter: Fitter, count: int) -> None:
    learned = fitter.fit(penalty=PENALTY, again=AGAIN, margin=MARGIN)
    kinds = {kind: " ".join(sorted(words)) for kind, words in learned.kinds.items()}
    weights = {model: (own.answer, dict(own.kinds)) for model, own in learned.weights.items()}
    text = f'''"""What `weighing` knows. Written by `python benchmarks/quality.py fit`, from {count} recorded items."""

from chorus.core.ensemble.weighing import Learned, Weights

_KINDS = {pformat(kinds, width=110)}
_WEIGHTS: dict[str, tuple[tuple[float, ...], dict[str, float]]] = {pformat(weights, width=110)}
LEARNED = Learned(
    {{kind: frozenset(words.split()) for kind, words in _KINDS.items()}},
    {{model: Weights(answer, kinds) for model, (answer, kinds) in _WEIGHTS.items()}},
    {learned.again},
    {learned.best},
    {learned.margin},
)
'''
    _LEARNED.write_text(text, encoding="utf-8")
    print(f"{_LEARNED.name}: learnt from {count} items; now: ruff format {_LEARNED}")


# --- strategies, over recorded answers ------------------------------------------------------------------------------


def answers_of(line: Line, counts: Mapping[str, int]) -> list[Answer]:
    """As many of each model's answers as `counts` says, the likeliest words' first."""
    found = []
    for model, count in counts.items():
        told = line["outputs"][model]
        for number, output in enumerate([told["greedy"], *told["samples"]][:count]):
            logprobs = (*output["logprobs"], output["end"])
            answer = Answer(f"{model}-{number}", output["text"], logprobs=logprobs, tokens=len(logprobs), model=model)
            found.append(answer)
    return found


def greedy(model: str, line: Line) -> Answer:
    return answers_of(line, {model: 1})[0]


def agreed(answers: Sequence[Answer]) -> Answer:
    """The answer that most agree on."""
    task = Task(GenerationRequest("", TextPrompt("")), Strategy.VOTE, (), aggregator_model="")
    best = best_agreed(task, [_confident(answer) for answer in answers])
    assert best is not None
    return best


def vote(counts: Mapping[str, int], line: Line) -> Answer:
    return agreed([one for one in answers_of(line, {m: 1 + c for m, c in counts.items()}) if one.part_id[-1] != "0"])


def auto(learned: Learned, items: Mapping[str, Item], line: Line) -> Answer:
    answers = answers_of(line, {SMALL: 1, LARGE: 1})
    best = best_weighed(answers, items[line["id"]].prompt, same_answer, learned)
    assert best is not None
    return best


def cascade(line: Line) -> Answer:
    first = greedy(SMALL, line)
    return first if confidence_of(first) >= THRESHOLD else greedy(LARGE, line)


def _confident(answer: Answer) -> Answer:
    return replace(answer, confidence=confidence_of(answer))


# --- tables ---------------------------------------------------------------------------------------------------------


def _report(tune: Sequence[Line], test: Sequence[Line], items: Mapping[str, Item]) -> None:
    best = {
        family: max(
            (SMALL, LARGE), key=lambda model: _share([line for line in test if line["family"] == family], model)
        )
        for family in sorted({line["family"] for line in test})
    }
    strategies: dict[str, Answered] = {
        f"{SMALL}, greedy": partial(greedy, SMALL),
        f"{LARGE}, greedy": partial(greedy, LARGE),
        "best model of each task": lambda line: greedy(best[line["family"]], line),
        f"vote, 5 of {SMALL}": partial(vote, {SMALL: 5}),
        f"vote, 5 of {LARGE}": partial(vote, {LARGE: 5}),
        "vote, 5 of each": partial(vote, {SMALL: 5, LARGE: 5}),
        f"cascade at {THRESHOLD}": cascade,
        "auto": partial(auto, LEARNED, items),
    }
    right = {
        name: [is_right(answered(line).text, line["answers"]) for line in test] for name, answered in strategies.items()
    }
    single = max((f"{SMALL}, greedy", f"{LARGE}, greedy"), key=lambda name: sum(right[name]))
    names = [line["family"] for line in test]
    print(f"{len(test)} items of the test half; tuned on {len(tune)} others. In brackets 95% intervals.\n")
    print(f"| strategy | right | to {single} | to the best of each task |\n| --- | ---: | ---: | ---: |")
    for name, scores in right.items():
        to = [
            str(paired_difference(scores, right[other], strata=names)) if name != other else ""
            for other in (single, "best model of each task")
        ]
        print(f"| {name} | {clopper_pearson(sum(scores), len(scores))} | {to[0]} | {to[1]} |")
    _by_task(right, names, single)
    _calibration(test)
    _cascade(test)


def _share(lines: Sequence[Line], model: str) -> int:
    return sum(is_right(greedy(model, line).text, line["answers"]) for line in lines)


def _by_task(right: Mapping[str, Sequence[bool]], names: Sequence[str], single: str) -> None:
    def of(name: str, family: str) -> list[float]:
        return [float(score) for score, own in zip(right[name], names, strict=True) if own == family]

    tasks = sorted(set(names))
    level = 1.0 - 0.05 / len(tasks)  # Bonferroni's, the strictest of Holm's steps
    fine = not_worse(
        {task: of("auto", task) for task in tasks}, {task: of(single, task) for task in tasks}, margin=0.05
    )
    shown = [name for name in right if "each" not in name or name == "vote, 5 of each"]
    print(f"\n| task | items | {' | '.join(shown)} | auto to {single} | not 5 worse (Holm) |")
    print("| --- |" + " ---: |" * (len(shown) + 3))
    for task in tasks:
        shares = " | ".join(f"{100 * float(np.mean(of(name, task))):.1f}" for name in shown)
        gain = paired_difference(of("auto", task), of(single, task), level=level)
        unseen = " (unseen)" if task in quality_items.UNSEEN else ""
        print(f"| {task}{unseen} | {names.count(task)} | {shares} | {gain} | {'yes' if fine[task] else 'no'} |")


def _calibration(test: Sequence[Line]) -> None:
    print("\n| confidence, of greedy answers | ECE before | calibrated |\n| --- | ---: | ---: |")
    for model in (SMALL, LARGE):
        answers = [greedy(model, line) for line in test]
        scores = [is_right(answer.text, line["answers"]) for answer, line in zip(answers, test, strict=True)]
        before = [float(np.exp(np.mean(answer.logprobs))) for answer in answers]
        after = [confidence_of(answer) for answer in answers]
        print(f"| {model} | {calibration_error(before, scores):.3f} | {calibration_error(after, scores):.3f} |")


def _drafting() -> dict[str, quality_compose.Model]:
    return {SMALL: quality_compose.Model(smollm2_path(), True), LARGE: quality_compose.Model(gemma_path(), False)}


def _composed(sample: Sequence[Line], told: Mapping[str, Mapping[Strategy, Answer]], items: Mapping[str, Item]) -> None:
    """Judge and refine beside others on the same items: only the sample has them."""
    sample = [line for line in sample if set(told[line["id"]]) == set(quality_compose.COMPOSED)]
    if not sample:
        return
    names = [line["family"] for line in sample]
    texts = {
        f"{SMALL}, greedy": [greedy(SMALL, line).text for line in sample],
        f"{LARGE}, greedy": [greedy(LARGE, line).text for line in sample],
        "auto": [auto(LEARNED, items, line).text for line in sample],
    }
    for strategy in quality_compose.COMPOSED:
        texts[f"{strategy}, by {SMALL}"] = [told[line["id"]][strategy].text for line in sample]
    right, named = (
        {
            name: [scored(text, line["answers"]) for text, line in zip(own, sample, strict=True)]
            for name, own in texts.items()
        }
        for scored in (is_right, quality_compose.mentions)
    )
    print(f"\n{len(sample)} items of the test half, of the likeliest answer of each model:\n")
    print(
        f"| strategy | right | to {LARGE} | to auto | right anywhere in the text |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, scores in right.items():
        to = [str(paired_difference(scores, right[other], strata=names)) if name != other else ""
              for other in (f"{LARGE}, greedy", "auto")]  # fmt: skip
        anywhere = clopper_pearson(sum(named[name]), len(sample))
        print(f"| {name} | {clopper_pearson(sum(scores), len(scores))} | {to[0]} | {to[1]} | {anywhere} |")
    refined = f"{Strategy.REFINE}, by {SMALL}"
    sure = [
        quality_compose.confidence(
            quality_compose.task_of("", Strategy.REFINE, SMALL, _drafting()),
            told[line["id"]][Strategy.REFINE],
            [quality_compose.draft(line, model) for model in (SMALL, LARGE)],
        )
        for line in sample
    ]
    errors = [f"{calibration_error(sure, scores[refined]):.3f}" for scores in (right, named)]
    print(f"\nECE of a refined answer's confidence: {errors[0]}; where right anywhere in the text counts: {errors[1]}.")


def _cascade(test: Sequence[Line]) -> None:
    small = np.array([is_right(greedy(SMALL, line).text, line["answers"]) for line in test], dtype=float)
    large = np.array([is_right(greedy(LARGE, line).text, line["answers"]) for line in test], dtype=float)
    sure = np.array([confidence_of(greedy(SMALL, line)) for line in test])
    print(f"\n| deferred to {LARGE} | threshold | right | deferring as many at random | difference |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    thresholds = [float(np.quantile(sure, share)) for share in (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)]
    for threshold in (*thresholds, THRESHOLD):
        deferred = sure < threshold
        share = float(deferred.mean())
        ours, random = np.where(deferred, large, small), share * large + (1.0 - share) * small
        gain: Interval = paired_difference(list(ours), list(random), strata=[line["family"] for line in test])
        print(
            f"| {100 * share:.0f}% | {threshold:.2f} | {100 * ours.mean():.1f} | {100 * random.mean():.1f} | {gain} |"
        )


if __name__ == "__main__":
    main()
