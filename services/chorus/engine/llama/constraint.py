"""The form that an answer must have: which tokens a grammar, a JSON Schema or a regular expression allows next.

llguidance does the work, in Rust and without the GIL. Nothing that it is given may make it slow or end the process:
sources are bounded here, its own limits bound the rest, and forced text, which it would follow to any length, is off.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from chorus.core.errors import EngineError, InvalidRequestError, UnsupportedFeatureError
from chorus.core.generation import Constraint, ConstraintKind, DeliveredChoice, GenerationRequest
from chorus.engine.llama.binding import Model
from chorus.engine.llama.gbnf import to_lark
from chorus.engine.llama.ranking import Mask
from chorus.engine.llama.schema import check_schema

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

LONGEST_SOURCE = 65_536  # characters
# Ways of reading the text so far, all of which each mask follows: with as many a mask takes some 20 ms, all streams of
# the model waiting for it, and the time grows with their square. JSON's brackets leave few ways to each place of a
# document, but a schema's properties and alternatives count as ways, and large schemas have thousands.
_MOST_ITEMS = {ConstraintKind.GRAMMAR: 2_000, ConstraintKind.JSON_SCHEMA: 20_000, ConstraintKind.REGEX: 2_000}
# Never forced: else a{1000000} would be written out, and tokens be asked of a vocabulary that may be gone.
_HEADER = '%llguidance {"no_forcing": true}\n'
# As much as llama.cpp's own grammars allow between the parts of a document; small models would never stop otherwise.
_JSON_OPTIONS = {"whitespace_pattern": r"(\x20|\x0A{1,2}[\x20\x09]{0,20})"}
# What following one request's form may cost, in seconds of a processor: masks of ordinary forms, with thousands of keys
# too, take a millisecond, and no limit of llguidance bounds those of many alternatives that begin alike.
_CHEAP_S = 0.02  # a mask that takes no longer is free
_LONGEST_S = 0.5  # for all beyond that of one answer, every stream of the model waiting
_LONGEST_FIRST_MASK_S = 0.25
_LONGEST_REPLAY_S = 2.0
_REPLAYED_AT_ONCE = 16  # tokens
_SUSPECTED_STEPS = 16
_LIMITS = ("Too many items", "Current row has", "fuel", "too many states")  # words of llguidance about them
_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")


def is_available() -> bool:
    """Whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


class Cost:
    """What following one request's form has cost beyond what is free, in seconds of a processor."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """A step of it took so long."""
        if seconds > _CHEAP_S:
            self.seconds += seconds - _CHEAP_S


class Matcher:
    """How far the answer of one choice has come in its form. Used by one thread at a time."""

    def __init__(self, inner: LLMatcher, field: str, cost: Cost) -> None:
        """`field` of the request has the form; the choices of one request share their `cost`."""
        self.inner = inner
        self.cost = cost
        self._field = field

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self.inner.is_accepting())

    @property
    def must_stop(self) -> bool:
        """Whether nothing but an end-of-text token may follow."""
        return bool(self.inner.is_stopped())

    def check(self) -> None:
        """Raises if the form can't be followed any further, when masks allow only the end of text.

        `InvalidRequestError` where it costs too much, which it would elsewhere too; else `EngineError`.
        """
        if self.cost.seconds > _LONGEST_S:
            raise _too_slow(self._field)
        if self.inner.is_error():
            problem = self.inner.get_error()
            if any(limit in problem for limit in _LIMITS):
                raise InvalidRequestError(self._field, _reason(problem))
            raise EngineError(
                f"the form that was asked for cannot be followed any further ({_reason(problem)}); "
                "make the grammar or schema simpler"
            )

    def accept(self, token_id: int) -> None:
        """Takes the next token. Raises `EngineError` for one that the mask did not allow, and as `check` does."""
        began = time.thread_time()
        taken = self.inner.consume_token(token_id)
        self.cost.add(time.thread_time() - began)
        if not taken:
            if any(limit in self.inner.get_error() for limit in _LIMITS):
                self.check()
            raise EngineError(f"token {token_id} does not fit the form that was asked for")

    def replay(self, token_ids: Sequence[int]) -> int:
        """Takes tokens for as long as they fit; returns how many. Raises `InvalidRequestError` as `check` does."""
        taken, spent = 0, 0.0
        while taken < len(token_ids):
            began = time.thread_time()
            count = int(self.inner.try_consume_tokens(list(token_ids[taken : taken + _REPLAYED_AT_ONCE])))
            spent += time.thread_time() - began
            taken += count
            if spent > _LONGEST_REPLAY_S:
                raise _too_slow(self._field)
            if count < _REPLAYED_AT_ONCE:
                break
        return taken

    def fitting(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens could follow, one after the other; nothing changes."""
        return int(self.inner.validate_tokens(list(token_ids)))

    def take_back(self, count: int) -> None:
        """Undoes the last `count` accepted tokens."""
        if count and not self.inner.rollback(count):
            raise EngineError("the form that was asked for cannot be followed back")


