"""Masks and matchers with the real vocabulary of SmolLM2, without its weights; and nothing that ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from chorus.core.errors import EngineError, InvalidRequestError
from chorus.core.generation import Constraint, ConstraintKind, DeliveredChoice, GenerationRequest, TextPrompt
from chorus.engine.llama import constraint
from chorus.engine.llama.binding import Model
from chorus.engine.llama.constraint import FormCompiler, Masks, Matcher
from chorus.engine.llama.gbnf import to_lark
from tests.engine.conftest import smollm2_path

PATTERNS = [f'"pattern": ".*{letter}.*"' for letter in "abcdefghijklmnopqrstuvwx"]
GRAMMAR, SCHEMA, REGEX = ConstraintKind.GRAMMAR, ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX

JSON_GRAMMAR = r"""
root   ::= object   # a comment
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


class Vocabulary:
    """A model's vocabulary and a compiler for it."""

    def __init__(self) -> None:
        self.model = Model(smollm2_path(), vocabulary_only=True)
        self.forms = FormCompiler(self.model)
        self.end_tokens = self.model.end_tokens()
        self.masks = Masks(self.model.vocabulary_size, threads=2)

    def matchers(self, kind: ConstraintKind, source: str, **changes: object) -> tuple[Matcher, ...]:
        request = GenerationRequest("", TextPrompt("x"), constraint=Constraint(kind, source), **changes)  # type: ignore[arg-type]
        return self.forms.matchers(request, self.end_tokens)

    def matcher(self, kind: ConstraintKind, source: str) -> Matcher:
        return self.matchers(kind, source)[0]

    def ids(self, text: str) -> list[int]:
        return self.model.tokenize(text, add_special=False, parse_special=False)

    def allowed(self, matcher: Matcher) -> set[int]:
        (mask,) = self.masks.compute([matcher])
        return set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())

    def takes(self, matcher: Matcher, text: str) -> bool:
        """Whether the form has this text: every token is in the mask, and the text may end after the last one."""
        ids = self.ids(text)
        count = 0
        for token_id in ids:
            if token_id not in self.allowed(matcher):
                break
            matcher.accept(token_id)
            count += 1
        fits = count == len(ids) and matcher.is_complete
        matcher.take_back(count)
        return fits


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Vocabulary]:
    found = Vocabulary()
    yield found
    found.model.close()


@pytest.mark.parametrize(
    ("kind", "source", "texts", "others"),
    [
        (REGEX, "[a-z]+", ["a", "abc"], ["", "aB", "a b"]),
        (REGEX, r"^\d{3}$", ["123"], ["12", "1234"]),
        (REGEX, 'a/b\nstart: "x"', ['a/b\nstart: "x"'], ["a/b"]),
        (REGEX, ".*", ["é 🙂", ""], ["a\nb"]),
        (SCHEMA, "true", ['[1, {"x": null}]', "3"], ["x", "[1"]),
        (SCHEMA, '{"type": "number", "multipleOf": 0.05}', ["1.25", "1"], ["1.26"]),
        (SCHEMA, '{"enum": ["é", 1]}', ['"é"', "1"], ['"e"', "2"]),
        (SCHEMA, '{"type": "object"}', ['{"a": 1}', '{\n  "a": 1\n}'], ['{     "a": 1}', "[]"]),
        (SCHEMA, '{"x-guidance": {"whitespace_flexible": false, "whitespace_pattern": null}, "type": "array"}',
         ["[1,2]"], ["[1, 2]"]),
        (GRAMMAR, 'root ::= "yes" | "no"', ["yes", "no"], ["", "yesno"]),
        (GRAMMAR, 'root ::= [a-z]+ "b"', ["ab", "abb"], ["b", "ba"]),
        (GRAMMAR, 'root ::= ("if" | [a-z]+) " x"', ["if x", "iff x", "i x"], ["if", "9 x"]),
        (GRAMMAR, r'root ::= "\u00e9\n\"/" [^"\]/\-] . [\x41-C]', ['é\n"/a\nB'], ['é\n"/-\nB', 'é\n"/a\nD']),
        (GRAMMAR, 'root ::= item ("," ws item)* # end\nitem ::= [0-9]{1,3} |\n  "x"{2}\nws ::= " "?\n\n',
         ["12, 345,xx"], ["x", "1234", "1,"]),
        (GRAMMAR, "root ::= (\n [ab] |\n [^\\x00-\\x7f]\n)+", ["abé"], ["abc", ""]),
        (GRAMMAR, 'root ::= "(" root ")" | [a-z]+ |', ["((abc))", "()", ""], ["((ab)", ")"]),
        (GRAMMAR, 'root ::= "" | x\nx ::= ()', [""], ["a"]),
        (GRAMMAR, 'root ::= root "a" | "b"', ["b", "baa"], ["", "a"]),
        (GRAMMAR, JSON_GRAMMAR, ['{"Rob\\"ert": -1.5e3, "x": [true, {}]}', "{}"], ["[]", '{"a":  1}', '{"a": 01}']),
    ],
)  # fmt: skip
def test_a_form_has_its_texts_and_no_others(
    vocabulary: Vocabulary, kind: ConstraintKind, source: str, texts: list[str], others: list[str]
) -> None:
    matcher = vocabulary.matcher(kind, source)
    assert [text for text in texts if not vocabulary.takes(matcher, text)] == []
    assert [text for text in others if vocabulary.takes(matcher, text)] == []


