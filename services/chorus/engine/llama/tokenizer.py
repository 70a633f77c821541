"""Text to the token ids of one model's vocabulary, also where llama.cpp by itself would abort, hang or get it wrong."""

from __future__ import annotations

import ctypes
import itertools
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np

from chorus.core.errors import EngineError
from chorus.engine.llama.special_texts import SpecialTexts

if TYPE_CHECKING:
    from chorus.engine.llama.binding import Model

TOKEN_CONTROL = (1 << 0) | (1 << 3)
"""The attributes of unknown and control tokens: those whose text ordinary text must not become."""

_TOKEN_SPECIAL = TOKEN_CONTROL | 1 << 4  # those that the users of a vocabulary defined, too
_TOKEN_STRIPS_LEFT, _TOKEN_STRIPS_RIGHT = 1 << 7, 1 << 8  # white space
_WORDPIECE = 3
_LARGEST_TEXT = 1 << 28
_SHORT_TEXT = 1024  # bytes; whatever it holds is read in a millisecond or two
_NORMALIZER = "tokenizer.ggml.normalizer"


class Tokenizer:
    """Of one model, which makes it once its vocabulary is read. Thread-safe while the model is open."""

    def __init__(self, model: Model, lib: Any, vocab: int) -> None:
        """`lib` has llama.cpp's functions, `vocab` is the C pointer."""
        self._model = model
        self._lib = lib
        self._strips_accents = _strips_accents(model, lib, vocab)
        self._can_add_special = _can_add_special(model, lib, vocab)
        self._specials: dict[bool, SpecialTexts] = {}  # by whether control tokens are read

    def ids(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """As `Model.tokenize` says."""
        if self._strips_accents and not text.isascii():
            text = _without_accents(text)
        data = text.encode()
        if len(data) > _LARGEST_TEXT:
            raise EngineError(f"a text of {len(data)} bytes is too large to tokenize")
        add_special = add_special and self._can_add_special
        cuts = self.special_texts(parse_special).cuts(data) if len(data) > _SHORT_TEXT else []
        if not cuts:
            return self.of_piece(data, add_special=add_special, parse_special=parse_special)
        around = self.of_piece(b"", add_special=True, parse_special=False) if add_special else []
        before = 1 if self._model.adds_bos or len(around) > 1 else 0
        ids = around[:before]
        for start, end in itertools.pairwise((0, *cuts, len(data))):
            ids += self.of_piece(data[start:end], add_special=False, parse_special=parse_special)
        return ids + around[before:]

    def of_piece(self, data: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """What llama.cpp makes of a text in one piece."""
        room = len(data) + 16
        while True:
            ids = np.empty(room, dtype=np.int32)
            pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            with self._model.in_use() as vocab:
                count = self._lib.llama_tokenize(vocab, data, len(data), pointer, room, add_special, parse_special)
            if count >= 0:
                found: list[int] = ids[:count].tolist()
                return found
            if -count <= room:
                raise EngineError("llama.cpp cannot tokenize this text")
            room = -count

    def special_texts(self, parse_special: bool) -> SpecialTexts:
        """Found when first needed: it takes a tenth of a second for 262,144 tokens."""
        found = self._specials.get(parse_special)
        if found is None:
            texts: list[bytes] = []
            strip_left: list[bytes] = []
            strip = False
            attributes = self._lib.llama_vocab_get_attr
            ignored = 0 if parse_special else TOKEN_CONTROL
            with self._model.in_use() as vocab:
                for token_id in range(self._model.vocabulary_size):
                    attribute = attributes(vocab, token_id)
                    if attribute & _TOKEN_SPECIAL and not attribute & ignored:
                        texts.append(self._lib.llama_vocab_get_text(vocab, token_id) or b"")
                        strip = strip or bool(attribute & (_TOKEN_STRIPS_LEFT | _TOKEN_STRIPS_RIGHT))
                        strip_left += texts[-1:] if attribute & _TOKEN_STRIPS_LEFT else []
            found = self._specials[parse_special] = SpecialTexts(texts, strip=strip, strip_left=strip_left)
        return found


def keep_accents(lib: Any) -> Any:
    """For loading a model: has llama.cpp leave accents to the tokenizer.

    Its own way of stripping them knows one character for each, so that Korean syllables lose all but their first
    letter, and takes spacing vowel signs for accents, which are letters of most scripts of India.
    """
    overrides = (lib.llama_model_kv_override * 2)()  # the second one, empty, ends the list
    overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
    overrides[0].key = f"{_NORMALIZER}.strip_accents".encode()
    overrides[0].value.val_bool = False
    return overrides


def _without_accents(text: str) -> str:
    """As BERT's own tokenizer has it: taken apart by Unicode's form D, without the marks that take no space."""
    apart = unicodedata.normalize("NFD", text)
    return "".join([character for character in apart if unicodedata.category(character) != "Mn"])


def _strips_accents(model: Model, lib: Any, vocab: int) -> bool:
    """Whether accents are no part of a vocabulary: in WordPiece ones without capitals, unless the file says."""
    if lib.llama_vocab_type(vocab) != _WORDPIECE:
        return False
    capitals = "false" if model.metadata("tokenizer.ggml.pre") == "whitespace" else "true"
    uncased = model.metadata(f"{_NORMALIZER}.lowercase") or capitals
    return (model.metadata(f"{_NORMALIZER}.strip_accents") or uncased) == "true"


def _can_add_special(model: Model, lib: Any, vocab: int) -> bool:
    """Whether the special tokens that tokenizing would add all exist; llama.cpp asserts it."""
    if lib.llama_vocab_type(vocab) == _WORDPIECE:
        return model.bos >= 0 and int(lib.llama_vocab_sep(vocab)) >= 0
    bos_missing = bool(lib.llama_vocab_get_add_bos(vocab)) and model.bos < 0
    eos_missing = bool(lib.llama_vocab_get_add_eos(vocab)) and model.eos < 0
    return not bos_missing and not eos_missing