class Masks:
    """Room for the masks of a batch, which are computed on several threads at once. For one owner thread."""

    def __init__(self, vocabulary_size: int, *, threads: int) -> None:
        self._width = (vocabulary_size + 31) // 32
        self._threads = max(threads, 1)
        self._rows = np.zeros((0, self._width), dtype=np.uint32)
        self._row: Mask = np.zeros(self._width, dtype=np.uint32)
        self._executor: LLExecutor | None = None
        self._suspected = 0  # for so many steps yet somebody's masks are held to be slow

    def compute(self, matchers: Sequence[Matcher]) -> list[Mask]:
        """The tokens that each matcher allows next, in order. Valid until the next call; see `Matcher.check`."""
        if not matchers:
            return []
        if len(matchers) == 1:
            return [self.one(matchers[0])]
        if len(matchers) > len(self._rows):
            self._rows = np.zeros((len(matchers), self._width), dtype=np.uint32)
        rows = self._rows
        if self._suspected:  # one by one, to know whose takes long
            self._suspected -= 1
            for matcher, row in zip(matchers, rows, strict=False):
                self._compute(matcher, row)
            return list(rows[: len(matchers)])
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._threads)
        places = [(matcher.inner, place) for place, matcher in enumerate(matchers)]
        began = time.monotonic()
        self._executor.unsafe_compute_mask_ptr(places, rows.ctypes.data, self._width * 4, len(rows))
        if time.monotonic() - began > _CHEAP_S:
            self._suspected = _SUSPECTED_STEPS
        return list(rows[: len(matchers)])

    def one(self, matcher: Matcher) -> Mask:
        """The tokens that one matcher allows next. Valid until the next call."""
        self._compute(matcher, self._row)
        return self._row

    @staticmethod
    def _compute(matcher: Matcher, row: Mask) -> None:
        began = time.thread_time()
        matcher.inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        matcher.cost.add(time.thread_time() - began)