def test_a_complete_form_lets_nothing_but_the_end_follow(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.matcher(SCHEMA, '{"const": true}')
    assert not matcher.is_complete
    for token_id in vocabulary.ids("true"):
        matcher.accept(token_id)
    assert (matcher.is_complete, matcher.must_stop) == (True, True)
    assert vocabulary.allowed(matcher) == vocabulary.end_tokens
    matcher.check()
    with pytest.raises(EngineError, match="does not fit"):
        matcher.accept(vocabulary.ids("x")[0])


def test_guesses_are_checked_and_taken_back(vocabulary: Vocabulary) -> None:
    """What a stream that guesses ahead needs."""
    matcher = vocabulary.matcher(SCHEMA, '{"type": "array", "items": {"type": "integer"}}')
    before = vocabulary.allowed(matcher)
    good, bad = vocabulary.ids("[1, 2"), vocabulary.ids("x")
    assert matcher.fitting([*good, *bad, *good]) == len(good)
    assert vocabulary.allowed(matcher) == before
    for token_id in good:
        matcher.accept(token_id)
    matcher.take_back(len(good))
    assert vocabulary.allowed(matcher) == before


def test_masks_of_many_are_those_of_each(vocabulary: Vocabulary) -> None:
    matchers = [vocabulary.matcher(REGEX, f"[a-{chr(98 + number)}]+[0-9]") for number in range(9)]
    alone = [vocabulary.masks.one(matcher).copy() for matcher in matchers]
    together = vocabulary.masks.compute(matchers)
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    assert vocabulary.masks.compute([]) == []


def test_choices_go_their_own_ways_from_what_was_delivered(vocabulary: Vocabulary) -> None:
    ids = vocabulary.ids("ab")
    ended = (*vocabulary.ids("abc"), min(vocabulary.end_tokens))
    resume = (DeliveredChoice(0, tuple(ids)), DeliveredChoice(2, ended))
    matchers = vocabulary.matchers(REGEX, "abc", choice_count=3, resume=resume)
    assert [matcher.is_complete for matcher in matchers] == [False, False, True]
    assert vocabulary.ids("c")[0] in vocabulary.allowed(matchers[0])
    assert vocabulary.ids("a")[0] in vocabulary.allowed(matchers[1])
    wrong = DeliveredChoice(0, (*vocabulary.ids("a"), *vocabulary.ids("x")))
    with pytest.raises(InvalidRequestError, match="token 1 of choice 0 does not fit"):
        vocabulary.matchers(REGEX, "abc", resume=(wrong,))


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        (GRAMMAR, "", "no rule named root"),
        (GRAMMAR, "root ::= y", "uses y, which is not defined"),
        (GRAMMAR, "root ::= (", r"line 1: a \) is missing"),
        (GRAMMAR, '\nroot ::= "a', "line 2"),
        (GRAMMAR, 'root = "a"', "not understood"),
        (GRAMMAR, 'root ::= "a" )', "end of the rule is expected"),
        (GRAMMAR, "root ::= [z-a]", "no range of characters"),
        (GRAMMAR, "root ::= []", "holds no character"),
        (GRAMMAR, r'root ::= "\q"', "no escape"),
        (GRAMMAR, r'root ::= "\ud800"', "no character"),
        (GRAMMAR, 'root ::= "a"{3,2}', "no range of repeats"),
        (GRAMMAR, "root ::= root", "no text can have this form"),
        (GRAMMAR, "root ::= " + "(" * 100 + '"a"' + ")" * 100, "nested more than 64 deep"),
        (GRAMMAR, "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(40)) + '\nr40 ::= "a"\nroot ::= r0',
         "too large"),
        (SCHEMA, "{", "double quotes"),
        (SCHEMA, "3", "is an object, or true or false"),
        (SCHEMA, "false", "Unsatisfiable"),
        (SCHEMA, '{"$ref": "#"}', "no text can have this form"),
        (SCHEMA, '{"not": {}}', "Unimplemented keys"),
        (SCHEMA, '{"$ref": "https://example.org/x"}', "does not fetch"),
        (SCHEMA, '{"type": "string", "pattern": "(?=a)"}', "look-around"),
        (SCHEMA, '{"type": "string", "format": "sort code"}', "Unknown format"),
        (SCHEMA, '{"items":' * 70 + "{}" + "}" * 70, "nested more than 64 deep"),
        (SCHEMA, "[" * 60_000, "recursion|JSON Schema"),
        (SCHEMA, '{"multipleOf": 999983}', "multipleOf"),
        (SCHEMA, '{"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}', "multipleOf"),
        (SCHEMA, '{"multipleOf": 1e-300}', "multipleOf"),
        (SCHEMA, '{"properties": {' + ",".join(f'"p{n}": {{}}' for n in range(3001)) + "}}", "has 3002 keys"),
        (SCHEMA, '{"allOf": [' + ",".join(f'{{"type": "string", {one}}}' for one in PATTERNS) + "]}",
         "match up to 24 patterns and formats at once"),
        (SCHEMA, '{"allOf": [' + ",".join(f'{{"properties": {{"a": {{{one}}}}}}}' for one in PATTERNS[:9]) + "]}",
         "match up to 9 patterns"),
        (SCHEMA, '{"$ref": "#/$defs/d0", "$defs": {"d24": {"type": "string"},' + ",".join(
            f'"d{n}": {{"$ref": "#/$defs/d{n + 1}", {one}}}' for n, one in enumerate(PATTERNS)) + "}}", "up to 24"),
        (SCHEMA, '{"allOf": [{"$ref": "#b"}, {"$ref": "#b"}], "$defs": {"b": {"$anchor": "b", "allOf": ['
         + ",".join(f"{{{one}}}" for one in PATTERNS[:5]) + "]}}}", "up to 10 patterns"),
        (GRAMMAR, 'root ::= s\ns ::= [ -~] | s s | s s s', "too many ways to read one text"),
        (REGEX, "(", "unclosed group"),
        (REGEX, r"\bfoo", "lookarounds"),
        (REGEX, "a" * 70_000, "has 70000 characters"),
        (REGEX, "\ud800", "surrogates"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_with_the_reason(
    vocabulary: Vocabulary, kind: ConstraintKind, source: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        vocabulary.matcher(kind, source)
    assert kind.value in caught.value.message
    assert len(caught.value.message) < 500
    assert "%llguidance" not in caught.value.message


def test_a_mask_that_would_hold_up_every_stream_ends_its_request(vocabulary: Vocabulary) -> None:
    """Each took half a second, in the owner thread."""
    matcher = vocabulary.matcher(GRAMMAR, 'root ::= s\ns ::= "a" | s s | s s s')

    def write() -> None:
        for token_id in vocabulary.ids("a" * 400):
            vocabulary.masks.one(matcher)
            matcher.check()
            matcher.accept(token_id)

    with pytest.raises(InvalidRequestError, match=r"grammar: .*too many ways to read one text by it"):
        write()


def lists(count: int) -> list[dict[str, Any]]:
    """So many alternatives, each a list of any of them, that all begin alike."""
    return [{"type": "array", "items": {"$ref": "#/$defs/list"}, "minItems": least} for least in range(count)]


@pytest.mark.parametrize("together", [1, 2])
def test_masks_that_hold_up_every_stream_end_their_request_however_few_ways_it_takes(
    vocabulary: Vocabulary, together: int
) -> None:
    """Each takes a tenth of a second, and no limit of llguidance is met; also in the company of others."""
    schema = {"items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/list"}]}, "type": "array"}
    matcher = vocabulary.matcher(SCHEMA, json.dumps({**schema, "$defs": {"list": {"anyOf": lists(200)}}}))
    others = [vocabulary.matcher(REGEX, "[ab]*") for _ in range(together - 1)]

    def write() -> None:
        for token_id in vocabulary.ids('["' + '", "'.join(["a"] * 60)):
            vocabulary.masks.compute([matcher, *others])
            matcher.check()
            matcher.accept(token_id)

    with pytest.raises(InvalidRequestError, match="json_schema: takes too long to follow"):
        write()
    for other in others:
        other.check()


