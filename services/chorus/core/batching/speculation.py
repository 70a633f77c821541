"""Guessing tokens ahead, to be checked all at once: where from, how many, and whether it pays.

A guess costs computing one more token in a batch, which is cheaper than a step of its own, and wins a step where it
comes true. What is drawn is the same with and without: a guess is kept only where the draw gives that very token.
(Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", arXiv 2211.17192; prompt lookup
is Saxena's, 2023: text is often copied from what was said before.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from chorus.core.batching.steptime import StepTime

_NGRAM = 3
_LONGEST_MATCH = 12
_COUNTS = (2, 4, 8, 16)
_WORTH = 1.1  # what is gained by less than this is lost again by noise
_SMOOTHING = 0.08
_FIRST_PATIENCE, _LAST_PATIENCE = 32, 1024


class Source(StrEnum):
    """Where a guess comes from; each has an acceptance of its own."""

    SHORT_MATCH = "short_match"  # 3 tokens were seen before
    MATCH = "match"  # 4 or 5
    LONG_MATCH = "long_match"  # 6 or more
    DRAFT_MODEL = "draft_model"


_PRIORS = {Source.SHORT_MATCH: 0.3, Source.MATCH: 0.5, Source.LONG_MATCH: 0.85, Source.DRAFT_MODEL: 0.8}


class PromptLookup:
    """Finds where the last tokens of one sequence stood before. `tokens` is its owner's list, which only grows."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._last: dict[tuple[int, ...], int] = {}
        self._indexed = _NGRAM  # every run of three tokens that ends before this is in the index

    def propose(self, count: int) -> tuple[Source, list[int]] | None:
        """What followed when the last tokens stood there before, at most `count` tokens; None if they never did."""
        tokens, last = self._tokens, self._last
        end = len(tokens)
        for known in range(self._indexed, end):
            last[tuple(tokens[known - _NGRAM : known])] = known
        self._indexed = max(self._indexed, end)
        before = last.get(tuple(tokens[end - _NGRAM :])) if end > _NGRAM else None
        if before is None:
            return None
        length = _NGRAM
        while length < _LONGEST_MATCH and before > length and tokens[before - length - 1] == tokens[end - length - 1]:
            length += 1
        source = Source.SHORT_MATCH if length < 4 else Source.MATCH if length < 6 else Source.LONG_MATCH
        return source, tokens[before : before + count]


@dataclass(slots=True)
class _Record:
    acceptance: float
    skipped: int = 0
    patience: int = _FIRST_PATIENCE


@dataclass(slots=True)
class Speculation:
    """Decides for one model, from the acceptance it has seen and the step times it has measured."""

    times: StepTime
    _records: dict[Source, _Record] = field(
        default_factory=lambda: {source: _Record(prior) for source, prior in _PRIORS.items()}
    )

    def acceptance(self, source: Source) -> float:
        """The share of this source's guesses that came true lately."""
        return self._records[source].acceptance

    def count(self, source: Source, *, tokens: int, cells: int, cost_s: float = 0.0) -> int:
        """How many tokens to guess for one stream, in a step that computes `tokens` already; 0 if it doesn't pay.

        `cost_s` is what making each guess takes by itself, as with a draft model.
        Where it has not paid for long, it is tried again now and then: texts change.
        """
        record = self._records[source]
        alone = self.times.decode_s(tokens, cells)
        if not alone:
            return 0
        best, gain = 0, _WORTH
        for count in _COUNTS:
            together = self.times.decode_s(tokens + count, cells)
            assert together is not None
            together += count * cost_s
            ratio = (tokens + _expected(record.acceptance, count)) / tokens * alone / max(together, 1e-9)
            if ratio > gain:
                best, gain = count, ratio
        if best:
            return best
        record.skipped += 1
        if record.skipped < record.patience:
            return 0
        record.skipped = 0
        record.patience = min(2 * record.patience, _LAST_PATIENCE)
        return _COUNTS[0]

    def learn(self, source: Source, guessed: int, kept: int) -> None:
        """Of `guessed` tokens the first `kept` came true; those behind the first wrong one say nothing."""
        record = self._records[source]
        for came_true in [True] * kept + [False] * (kept < guessed):
            record.acceptance += _SMOOTHING * (came_true - record.acceptance)
        if kept == guessed:
            record.patience = _FIRST_PATIENCE


def _expected(acceptance: float, count: int) -> float:
    """How many of `count` guesses come true, each with this chance once those before it did."""
    return acceptance * (1.0 - acceptance**count) / (1.0 - acceptance) if acceptance < 1.0 else float(count)
