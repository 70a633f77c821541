"""What `weighing` knows. Written by `python benchmarks/quality.py fit`, from 1764 recorded items."""

from chorus.core.ensemble.weighing import Learned, Weights

_KINDS = {
    "comparisons": "0 a and ann ben carla cm david emma frank grace heavier henry iris is jack kate kilos leo "
    "lighter old older q shorter tall taller weighs who years younger",
    "geography": "a capital continent currency is of on q the what which",
    "larger": "0 a is larger number or q which",
    "past": "a is of past q tense the what",
    "plurals": "a is of plural q the what",
    "problems": "0 a and ann apples away ben books buys cards carla coins cookies david does eggs emma finds "
    "flowers frank gives has have henry how iris jack kate leo loses many marbles more now pencils "
    "q stamps",
    "sums": "+ 0 a is q what",
}
_WEIGHTS: dict[str, tuple[tuple[float, ...], dict[str, float]]] = {
    "*": ((1.556, 1.787, 0.763, -0.552, -0.296), {}),
    "gemma-3-270m": (
        (1.285, 2.233, 4.66, -2.994, 0.161),
        {
            "comparisons": -0.387,
            "geography": 1.177,
            "larger": -0.744,
            "past": 0.55,
            "plurals": 1.352,
            "problems": -1.618,
            "sums": -0.331,
        },
    ),
    "smollm2-135m-instruct": (
        (1.532, 1.217, 2.45, -1.224, 0.331),
        {
            "comparisons": 0.075,
            "geography": -0.602,
            "larger": -0.628,
            "past": 1.416,
            "plurals": 1.535,
            "problems": -0.979,
            "sums": -0.817,
        },
    ),
}
LEARNED = Learned(
    {kind: frozenset(words.split()) for kind, words in _KINDS.items()},
    {model: Weights(answer, kinds) for model, (answer, kinds) in _WEIGHTS.items()},
    0.0,
    {
        "comparisons": "smollm2-135m-instruct",
        "geography": "gemma-3-270m",
        "larger": "smollm2-135m-instruct",
        "past": "smollm2-135m-instruct",
        "plurals": "smollm2-135m-instruct",
        "problems": "smollm2-135m-instruct",
        "sums": "smollm2-135m-instruct",
    },
    0.3,
)
