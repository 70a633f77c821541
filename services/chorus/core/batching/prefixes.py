"""What is in KV memory, as a radix tree of tokens: who shares which cells, and who has the longest start of a prompt.

A node is a run of tokens whose cells belong to the same slots; a slot's content is the path from the root to its end.
Two slots share a node only where one was copied from the other, never because they happen to hold equal tokens, so the
lengths of all nodes together are exactly the cells in use. (The idea is RadixAttention's: Zheng et al., "SGLang",
arXiv 2312.07104; there a node owns its cells, here the slots of unified KV memory do.)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence


def common_prefix(left: Sequence[int], right: Sequence[int], start: int = 0, offset: int = 0) -> int:
    """How many tokens of `left[start:]` and `right[offset:]` agree from their beginnings on."""
    most = min(len(left) - start, len(right) - offset)
    if most <= 0 or left[start] != right[offset]:
        return 0
    if left[start : start + most] == right[offset : offset + most]:
        return most
    low, high = 1, most  # the first `low` agree, the first `high` do not: slices compare at C's speed
    while high - low > 1:
        middle = (low + high) // 2
        if left[start + low : start + middle] == right[offset + low : offset + middle]:
            low = middle
        else:
            high = middle
    return low


class _Run:
    """Tokens at positions from `start` on, in cells that all of `slots` share."""

    __slots__ = ("children", "parent", "slots", "start", "tokens")

    def __init__(self, parent: _Run | None, start: int, tokens: list[int], slots: set[int]) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.slots = slots
        self.children: dict[int, list[_Run]] = {}

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def attach(self, child: _Run) -> None:
        self.children.setdefault(child.tokens[0], []).append(child)

    def detach(self, child: _Run) -> None:
        siblings = self.children[child.tokens[0]]
        siblings.remove(child)
        if not siblings:
            del self.children[child.tokens[0]]


class PrefixTree:
    """The content of every slot. Lanes (adapters, say) have trees of their own: their cells hold other values."""

    def __init__(self) -> None:
        self.cells = 0
        self._roots: dict[Hashable, _Run] = {}
        self._ends: dict[int, _Run] = {}
        self._lanes: dict[int, Hashable] = {}

    # --- what changes -------------------------------------------------------------------------------------------------

    def add(self, slot: int, lane: Hashable = None) -> None:
        """A slot begins, empty."""
        if slot in self._ends:
            raise ValueError(f"slot {slot} is in use")
        root = self._roots.get(lane)
        if root is None:
            root = self._roots[lane] = _Run(None, 0, [], set())
        root.slots.add(slot)
        self._ends[slot] = root
        self._lanes[slot] = lane

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Tokens were computed at the end of a slot."""
        if not tokens:
            return
        end = self._ends[slot]
        self.cells += len(tokens)
        if len(end.slots) == 1 and end.parent is not None:  # nobody else's, so nothing goes on from it either
            end.tokens.extend(tokens)
            return
        run = _Run(end, end.end, list(tokens), {slot})
        end.attach(run)
        self._ends[slot] = run

    def share(self, source: int, target: int, count: int) -> None:
        """`target`, which is empty, now shares the first `count` tokens of `source`."""
        if self.length(target) or count > self.length(source) or self._lanes[source] != self._lanes[target]:
            raise ValueError(f"slot {target} cannot share {count} tokens of slot {source}")
        run = self._at(source, count)
        self._ends[target] = run
        while run.parent is not None:
            run.slots.add(target)
            run = run.parent

    def truncate(self, slot: int, length: int) -> None:
        """Only the first `length` tokens of a slot are left."""
        if length > self.length(slot):
            raise ValueError(f"slot {slot} has fewer than {length} tokens")
        end = self._ends[slot]
        if end.start < length < end.end and len(end.slots) == 1:
            self.cells -= end.end - length
            del end.tokens[length - end.start :]
            return
        kept = self._at(slot, length)
        run = self._ends[slot]
        self._ends[slot] = kept
        while run is not kept:
            assert run.parent is not None
            above = run.parent
            self._let_go(run, slot)
            run = above

    def remove(self, slot: int) -> None:
        """A slot is forgotten; what it shares stays for the others."""
        run, lane = self._ends.pop(slot), self._lanes.pop(slot)
        while run.parent is not None:
            above = run.parent
            self._let_go(run, slot)
            run = above
        run.slots.discard(slot)
        if not run.slots:
            del self._roots[lane]

    # --- what is asked ------------------------------------------------------------------------------------------------

    def length(self, slot: int) -> int:
        """How many tokens a slot holds."""
        return self._ends[slot].end

    def lane(self, slot: int) -> Hashable:
        """The lane that a slot is in."""
        return self._lanes[slot]

    def tokens(self, slot: int) -> list[int]:
        """The tokens that a slot holds."""
        return [token for run in reversed(list(self._path(slot))) for token in run.tokens]

    def longest(self, tokens: Sequence[int], lane: Hashable = None) -> tuple[int, int | None]:
        """The longest start of `tokens` in memory: its length and a slot that holds it, or (0, None)."""
        run = self._roots.get(lane)
        found: tuple[int, int | None] = (0, None)
        while run is not None and run.end < len(tokens):
            best: _Run | None = None
            for child in run.children.get(tokens[run.end], ()):
                length = child.start + common_prefix(child.tokens, tokens, 0, child.start)
                if length > found[0]:
                    found, best = (length, min(child.slots)), child
            run = best if best is not None and best.end == found[0] else None
        return found

    def own_cells(self, slot: int) -> int:
        """How many cells nobody else shares: what is won by forgetting this slot."""
        return sum(len(run.tokens) for run in self._path(slot) if len(run.slots) == 1)

    def is_covered(self, slot: int) -> bool:
        """Whether other slots hold everything that this one holds."""
        return len(self._ends[slot].slots) > 1 or self._ends[slot].parent is None

    def cells_of(self, slots: set[int]) -> int:
        """How many cells belong to these slots, those shared among them counted once."""
        seen: set[int] = set()
        total = 0
        for slot in slots:
            for run in self._path(slot):
                if id(run) in seen:
                    break
                seen.add(id(run))
                total += len(run.tokens)
        return total

    def validate(self) -> None:
        """Raises `AssertionError` unless the tree is sound; for tests."""
        total = 0
        for lane, root in self._roots.items():
            stack = [root]
            while stack:
                run = stack.pop()
                assert run.slots, "a run that nobody holds"
                assert all(self._lanes[slot] == lane for slot in run.slots)
                below: set[int] = set()
                for first, children in run.children.items():
                    for child in children:
                        assert child.parent is run
                        assert child.tokens[0] == first
                        assert child.start == run.end
                        assert child.slots <= run.slots
                        assert not below & child.slots
                        below |= child.slots
                        stack.append(child)
                assert {slot for slot in run.slots if self._ends[slot] is run} == run.slots - below
                total += len(run.tokens)
        assert total == self.cells

    # --- inside -------------------------------------------------------------------------------------------------------

    def _path(self, slot: int) -> Iterator[_Run]:
        run: _Run | None = self._ends[slot]
        while run is not None:
            yield run
            run = run.parent

    def _at(self, slot: int, length: int) -> _Run:
        """The run of a slot that ends at `length`, parted from what follows where it must be."""
        run = self._ends[slot]
        while run.parent is not None and run.start >= length:
            run = run.parent
        if run.end == length:
            return run
        assert run.parent is not None
        above, cut = run.parent, length - run.start
        upper = _Run(above, run.start, run.tokens[:cut], set(run.slots))
        above.detach(run)
        run.tokens, run.start, run.parent = run.tokens[cut:], length, upper
        above.attach(upper)
        upper.attach(run)
        return upper

    def _let_go(self, run: _Run, slot: int) -> None:
        run.slots.discard(slot)
        if not run.slots:
            assert run.parent is not None
            assert not run.children
            run.parent.detach(run)
            self.cells -= len(run.tokens)
