"""Answers weighed: which of several different ones is most likely right, by what is known of who says so.

Each answer has evidence, a log-odds: a logistic function of what its tokens' log-probabilities tell (J. Platt, 1999),
by numbers that are each model's own, and of how good the model is at such questions. Which kind a question is of is
told by its words. Where it is of no known kind, or nobody has recorded the model, the numbers are an average model's:
what is left is what the tokens tell. All are learnt from recorded answers of real models (`learned.py`).

Evidence is rough: where no model can really do a kind of question, following it is tossing coins. So at questions of a
known kind the model that is best at them keeps the word unless another answer is believed clearly more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log

from chorus.core.ensemble.answers import SameAnswer, clusters
from chorus.core.ensemble.records import Answer

_LEAST = -20.0
_ROUNDING = 1e-3
_WORD = re.compile(r"[^\W\d_]+|\d+|[+*/=<>-]")
# At the end of a paragraph stands what is asked; of megabytes that were pasted before it, reading takes a second.
_ASKED_CHARACTERS = 4000
# Of a question's words a kind has to know so many.
_KNOWN = 0.7
ANY_MODEL = "*"
# A model's own numbers, in this order, of one answer: see `features`.
FEATURES = ("bias", "total", "mean", "worst", "first")
# The longest answers that anything was learnt from, their end included.
_LEARNT_TOKENS = 13


@dataclass(frozen=True, slots=True)
class Weights:
    """What is known of one model: for each of `FEATURES` what it adds to the evidence that an answer is right, and what
    the question's kind adds."""

    answer: tuple[float, ...]
    kinds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Learned:
    """All that was learnt: `kinds` has the words of each kind's questions, `weights` what is known of each model and of
    `ANY_MODEL`, and `again` is what a further answer of one model counts beside its first that says the same. `best`
    names the model that is best at a kind, and `margin` is how much more than its answer another has to be believed."""

    kinds: Mapping[str, frozenset[str]]
    weights: Mapping[str, Weights]
    again: float = 0.0
    best: Mapping[str, str] = field(default_factory=dict)
    margin: float = 0.0

    def of(self, model: str) -> Weights:
        """What is known of a model."""
        return self.weights.get(model) or self.weights[ANY_MODEL]


def believable(logprobs: Sequence[float]) -> list[float]:
    """Those that can be log-probabilities, bounded to -20 to 0: NaN tells nothing, nor does what is clearly above 0."""
    return [min(0.0, max(_LEAST, logprob)) for logprob in logprobs if logprob <= _ROUNDING]


def features(logprobs: Sequence[float]) -> tuple[float, ...]:
    """What an answer's token log-probabilities (natural, its end included) tell, in the order of `FEATURES`.

    A text is taken in pieces as long as the answers that were learnt from, and is the mean of them: by its sum it would
    be wrong for its length alone.
    """
    bounded = believable(logprobs) or [log(0.5)]
    pieces = [_piece(bounded[at : at + _LEARNT_TOKENS]) for at in range(0, len(bounded), _LEARNT_TOKENS)]
    return tuple(sum(column) / len(pieces) for column in zip(*pieces, strict=True))


def _piece(logprobs: Sequence[float]) -> tuple[float, ...]:
    total = sum(logprobs)
    return (1.0, max(_LEAST, total), total / len(logprobs), min(logprobs), logprobs[0])


def words_of(prompt: str) -> frozenset[str]:
    """The words of a prompt's last paragraph, in lower case, every number as `0`: examples may stand before it."""
    question = prompt.rstrip().rpartition("\n\n")[2][-_ASKED_CHARACTERS:]
    return frozenset("0" if word[0].isdigit() else word.casefold() for word in _WORD.findall(question))


def kind_of(prompt: str, kinds: Mapping[str, frozenset[str]]) -> str:
    """The kind whose questions know most of a question's words; empty where none knows enough of them."""
    words = words_of(prompt)
    shares = {kind: len(words & known) / len(words) for kind, known in kinds.items()} if words else {}
    best = max(shares, key=lambda kind: (shares[kind], -len(kinds[kind])), default="")
    return best if best and shares[best] >= _KNOWN else ""


