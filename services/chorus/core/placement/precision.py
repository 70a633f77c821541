"""What a file loses by its rounding: of one family's files that could answer, the more precise one is worth some time.

Who asks for a family wants its answers, and its files answer alike only where they keep eight bits of a weight or more
(`benchmarks/adaptive.py` tells how much two models lose with four). So a file with fewer has to be faster by as much as
this says; without it, the quickest file would get everything. Runners with equal files are not told apart by it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import sqrt

# Such as Q4_K_M, IQ2_XS, q8_0, F16, BF16, int4; the number is that of bits, or near it.
_BITS = re.compile(r"(?:q|int|f|fp)(\d+)", re.IGNORECASE)
_KEPT_BITS = 8
# Four bits of a model of that size have to be twice as fast, and each bit less doubles what is added. So does a fourth
# of its parameters: the fewer there are, the more each of them tells.
_EVEN_BITS = 4
_EVEN_PARAMETERS = 1e9
_MOST_BY_SIZE = 4.0
_UNKNOWN = 7e9
# Of one number of bits, llama.cpp's newer layouts (K and I) lose about half of what the oldest ones do, or less.
_NEWER = re.compile(r"^I?Q\d_K|^IQ", re.IGNORECASE)
_NEWER_SHARE = 0.5


@lru_cache(maxsize=1024)
def loss(quantization: str, parameter_count: int) -> float:
    """By what share of an answer's seconds a file has to be faster than one of its family that loses nothing.

    Less for a larger model, whose rounding hurts less; `parameter_count` 0: not known. 0 from eight bits on, and where
    the name tells nothing: an engine that doesn't say is not put last for it.
    """
    found = _BITS.search(quantization)
    if found is None or int(found[1]) >= _KEPT_BITS:
        return 0.0
    share = 2.0 ** (_EVEN_BITS - int(found[1])) * (_NEWER_SHARE if _NEWER.search(quantization) else 1.0)
    return float(share * min(_MOST_BY_SIZE, sqrt(_EVEN_PARAMETERS / (parameter_count or _UNKNOWN))))
