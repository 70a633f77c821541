"""Which tokens a stream goes on from when its context is full and the oldest may go."""

from __future__ import annotations

from collections.abc import Iterable


def kept_tokens(prompt_length: int, context_length: int) -> int:
    """How many tokens at the beginning never go: the prompt, or half of the context where it is longer."""
    return min(prompt_length, context_length // 2)


def shift(tokens: list[int], keep: int) -> None:
    """Lets the older half of what stands behind the first `keep` tokens go."""
    del tokens[keep : keep + max((len(tokens) - keep) // 2, 1)]


def replay(prompt: list[int], answer: Iterable[int], context_length: int) -> list[int]:
    """The tokens that a stream goes on from after this answer, having shifted whenever its context was full.

    It follows from the tokens alone, so a stream that goes on elsewhere sees what it would have seen here.
    """
    tokens = list(prompt)
    keep = kept_tokens(len(prompt), context_length)
    for token in answer:
        tokens.append(token)
        if len(tokens) >= context_length:
            shift(tokens, keep)
    return tokens
