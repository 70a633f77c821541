"""Embeddings of questions by all-MiniLM-L6-v2, computed by numpy from the package's own weights."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from benchmarks.semantic.template import Pair
from tests.engine import bert


def cosines(pairs: Iterable[Pair]) -> list[float]:
    """The cosine of each pair's embeddings."""
    known: dict[str, bert.Array] = {}

    def vector(text: str) -> bert.Array:
        if text not in known:
            found = bert.vector(bert.framed(text))
            known[text] = (found / np.linalg.norm(found)).astype(np.float32)
        return known[text]

    return [float(vector(pair.first) @ vector(pair.second)) for pair in pairs]
