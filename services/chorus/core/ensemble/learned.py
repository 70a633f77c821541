"""What `weighing` knows. Written by `python benchmarks/quality.py fit`, from 432 recorded items."""

from chorus.core.ensemble.weighing import Learned, Weights

_KINDS = {
    "comparisons": "0 a and ann ben carla cm david emma frank grace heavier henry iris is jack kate kilos leo "
    "lighter old older q shorter tall taller weighs who years younger",
    "geography": "a capital continent currency is of on q the what which",
    "larger": "0 a is larger number or q which",
    "past": "a is of past q tense the what",
    "plurals": "a is of plural q the what",
    "sums": "+ 0 a is q what",
}
_WEIGHTS: dict[str, tuple[tuple[float, ...], dict[str, float]]] = {
    "*": ((1.651, 2.316, 0.304, -1.297, 0.09), {}),
    "gemma-3-270m": (
        (1.768, 5.42, 4.399, -6.492, 0.324),
        {"comparisons": -0.612, "geography": 0.745, "larger": -0.899, "past": 0.052, "plurals": 0.774, "sums": -0.058},
    ),
    "smollm2-135m-instruct": (
        (1.637, 0.984, 2.173, -0.814, 0.297),
        {"comparisons": -0.122, "geography": -0.93, "larger": -0.809, "past": 1.576, "plurals": 1.228, "sums": -0.942},
    ),
}
LEARNED = Learned(
    {kind: frozenset(words.split()) for kind, words in _KINDS.items()},
    {model: Weights(answer, kinds) for model, (answer, kinds) in _WEIGHTS.items()},
    0.0,
)
