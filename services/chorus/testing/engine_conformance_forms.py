"""What engines that follow a form, or have DRY or XTC, must do: more checks of `engine_conformance`'s kind.

A module of its own because a server that only pretends to be one passes the rest, and cannot pass these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.records import Feature
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    DeliveredChoice,
    Dry,
    FinishReason,
    GenerationRequest,
    Sampling,
    StopConditions,
    Xtc,
)
from chorus.testing.engine_conformance import Check
from chorus.testing.engine_subject import GREEDY, Subject, ask, assert_idle, expect, hear, hear_anew

FORM_CHECKS: list[Check] = []
_NEEDED: dict[str, frozenset[Feature]] = {}
_SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 30}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


def form_needs(check: Check) -> frozenset[Feature]:
    """The features that a model must have for this check to say anything."""
    return _NEEDED[check.__name__]


def _check(*features: Feature) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        FORM_CHECKS.append(check)
        _NEEDED[check.__name__] = frozenset(features)
        return check

    return register


def _formed(subject: Subject, kind: ConstraintKind, source: str, tokens: int = 60, seed: int = 1) -> GenerationRequest:
    return ask(
        subject,
        sampling=Sampling(temperature=0.8, seed=seed),
        stop=StopConditions(max_tokens=tokens),
        constraint=Constraint(kind, source),
    )


@_check(Feature.JSON_SCHEMA)
async def a_schema_makes_documents_of_its_kind(subject: Subject) -> None:
    """Whole ones, unless the length cuts them, and the choice ends by itself."""
    for seed in range(3):
        heard = await hear(subject.engine, _formed(subject, ConstraintKind.JSON_SCHEMA, json.dumps(_SCHEMA), seed=seed))
        assert heard.finished.choices[0].reason is FinishReason.END
        document = json.loads(heard.text())
        assert document.keys() == {"kind", "age"}
        assert document["kind"] in ("cat", "dog")
        assert document["age"] in range(31)
    await assert_idle(subject)


@_check(Feature.GRAMMAR)
async def a_grammar_is_kept_to(subject: Subject) -> None:
    """Its root rule is `root`; it may be recursive."""
    grammar = 'root ::= "<" (root | word) ">"\nword ::= [a-z]{2,5}'
    heard = await hear(subject.engine, _formed(subject, ConstraintKind.GRAMMAR, grammar))
    text = heard.text()
    if heard.finished.choices[0].reason is FinishReason.END:
        assert re.fullmatch(r"<+[a-z]{2,5}>+", text)
        assert text.count("<") == text.count(">")
    else:
        assert re.match(r"<+([a-z]{0,5}>*)?$", text)


@_check(Feature.REGEX)
async def an_expression_is_matched_by_the_whole_text(subject: Subject) -> None:
    """From its first character to its last."""
    for seed in range(3):
        heard = await hear(subject.engine, _formed(subject, ConstraintKind.REGEX, r"\d{2}:\d{2}( UTC)?", seed=seed))
        assert re.fullmatch(r"\d{2}:\d{2}( UTC)?", heard.text())


@_check(Feature.REGEX, Feature.RESUME, Feature.TOKEN_IDS)
async def a_form_goes_on_from_every_split(subject: Subject) -> None:
    """The delivered tokens are part of it; those that do not fit it are refused."""
    request = _formed(subject, ConstraintKind.REGEX, "(red|green|blue) (cat|dog) and [0-9]{3} 🙂")
    whole = await hear(subject.engine, request)
    ids = whole.ids()
    for split in range(len(ids) + 1):
        rest = await hear(subject.engine, replace(request, resume=(DeliveredChoice(0, tuple(ids[:split])),)))
        text = "".join(delta.text for delta in whole.deltas[:split]) + rest.text()
        assert re.fullmatch("(red|green|blue) (cat|dog) and [0-9]{3} 🙂", text)
    wrong = (DeliveredChoice(0, (ids[0], ids[0], ids[0])),)
    await expect(InvalidRequestError, hear(subject.engine, replace(request, resume=wrong)))


@_check(Feature.GRAMMAR, Feature.JSON_SCHEMA, Feature.REGEX)
async def what_is_no_form_is_refused(subject: Subject) -> None:
    """Before anything is generated."""
    for kind, source in (
        (ConstraintKind.GRAMMAR, "root ::= ("),
        (ConstraintKind.JSON_SCHEMA, '{"type": "number"'),
        (ConstraintKind.JSON_SCHEMA, '{"type": "numeral"}'),
        (ConstraintKind.REGEX, "("),
    ):
        error = await expect(InvalidRequestError, hear(subject.engine, _formed(subject, kind, source)))
        assert kind.value in error.message
    await assert_idle(subject)


@_check(Feature.DRY, Feature.IGNORE_EOS)
async def dry_breaks_repeats(subject: Subject) -> None:
    """A greedy answer that goes round in circles comes out of them, and says the same again every time."""
    dry = replace(GREEDY, dry=Dry(multiplier=5.0, base=2.0, allowed_length=1, sequence_breakers=("\0never",)))
    plain = await hear_anew(subject, ask(subject, 48))
    first = await hear_anew(subject, ask(subject, 48, dry))
    again = await hear_anew(subject, ask(subject, 48, dry))
    assert first.ids() == again.ids()
    assert _repeated(first.ids()) <= min(_repeated(plain.ids()), 3)


@_check(Feature.XTC, Feature.SEED)
async def xtc_leaves_the_likeliest_out(subject: Subject) -> None:
    """By a chance that follows from the seed."""
    never, always = (
        Sampling(temperature=0.01, seed=5, top_k=0, top_p=1.0, min_p=0.0, xtc=Xtc(probability, 0.02))
        for probability in (0.0, 1.0)
    )
    plain = await hear_anew(subject, ask(subject, 8, never))
    other = await hear_anew(subject, ask(subject, 8, always))
    again = await hear_anew(subject, ask(subject, 8, always))
    assert other.text() == again.text() != plain.text()


def _repeated(ids: list[int]) -> int:
    """The length of the longest stretch that comes twice."""
    longest = 0
    for end in range(len(ids)):
        for other in range(end):
            length = 0
            while length <= other and ids[end - length] == ids[other - length]:
                length += 1
            longest = max(longest, length)
    return longest