class FormCompiler:
    """Compiles constraints for one model's vocabulary. Takes up to a second when first used, and up to a few for the
    largest sources, so never on the event loop."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tokenizer: LLTokenizer | None = None

    def matchers(
        self,
        request: GenerationRequest,
        end_tokens: frozenset[int],
    ) -> tuple[Matcher, ...]:
        """A matcher for each choice of a request that has a constraint, with what was delivered replayed.

        Raises `InvalidRequestError` for a source that is no constraint of its kind, too large or not to be fulfilled,
        and for delivered tokens that do not fit it.
        """
        from llguidance import LLMatcher, LLParserLimits

        constraint = request.constraint
        assert constraint is not None
        if not end_tokens:
            raise UnsupportedFeatureError(
                "this model has no end-of-text token, with which a constrained answer ends",
                metadata={"feature": constraint.kind.value},
            )
        field = constraint.kind.value
        with _refusing(field):
            lark = _HEADER + _lark(constraint)
            tokenizer = self._vocabulary(end_tokens)
            limits = LLParserLimits(step_max_items=_MOST_ITEMS[constraint.kind], verbose_errors=False)
            inner = LLMatcher(tokenizer, lark, log_level=0, limits=limits)
            problem = inner.get_error()
            masks = Masks(tokenizer.vocab_size, threads=1)
            # The first time what stays is prepared as well; the second time it takes what each will.
            probes = [Matcher(inner.deep_copy(), field, Cost()) for _ in range(0 if problem else 2)]
            for probe in probes:
                masks.one(probe)
                problem = probe.inner.get_error()
                if problem or probe.cost.seconds <= _LONGEST_FIRST_MASK_S:
                    break
        if problem:
            raise InvalidRequestError(field, _reason(problem))
        if all(probe.cost.seconds > _LONGEST_FIRST_MASK_S for probe in probes):
            raise _too_slow(field)
        cost = Cost()
        inners = [inner, *(inner.deep_copy() for _ in range(request.choice_count - 1))]
        matchers = tuple(Matcher(one, field, cost) for one in inners)
        for delivered in request.resume:
            _replay(matchers[delivered.choice], delivered, end_tokens)
        return matchers

    def _vocabulary(self, end_tokens: frozenset[int]) -> LLTokenizer:
        if self._tokenizer is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            wrapper = TokenizerWrapper(_Vocabulary(self._model, end_tokens))
            self._tokenizer = LLTokenizer(wrapper, eos_token=sorted(end_tokens))
        return self._tokenizer


class _Vocabulary:
    """A vocabulary as llguidance's `TokenizerWrapper` wants it."""

    def __init__(self, model: Model, end_tokens: frozenset[int]) -> None:
        self._model = model
        self.eos_token_id = min(end_tokens)
        self.bos_token_id = model.bos if model.bos >= 0 else None
        # Tokens that are no text of an answer can never be part of one, so they have none here either.
        self.tokens = model.pieces()
        self.special_token_ids: list[int] = []

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._model.tokenize(plain, add_special=False, parse_special=False)


def _replay(matcher: Matcher, delivered: DeliveredChoice, end_tokens: frozenset[int]) -> None:
    ids = list(delivered.token_ids)
    ended = next((place for place, token_id in enumerate(ids) if token_id in end_tokens), len(ids))
    taken = matcher.replay(ids[:ended])
    if taken < ended:
        raise InvalidRequestError("resume", f"token {taken} of choice {delivered.choice} does not fit the constraint")


def _lark(constraint: Constraint) -> str:
    """The constraint in llguidance's own syntax."""
    from llguidance import LLMatcher

    source = constraint.source
    if len(source) > LONGEST_SOURCE:
        raise InvalidRequestError(
            constraint.kind.value, f"has {len(source)} characters; at most {LONGEST_SOURCE} are taken"
        )
    if constraint.kind is ConstraintKind.GRAMMAR:
        return to_lark(source)
    if constraint.kind is ConstraintKind.REGEX:
        grammar: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(source))
        return str(grammar["grammars"][0]["lark_grammar"])
    schema = json.loads(source)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON Schema is an object, or true or false")
    check_schema(schema)
    if isinstance(schema, dict):
        own = schema.get("x-guidance")
        schema["x-guidance"] = {**_JSON_OPTIONS, **(own if isinstance(own, dict) else {})}
    return "start: %json " + json.dumps(schema)


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """Whatever goes wrong in compiling is the source's fault, and says so."""
    try:
        yield
    except (ValueError, RecursionError, OverflowError) as error:
        raise InvalidRequestError(field, _reason(str(error))) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what becomes of a panic in Rust; it has no other name
            raise
        raise InvalidRequestError(field, "cannot be compiled") from error


def _too_slow(field: str) -> InvalidRequestError:
    return InvalidRequestError(
        field, "takes too long to follow; let fewer rules or alternatives begin alike, or make it smaller"
    )


def _reason(problem: str) -> str:
    """llguidance's message without the source and the state that it quotes."""
    if "NoExtension" in problem:
        return "no text can have this form"
    if "Too many items" in problem or "Current row has" in problem:
        return (
            "there are too many ways to read one text by it; let fewer rules or alternatives begin alike, and write "
            "characters that repeat as [...]+ rather than as a rule that refers to itself"
        )
    lines = [line.strip() for line in problem.splitlines() if line.strip()] or ["unknown"]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return told or _PLACE.sub("", lines[0])[:300]
