"""From texts to the token ids that are embedded or scored: with the model's special tokens around them, cut if asked.

Everything here may take long and is called in a thread for texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chorus.core.errors import InvalidRequestError, PromptTooLongError
from chorus.engine.llama.binding import Model

TRUNCATIONS = (None, "start", "end")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model reads of one text, and whether that is less than all of it."""

    token_ids: list[int]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class TextReader:
    """Reads for one model, called `name`, that takes at most `longest` tokens at once. Thread-safe while it is open."""

    model: Model
    name: str
    longest: int

    def texts(self, items: Sequence[str | tuple[int, ...]], truncate: str | None) -> list[Reading]:
        """Texts to embed. Raises `InvalidRequestError`, and `PromptTooLongError` unless `truncate` says what to cut."""
        return [self._text(item, truncate) for item in items]

    def pairs(self, query: str, documents: Sequence[str], truncate: str | None) -> list[Reading]:
        """A query beside each document. Only documents are cut. Raises as `texts`."""
        opening, closing = self._frame(query)
        return [self._pair(opening, document, closing, truncate) for document in documents]

    def _text(self, item: str | tuple[int, ...], truncate: str | None) -> Reading:
        if isinstance(item, str):
            ids = self._tokens("inputs", item, add_special=True)
        else:
            self._check_vocabulary(item)
            ids = list(item)
        if not ids:
            raise InvalidRequestError("inputs", "holds a text without tokens")
        if len(ids) <= self.longest:
            return Reading(ids)
        if truncate is None:
            raise PromptTooLongError(len(ids), self.longest, model=self.name)
        plain = self._tokens("inputs", item, add_special=False) if isinstance(item, str) else ids
        # the model's own tokens at both ends stay, as it was trained with them
        before = 1 if ids[: len(plain)] != plain else 0
        return self._cut(ids[:before], plain, ids[before + len(plain) :], truncate)

    def _pair(self, opening: list[int], document: str, closing: list[int], truncate: str | None) -> Reading:
        ids = self._tokens("documents", document, add_special=False)
        size = len(opening) + len(ids) + len(closing)
        if size <= self.longest:
            return Reading([*opening, *ids, *closing])
        if truncate is None or len(opening) + len(closing) >= self.longest:  # no document has room beside this query
            raise PromptTooLongError(size, self.longest, model=self.name)
        return self._cut(opening, ids, closing, truncate)

    def _cut(self, first: list[int], ids: list[int], last: list[int], truncate: str) -> Reading:
        room = max(self.longest - len(first) - len(last), 0)
        kept = ids[len(ids) - room :] if truncate == "start" else ids[:room]
        return Reading([*first, *kept, *last], truncated=True)

    def _frame(self, query: str) -> tuple[list[int], list[int]]:
        """What comes before and after a document.

        Cross-encoders are trained on two texts that are each closed by the token which closes one text, some with a
        separator more between them; that is what llama.cpp's server gives them, too.
        """
        template = self.model.chat_template("rerank")
        if template is not None:
            return self._templated(template, query)
        opening, closing = self._specials()
        separator = [self.model.sep] if self.model.adds_sep and closing[-1:] != [self.model.sep] else []
        return [*opening, *self._tokens("query", query, add_special=False), *closing, *separator], closing

    def _templated(self, template: str, query: str) -> tuple[list[int], list[int]]:
        """By a template of the model's own, which says where its `{query}` and `{document}` go, once each."""
        head, marker, tail = template.partition("{document}")
        if not marker or "{query}" in tail or "{document}" in tail:
            raise InvalidRequestError("model", "has a template for reranking in which the query follows the document")
        pieces = head.split("{query}")
        asked = self._tokens("query", query, add_special=False)
        ids = self._markup(pieces[0])
        for piece in pieces[1:]:
            ids += asked + self._markup(piece)
        return ids, self._markup(tail)

    def _specials(self) -> tuple[list[int], list[int]]:
        """What the model puts before and after one text."""
        plain = self.model.tokenize("a", add_special=False, parse_special=False)
        ids = self.model.tokenize("a", add_special=True, parse_special=False)
        before = 1 if ids[: len(plain)] != plain else 0
        return ids[:before], ids[before + len(plain) :]

    def _markup(self, text: str) -> list[int]:
        return self.model.tokenize(text, add_special=False, parse_special=True)

    def _tokens(self, field: str, text: str, *, add_special: bool) -> list[int]:
        try:
            return self.model.tokenize(text, add_special=add_special, parse_special=False)
        except UnicodeEncodeError as error:
            raise InvalidRequestError(field, "holds half a surrogate pair, which is no Unicode text") from error

    def _check_vocabulary(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.model.vocabulary_size:
                raise InvalidRequestError("inputs", f"{token_id} is not in the vocabulary of {self.name}")
