"""What `weighing` knows. Written by `python benchmarks/quality.py fit`, from 5050 recorded items."""

from chorus.core.ensemble.weighing import Learned, Weights

_KINDS = {
    "comparisons": "0 a and ann ben carla cm david emma frank grace heavier henry iris is jack kate kilos leo "
    "lighter old older q shorter tall taller weighs who years younger",
    "geography": "a capital continent currency is of on q the what which",
    "larger": "0 a is larger number or q which",
    "past": "a is of past q tense the what",
    "plurals": "a is of plural q the what",
    "problems": "0 a and ann apples away ben books buys cards carla coins cookies david does eggs emma finds "
    "flowers frank gives grace has have henry how iris jack kate leo loses many marbles more now "
    "pencils q stamps",
    "sums": "+ 0 a is q what",
}
_WEIGHTS: dict[str, tuple[tuple[float, ...], dict[str, float]]] = {
    "*": ((1.44, 2.002, -0.264, -0.635, -0.041), {}),
    "gemma-3-270m": (
        (0.827, 1.312, 5.253, -2.517, 0.191),
        {
            "comparisons": -0.088,
            "geography": 1.392,
            "larger": -0.672,
            "past": 0.657,
            "plurals": 1.757,
            "problems": -1.991,
            "sums": -1.055,
        },
    ),
    "smollm2-135m-instruct": (
        (1.484, 1.616, 1.472, -1.492, 0.588),
        {
            "comparisons": 0.019,
            "geography": -0.536,
            "larger": -0.557,
            "past": 1.287,
            "plurals": 1.7,
            "problems": -1.184,
            "sums": -0.728,
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