def test_what_takes_too_long_from_the_beginning_is_refused(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint, "_LONGEST_FIRST_MASK_S", 0.005)  # it takes 50 times as long
    with pytest.raises(InvalidRequestError, match="json_schema: takes too long to follow"):
        vocabulary.matcher(SCHEMA, json.dumps({"$ref": "#/$defs/list", "$defs": {"list": {"anyOf": lists(400)}}}))


def test_what_was_delivered_is_not_followed_for_minutes(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint, "_LONGEST_REPLAY_S", 0.2)
    schema = {"type": "array", "items": {"$ref": "#/$defs/list"}, "$defs": {"list": {"anyOf": lists(200)}}}
    ids = tuple(vocabulary.ids("[" + "[[]], " * 300))
    with pytest.raises(InvalidRequestError, match="json_schema: takes too long to follow"):
        vocabulary.matchers(SCHEMA, json.dumps(schema), resume=(DeliveredChoice(0, ids),))


def test_a_step_into_too_many_ways_is_the_fault_of_the_form(vocabulary: Vocabulary) -> None:
    """It was told that the token did not fit, as a failure of the engine, for which others were asked the same."""
    kinds = [
        {"type": "object", "properties": {"a": {"$ref": "#"}, f"k{number}": {}}, "additionalProperties": False}
        for number in range(400)
    ]
    matcher = vocabulary.matcher(SCHEMA, json.dumps({"anyOf": kinds}))
    first = vocabulary.ids('{"a"')[0]
    with pytest.raises(InvalidRequestError, match=r"json_schema: .*too many ways to read one text"):
        matcher.accept(first)


