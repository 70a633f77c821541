"""Which texts are read next where nothing is generated: what goes into one batch of vectors or scores.

Pure: the engine's owner thread adds the texts of requests, computes what is planned and tells it so. Texts of different
requests share a batch. Urgent requests come first; equals take turns text by text, so that one with a single text does
not wait for another's thousand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from chorus.core.generation import Priority

_RANK = {Priority.INTERACTIVE: 0, Priority.BATCH: 1, Priority.BACKGROUND: 2}


@dataclass(frozen=True, slots=True)
class TextLimits:
    """What one context can take.

    At most `slots` texts are begun, with `cells` tokens over all of them, and a batch is filled up to `batch_tokens`. A
    text has at most `longest` tokens. `whole`: every text must be read in one batch, even if it alone is more than
    `batch_tokens`; otherwise long ones are read in pieces.
    """

    slots: int
    cells: int
    batch_tokens: int
    longest: int
    whole: bool

    def __post_init__(self) -> None:
        if min(self.slots, self.batch_tokens, self.longest) < 1 or self.cells < self.longest:
            raise ValueError(f"impossible limits: {self}")


@dataclass(slots=True, eq=False)
class Text:
    """One text of `size` tokens, of the request `group`; `computed` of them have been read, in `slot`."""

    size: int
    group: object
    computed: int = 0
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `start + count` of a text."""

    text: Text
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the text is complete with it."""
        return self.start + self.count == self.text.size


@dataclass(slots=True, eq=False)
class _Request:
    rank: int
    waiting: deque[Text]
    left: int  # texts that are not complete
    begun: bool = False


@dataclass(slots=True)
class TextQueue:
    """Keeps what waits and what has begun; see the module's text."""

    limits: TextLimits
    tokens: int = 0  # that are still to be read
    _requests: dict[object, _Request] = field(default_factory=dict)
    _turns: tuple[deque[_Request], ...] = field(default_factory=lambda: tuple(deque() for _ in _RANK))
    _begun: list[Text] = field(default_factory=list)
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._free = list(range(self.limits.slots - 1, -1, -1))

    def __len__(self) -> int:
        """How many requests are not complete."""
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """How many requests have nothing computed and nothing under way."""
        return sum(not request.begun for request in self._requests.values())

    def add(self, group: object, sizes: Sequence[int], priority: Priority) -> list[Text]:
        """Takes the texts of one request, at least one. Raises `ValueError` for a size that no context can hold."""
        if not sizes or not all(1 <= size <= self.limits.longest for size in sizes):
            raise ValueError(f"texts of {list(sizes)} tokens, where 1 to {self.limits.longest} can be read")
        texts = [Text(size, group) for size in sizes]
        request = _Request(_RANK[priority], deque(texts), len(texts))
        self._requests[group] = request
        self._turns[request.rank].append(request)
        self.tokens += sum(sizes)
        return texts

    def plan(self, most: int | None = None) -> tuple[Piece, ...]:
        """The next batch, of at most `most` tokens if given; empty where nothing waits.

        A text that must be read whole and is longer than that comes alone. Texts that have begun go on before others
        of their priority begin; nobody overtakes the next one for being shorter.
        """
        room = self.limits.batch_tokens if most is None else max(1, min(most, self.limits.batch_tokens))
        pieces: list[Piece] = []
        cells = self.limits.cells - sum([text.size for text in self._begun])
        full = False
        for rank, turns in enumerate(self._turns):
            for text in [text for text in self._begun if self._requests[text.group].rank == rank]:
                if not (count := self._count(text, room, first=not pieces)):
                    return tuple(pieces)
                pieces.append(Piece(text, text.computed, count))
                room -= count
            while turns and not full:
                text = turns[0].waiting[0]
                full = not self._free or text.size > cells
                if full:  # those that have begun free both; nobody overtakes, or a long text would wait for ever
                    break
                if not (count := self._count(text, room, first=not pieces)):
                    return tuple(pieces)
                self._begin(turns)
                pieces.append(Piece(text, 0, count))
                room -= count
                cells -= text.size
        return tuple(pieces)

    def computed(self, piece: Piece) -> None:
        """A piece was read. With its last one a text is complete, and its slot is free again."""
        text = piece.text
        text.computed += piece.count
        self.tokens -= piece.count
        if text.computed < text.size:
            return
        self._free_slot(text)
        request = self._requests[text.group]
        request.left -= 1
        if not request.left:
            del self._requests[text.group]

    def leave(self, group: object) -> list[int]:
        """A request went away, or failed; returns the slots to clear. Nothing where it was complete or unknown."""
        request = self._requests.pop(group, None)
        if request is None:
            return []
        if request.waiting:
            self._turns[request.rank].remove(request)
            self.tokens -= sum(text.size for text in request.waiting)
        texts = [text for text in self._begun if text.group is group]
        self.tokens -= sum(text.size - text.computed for text in texts)
        return [self._free_slot(text) for text in texts]

    def validate(self) -> None:
        """Raises `AssertionError` unless every count agrees with every other; for tests."""
        slots = [text.slot for text in self._begun]
        assert sorted([*slots, *self._free], key=str) == sorted(range(self.limits.slots), key=str)
        assert sum(text.size for text in self._begun) <= self.limits.cells
        waiting = [text for turns in self._turns for request in turns for text in request.waiting]
        assert self.tokens == sum(text.size - text.computed for text in (*waiting, *self._begun))
        assert all(text.slot is None and not text.computed for text in waiting)
        for group, request in self._requests.items():
            assert request.left == sum(text.group is group for text in (*waiting, *self._begun)) > 0
            assert (request in self._turns[request.rank]) == bool(request.waiting)
        assert all(request in self._requests.values() for turns in self._turns for request in turns)

    def _count(self, text: Text, room: int, *, first: bool) -> int:
        left = text.size - text.computed
        if self.limits.whole:
            return left if left <= room or first else 0
        return min(left, room)

    def _begin(self, turns: deque[_Request]) -> None:
        """The next text gets a slot, and its request goes behind those of the same priority."""
        request = turns.popleft()
        text = request.waiting.popleft()
        text.slot = self._free.pop()
        request.begun = True
        self._begun.append(text)
        if request.waiting:
            turns.append(request)

    def _free_slot(self, text: Text) -> int:
        slot = text.slot
        assert slot is not None
        text.slot = None
        self._begun.remove(text)
        self._free.append(slot)
        return slot
