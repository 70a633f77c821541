"""How hard a question is, guessed from its prompt."""

from __future__ import annotations

import re

from chorus.core.ensemble.prompts import question_of
from chorus.core.ensemble.records import Complexity
from chorus.core.generation import GenerationRequest

_MANY_STEPS = re.compile(
    r"\b(?:prove|derive|design|analy[sz]e|compare|explain why|step by step|implement|refactor|evaluate|strategy)\b",
    re.IGNORECASE,
)
_LONG_WORDS, _LONGER_WORDS = 60, 400


def estimate_complexity(request: GenerationRequest) -> Complexity:
    """By the length of the question, and by words that ask for several steps."""
    question = question_of(request.prompt)
    words, steps = len(question.split()), len(set(map(str.lower, _MANY_STEPS.findall(question))))
    points = (words > _LONG_WORDS) + (words > _LONGER_WORDS) + min(steps, 2)
    return tuple(Complexity)[min(points, 3)]