def test_large_schemas_are_followed_in_good_time(vocabulary: Vocabulary) -> None:
    """What is allowed is far above what ordinary ones take: a hundredth of it."""

    def text(count: int) -> dict[str, Any]:
        return {f"field_{number}": {"type": "string"} for number in range(count)}

    tools = [
        {"type": "object", "properties": {"name": {"const": f"t{number}"}, "arguments": {"properties": text(6)}}}
        for number in range(120)
    ]
    for schema in (
        {"type": "object", "properties": text(300), "additionalProperties": False},
        {"type": "array", "items": {"anyOf": tools}},
        {"type": "array", "items": {"enum": [f"value {number}" for number in range(2000)]}},
    ):
        matcher = vocabulary.matcher(SCHEMA, json.dumps(schema))
        opening = "[" if schema["type"] == "array" else '{"field_1": "'
        for token_id in vocabulary.ids(opening):
            vocabulary.masks.compute([matcher])
            matcher.accept(token_id)
        vocabulary.masks.compute([matcher])
        matcher.check()


def test_many_patterns_that_never_meet_are_taken(vocabulary: Vocabulary) -> None:
    kinds = ",".join(
        f'{{"type": "object", "properties": {{"id": {{"format": "uuid", "type": "string"}}, "x": {{{one}}}}}}}'
        for one in PATTERNS[:12]
    )
    vocabulary.matcher(SCHEMA, f'{{"$defs": {{"a": {{"anyOf": [{kinds}]}}}}, "items": {{"$ref": "#/$defs/a"}}}}')
    vocabulary.matcher(SCHEMA, f'{{"allOf": [{{"pattern": "^a", "type": "string"}}, {{{PATTERNS[1]}}}]}}')
    own = ",".join(f'"p{n}": {{"type": "string", "format": "date"}}' for n in range(12))
    base = (
        '{"properties": {"children": {"items": {"$ref": "#/$defs/node"}}, "on": {"format": "date", "type": "string"}}}'
    )
    vocabulary.matcher(
        SCHEMA, f'{{"$defs": {{"node": {{"allOf": [{base}, {{"properties": {{{own}}}}}]}}}}, "$ref": "#/$defs/node"}}'
    )


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (REGEX, "a{1000000}"),
        (REGEX, "((a{1000}){1000}){1000}"),
        (GRAMMAR, 'root ::= "a"{1000000}'),
        (SCHEMA, '{"type": "string", "minLength": 1000000}'),
        (SCHEMA, '{"type": "array", "minItems": 100000, "items": {"type": "null"}}'),
    ],
)
def test_forced_text_is_not_written_out(vocabulary: Vocabulary, kind: ConstraintKind, source: str) -> None:
    """It took llguidance up to 9 seconds a token."""
    matcher = vocabulary.matcher(kind, source)
    for _ in range(20):
        (token_id, *_) = sorted(vocabulary.allowed(matcher))
        matcher.accept(token_id)
        matcher.check()


def test_rules_without_recursion_become_one_expression() -> None:
    assert to_lark('root ::= a "-"? b{2}\na ::= [x-z.]\nb ::= "/"') == (
        "start: /(?:(?:[x-z\\x{2e}])(?:\\x{2d})?(?:(?:\\x{2f})){2})/\n"
    )