def evidence(answer: Answer, weights: Weights, kind: str = "") -> float:
    """The log-odds that an answer by itself is right."""
    told = sum(w * value for w, value in zip(weights.answer, features(answer.logprobs or ()), strict=True))
    return told + weights.kinds.get(kind, 0.0)


def probability(log_odds: float) -> float:
    """The probability that a log-odds stands for."""
    return 1.0 / (1.0 + exp(-log_odds)) if log_odds >= 0 else exp(log_odds) / (1.0 + exp(log_odds))


def best_weighed(answers: Sequence[Answer], prompt: str, same: SameAnswer, learned: Learned) -> Answer | None:
    """The answer with most belief behind it; None without answers.

    A party of answers that say the same is believed by the sum over its models of the most that one of its answers is
    believed, further ones of the same model adding a share of theirs. That of the model that is best at such questions
    is left only for one that is believed more by the margin. What says nothing counts where nobody says anything.
    """
    answers = [answer for answer in answers if not answer.is_blank] or answers
    if not answers:
        return None
    scale = _Scale.of(answers, prompt, same, learned)
    return answers[max(scale.parties[scale.chosen], key=scale.beliefs.__getitem__)]


def is_weighed(
    answers: Sequence[Answer], coming: Sequence[str], prompt: str, same: SameAnswer, learned: Learned
) -> bool:
    """Whether what `best_weighed` answers is settled, whatever one more answer of each of the models `coming` says.

    Each adds one at most to the belief in a party, that of those who said so already or one of its own.
    """
    if not answers:
        return False
    scale, most = _Scale.of(answers, prompt, same, learned), len(coming)
    lead = scale.believed[scale.chosen]
    others = [believed for place, believed in enumerate(scale.believed) if place != scale.chosen]
    ahead = lead - max((*others, 0.0)) - most
    if not scale.best or ahead > learned.margin:
        return ahead > 0.0
    # The word of the best model stays unless another answer gets ahead of it; and no other word is that model's.
    has_the_word = scale.of_best == [scale.chosen] and not any(_may_be(scale.best, model, learned) for model in coming)
    return has_the_word and ahead >= -learned.margin


def _may_be(best: str, model: str, learned: Learned) -> bool:
    return model == best or model not in learned.weights  # of a name that nobody knows: perhaps a file of that model


@dataclass(frozen=True, slots=True)
class _Scale:
    """Answers on the scale: the parties of those that say the same, as indexes, what each answer and each party is
    believed, the party that is chosen, the model that is best at the question, and the parties that it speaks for."""

    parties: Sequence[Sequence[int]]
    beliefs: Sequence[float]
    believed: Sequence[float]
    chosen: int
    best: str
    of_best: Sequence[int]

    @classmethod
    def of(cls, answers: Sequence[Answer], prompt: str, same: SameAnswer, learned: Learned) -> _Scale:
        kind = kind_of(prompt, learned.kinds)
        # What is known of a model is of the kinds that it was learnt from: of others it would be a prejudice.
        known = [learned.of(answer.model if kind else ANY_MODEL) for answer in answers]
        beliefs = [probability(evidence(answer, own, kind)) for answer, own in zip(answers, known, strict=True)]
        parties = clusters([answer.text for answer in answers], same)
        believed = [_belief(party, answers, beliefs, learned.again) for party in parties]
        chosen = max(range(len(parties)), key=believed.__getitem__)
        best = learned.best.get(kind, "")
        of_best = [place for place, party in enumerate(parties) if any(answers[index].model == best for index in party)]
        if of_best and believed[chosen] - believed[own := max(of_best, key=believed.__getitem__)] <= learned.margin:
            chosen = own
        return cls(parties, beliefs, believed, chosen, best, of_best)


def _belief(party: Sequence[int], answers: Sequence[Answer], beliefs: Sequence[float], again: float) -> float:
    by_model: dict[str, list[float]] = {}
    for index in party:
        by_model.setdefault(answers[index].model, []).append(beliefs[index])
    return sum(max(own) + again * (sum(own) - max(own)) for own in by_model.values())
