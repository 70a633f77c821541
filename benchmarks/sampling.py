"""What drawing a token costs, without a model's decode: each kind of sampling, log-probabilities, and forms.

    make bench ONLY=sampling

Rows are SmolLM2's own logits over a text, and for Gemma's vocabulary the same ones with unlikely tokens added. A figure
is the mean over the rows of each one's least time, in microseconds: a machine that others use too adds to the rest.
Rows are taken in turns, so that none is in the nearest cache. A step of SmolLM2 takes about 6,000 us for one stream,
and 50,000 for sixteen, on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
import structlog
from processes import machine, say
from servers import cores, default_model

from chorus.core.fleet.records import Feature
from chorus.core.generation import Constraint, ConstraintKind, Dry, GenerationRequest, Sampling, TextPrompt, Xtc
from chorus.engine.llama.binding import Model
from chorus.engine.llama.constraint import FormCompiler, Masks
from chorus.engine.llama.context import Context, ContextParams
from chorus.engine.llama.ranking import FloatArray, largest, log_normalizer
from chorus.engine.llama.sampling import Sampler

_GEMMA = 262_144
_TEXT = (
    "Once upon a time there was a small engine in a big city. It said: I will carry people, and bread, and letters. "
    '{"name": "Robert", "age": 42, "tags": ["a", "b"]} The result of the vote was clear to everybody in the room.'
)
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
}
_DOCUMENT = '{"name": "Robert Smith", "age": 42, "tags": ["first floor", "early", "été"]}'
_KINDS = {
    "greedy": Sampling(temperature=0.0),
    "default chain (0.8, 40, 0.95, 0.05)": Sampling(),
    "default, penalties": Sampling(repetition_penalty=1.1),
    "default, DRY": Sampling(dry=Dry(multiplier=0.8)),
    "default, XTC": Sampling(xtc=Xtc(0.5, 0.1)),
    "min-p 0.05 without top-k": Sampling(top_k=0, top_p=1.0),
    "top-p 0.95 without top-k": Sampling(top_k=0, min_p=0.0),
    "typical 0.9 without top-k": Sampling(top_k=0, top_p=1.0, min_p=0.0, typical_p=0.9),
    "nothing cut": Sampling(top_k=0, top_p=1.0, min_p=0.0),
}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each figure is measured")
    parser.add_argument("--quick", action="store_true", help="a first look")
    arguments = parser.parse_args()
    seconds = 0.05 if arguments.quick else arguments.seconds
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    say(f"{machine()}\n")
    model = Model(default_model())
    history, rows = logits(model)
    wide = np.concatenate([rows, *[rows - np.float32(8.0)] * 5], axis=1)[:, :_GEMMA].copy()
    say("| a draw, in us | 49,152 tokens | 262,144 tokens |\n| --- | ---: | ---: |")
    for name, sampling in _KINDS.items():
        costs = [draw_cost(model, sampling, history, block, seconds) for block in (rows, wide)]
        say(f"| {name} | {costs[0]:.0f} | {costs[1]:.0f} |")
    for name, call in (("log-probability", 0), ("log-probability and 5 alternatives", 5)):
        costs = [least(lambda row, call=call: scored(row, call), block, seconds) for block in (rows, wide)]
        say(f"| {name}, besides | {costs[0]:.0f} | {costs[1]:.0f} |")
    forms(model, rows, seconds)
    model.close()


def logits(model: Model) -> tuple[list[int], FloatArray]:
    """A text's tokens, and the logits after each of the later ones."""
    ids = model.tokenize(_TEXT, add_special=False, parse_special=False)
    count = len(ids)
    context = Context(model, ContextParams(256, 256, 256, 1, count, 1, 1))
    context.fill(ids, list(range(count)), [0] * count, [1] * count)
    if context.decode(count):
        raise SystemExit("the text could not be decoded")
    rows = context.logits(count)[8:].copy()
    context.close()
    return ids, rows


def least(call: Callable[[FloatArray], object], rows: FloatArray, seconds: float) -> float:
    """The least time, in microseconds, that each row ever took, on average over the rows."""
    best = [float("inf")] * len(rows)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or best[-1] == float("inf"):
        for place, row in enumerate(rows):
            began = time.perf_counter()
            call(row)
            best[place] = min(best[place], time.perf_counter() - began)
    return statistics.fmean(best) * 1e6


def draw_cost(model: Model, sampling: Sampling, history: Sequence[int], rows: FloatArray, seconds: float) -> float:
    sampler = Sampler(sampling, seed=1, choice=0, history=history, piece_of=model.written)
    indexes = cycle(range(1000))
    return least(lambda row: sampler.draw(row, next(indexes)), rows, seconds)


def scored(row: FloatArray, alternatives: int) -> object:
    return log_normalizer(row), largest(row, alternatives)


def forms(model: Model, rows: FloatArray, seconds: float) -> None:
    """What a form costs: compiling, and each token of a document."""
    compiler, end_tokens = FormCompiler(model), model.end_tokens()
    constraint = Constraint(ConstraintKind(Feature.JSON_SCHEMA.value), json.dumps(_SCHEMA))
    request = GenerationRequest("", TextPrompt(""), constraint=constraint, choice_count=16)
    began = time.perf_counter()
    compiler.matchers(request, end_tokens)
    first = time.perf_counter() - began
    began = time.perf_counter()
    compiler.matchers(request, end_tokens)
    say(f"\nA JSON Schema compiles in {(time.perf_counter() - began) * 1e3:.1f} ms; the first one of a model, with its "
        f"vocabulary, in {first * 1e3:.0f} ms.\n")  # fmt: skip
    ids = model.tokenize(_DOCUMENT, add_special=False, parse_special=False)
    masks = Masks(model.vocabulary_size, threads=cores())
    sampler = Sampler(Sampling(), seed=1, choice=0, history=())
    say("| a token of a JSON document, in us | mask | draw | accept |\n| --- | ---: | ---: | ---: |")
    for count in (1, 16):
        spent: list[list[float]] = [[], [], []]
        ends = time.perf_counter() + 4 * seconds
        while time.perf_counter() < ends or not spent[0]:
            matchers = compiler.matchers(request, end_tokens)[:count]
            for index, token_id in enumerate(ids):
                times = [time.perf_counter()]
                found = masks.compute(matchers)
                times.append(time.perf_counter())
                for mask, row in zip(found, rows, strict=False):
                    sampler.draw(row, index, mask)
                times.append(time.perf_counter())
                for matcher in matchers:
                    matcher.accept(token_id)
                times.append(time.perf_counter())
                for place in range(3):
                    spent[place].append((times[place + 1] - times[place]) / count * 1e6)
        median = [statistics.median(costs) for costs in spent]
        mean = statistics.fmean(spent[0])
        say(
            f"| {count} streams at once, each | {median[0]:.0f} (mean {mean:.0f}) | {median[1]:.0f} | {median[2]:.0f} |"
        )


if __name__ == "__main__":
    main()