_FUZZ = """
import random, sys
import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st
from chorus.core.errors import ChorusError
from chorus.core.generation import ConstraintKind
from tests.engine.test_constraint import Vocabulary

vocabulary = Vocabulary()
compiled = steps = 0

def follow(kind, source):
    global compiled, steps
    try:
        matcher = vocabulary.matcher(kind, source)
        compiled += 1
        rng = random.Random(1)
        for _ in range(6):
            allowed = vocabulary.allowed(matcher)
            matcher.check()
            matcher.accept(rng.choice(sorted(allowed)))
            steps += 1
            if matcher.must_stop:
                break
    except ChorusError:
        pass

atoms = st.sampled_from(["a", "[a-z]", "[^x]", ".", "\\\\d", "\\\\w", "(?i)b", "é", "^", "$", "\\\\", "(", "[", "{2",
    "/", "\\n", "\\\\p{L}", "\\\\x00", "\\ud800", "[]", "(?=a)", "\\\\1"])
regexes = st.recursive(atoms, lambda inner: st.one_of(
    st.lists(inner, min_size=1, max_size=4).map("".join),
    st.builds("({}|{})".format, inner, inner),
    st.builds("({}){}".format, inner, st.sampled_from(["*", "+", "?", "{3}", "{0,400}", "{9999,}", "{1,1000000}"])),
), max_leaves=12)
parts = st.sampled_from(['"a"', "[a-z]", ".", "root", "x", "y", '"\\\\n"', "[^\\\\x00]", "|", '""', "<b>", "(", '"'])
rules = st.recursive(parts, lambda inner: st.one_of(
    st.lists(inner, min_size=1, max_size=4).map(" ".join),
    st.builds("({}){}".format, inner, st.sampled_from(["", "*", "+", "?", "{2}", "{0,5000}", "{1000000}", "{2,1}"])),
), max_leaves=10)
grammars = st.builds("root ::= {}\\nx ::= {}\\ny ::= {}".format, rules, rules, rules) | st.text(max_size=40)
numbers = st.sampled_from([0, 1, -1, 3, 0.5, 1e30, 1e-30, 10**30, 4, 10**6])
leaves = st.sampled_from([True, False, None, {}, {"type": "string"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"enum": []},
    {"const": {"a": [1]}}, {"type": []}, {"type": "integer", "multipleOf": 7}, [], "x", {"format": "date"}])
schemas = st.recursive(leaves, lambda inner: st.one_of(
    st.fixed_dictionaries({}, optional={
        "type": st.sampled_from(["object", "array", "string", "integer", "number", ["null", "object"], 3]),
        "properties": st.dictionaries(st.sampled_from(["a", "b", "é", ""]), inner, max_size=3),
        "required": st.lists(st.sampled_from(["a", "b", "c"]), max_size=2), "additionalProperties": inner,
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$", "("]), inner, max_size=2),
        "items": inner, "prefixItems": st.lists(inner, max_size=2), "minItems": numbers, "maxItems": numbers,
        "minimum": numbers, "maximum": numbers, "exclusiveMinimum": numbers, "multipleOf": numbers,
        "minLength": numbers, "maxLength": numbers, "pattern": st.sampled_from(["^a+$", "(", "a{5000}", "(?!a)"]),
        "anyOf": st.lists(inner, max_size=3), "allOf": st.lists(inner, max_size=3),
        "oneOf": st.lists(inner, max_size=2),
        "$defs": st.fixed_dictionaries({"a": inner}), "$ref": st.sampled_from(["#", "#/$defs/a", "#/x", "http://x"]),
        "x-guidance": st.sampled_from([3, {"whitespace_pattern": "("}, {"item_separator": ".*"}, {"lenient": True}]),
    }),
), max_leaves=12)

def fuzz(kind, sources, count):
    @given(sources)
    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    def run(source):
        follow(kind, source)
    run()

import json
fuzz(ConstraintKind.REGEX, regexes | st.text(max_size=30), 80)
fuzz(ConstraintKind.GRAMMAR, grammars, 80)
fuzz(ConstraintKind.JSON_SCHEMA, schemas.map(json.dumps) | st.text(max_size=30), 120)
vocabulary.model.close()
print("survived", compiled, steps)
"""


def test_no_grammar_schema_or_expression_aborts_the_process() -> None:
    result = subprocess.run([sys.executable, "-c", _FUZZ], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    _, compiled, steps = result.stdout.splitlines()[-1].split()
    assert int(compiled) > 60, "most must not be refused"
    assert int(steps) > 100
