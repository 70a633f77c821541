"""What the next batch holds: who is admitted to which slot, who goes on by how many tokens, who waits, who is put back.

Pure: the engine's owner thread tells it what came, left and was computed, and carries out its plans. A sequence is one
choice of one request. It is admitted once a slot is free, and the cells of KV memory that it is likely to need. Where
more urgent requests wait, or memory runs out after all, the least urgent sequence is preempted: it waits again, with
its tokens, and what was computed stays as cache until the cells are needed. Sequences that decode always go first;
what is left of the batch reads prompts, by as much as running streams can wait for.

Whatever a sequence begins with that is in memory already is shared, not computed: from finished sequences, from running
ones, and from those that read the same prompt at this very time, for which it waits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum

from chorus.core.batching.batch import LEAST_SHARED, Chunk, Copy, Operation, Plan, Sequence, Trim
from chorus.core.batching.cache import CachedSlots
from chorus.core.batching.prefixes import PrefixTree, common_prefix
from chorus.core.batching.steptime import StepTime
from chorus.core.batching.waiting import WaitingRoom, rank
from chorus.core.errors import ChorusError

_MOST_PATIENCE = 4.0


class Sharing(StrEnum):
    """What of one sequence's memory another can go on from."""

    PREFIX = "prefix"  # any number of its first tokens
    WHOLE = "whole"  # all of it or nothing: where memory is a state, or a window that slides
    NONE = "none"


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one context can take.

    `slots` sequences at a time and `cached` finished ones, `cells` tokens of KV memory over all of them, and in one
    batch `batch_tokens` tokens and `outputs` positions with logits. While somebody decodes, prompts are read by at most
    `prefill_tokens` a batch, and by so many that it takes about `gap_s` seconds. A sequence without a close limit is
    expected to need `allowance` tokens more than it has. At most `waiting` requests wait.
    """

    slots: int
    cells: int
    batch_tokens: int
    prefill_tokens: int
    outputs: int
    waiting: int
    cached: int = 0
    gap_s: float = 0.12
    allowance: int = 512

    def __post_init__(self) -> None:
        if (
            min(self.slots, self.cells, self.batch_tokens, self.prefill_tokens) < 1
            or min(self.waiting, self.cached) < 0
        ):
            raise ValueError(f"impossible limits: {self}")
        if self.outputs < self.slots or self.batch_tokens < self.slots:
            raise ValueError(f"each of {self.slots} slots needs a token and an output in every batch: {self}")


class Scheduler:
    """Keeps slots, queue and memory; see the module's text."""

    def __init__(self, limits: BatchLimits, sharing: Sharing = Sharing.PREFIX, *, pair_share: float = 0.0) -> None:
        """`sharing` is what the model's memory allows; `limits.cached` 0 keeps nothing of those that ended.

        `pair_share`: see `StepTime`.
        """
        self.limits = limits
        self.sharing = sharing
        self.room: WaitingRoom[Sequence] = WaitingRoom(1 << 30)
        self.running: list[Sequence] = []
        self.times = StepTime(pair_share)
        self.tree = PrefixTree()
        self.preemptions = 0
        self._cache = CachedSlots()
        self._arrivals = itertools.count()
        self._free = list(range(limits.slots + limits.cached - 1, -1, -1))
        self._span = 0
        self._operations: list[Operation] = []
        self._lane: Hashable = None
        self._lane_s = 0.0  # how long it has had its turn
        self._stuck = False  # whoever is first cannot be admitted until something changes

    # --- what happens -------------------------------------------------------------------------------------------------

    def submit(self, sequences: list[Sequence]) -> None:
        """Takes the sequences of one request. Raises `OverloadedError`, having taken none, if too many wait already.

        `sequence.slot` is set at once for those that are admitted. Each `most` must be at most `limits.cells`.
        """
        for sequence in sequences:
            if not 1 <= sequence.known <= sequence.most <= self.limits.cells:
                raise ValueError(f"a sequence of {sequence.known} to {sequence.most} tokens cannot run here")
        waited_before = self.waiting_groups() if self.room else []
        for sequence in sequences:
            sequence.arrival = next(self._arrivals)
            self.room.add(sequence, sequence.priority, sequence.arrival)
        self._stuck = False
        self._admit()
        if sequences[0].slot is None and len(waited_before) >= self.limits.waiting:
            refusal: ChorusError = self.room.refusal(len(waited_before))
            for sequence in sequences:
                self.room.remove(sequence)
            raise refusal

    def leave(self, sequence: Sequence, now: float, *, sound: bool = True) -> None:
        """A sequence ended, was cancelled or failed, wherever it stood. Not `sound`: its memory is not used again.

        Others are admitted by the next `plan`.
        """
        self._stuck = False
        if sequence.slot is None:
            self.room.remove(sequence)
            return
        self._stand_down(sequence, sound=sound)
        self.room.rate.finished(now)
        if not self.running and not self.room:
            self.room.rate.idle()

    def computed(self, chunk: Chunk) -> bool:
        """A chunk, but for its draft, is in KV memory now; returns whether its sequence's next token can be drawn."""
        sequence = chunk.sequence
        assert sequence.slot is not None
        self.tree.extend(sequence.slot, sequence.tokens[chunk.start : chunk.start + chunk.count])
        self._span = max(self._span, self.tree.cells)
        sequence.computed += chunk.count
        return sequence.computed == sequence.known

    def checked(self, chunk: Chunk, kept: int) -> None:
        """Of a chunk's draft, the first `kept` tokens came indeed; the memory of the others is given back."""
        sequence = chunk.sequence
        if sequence.slot is None:
            return
        self.tree.extend(sequence.slot, chunk.draft[:kept])
        sequence.computed += kept
        if kept < len(chunk.draft):
            self._operations.append(Trim(sequence.slot, sequence.computed))

    def rewind(self, sequence: Sequence, keep: int) -> None:
        """A sequence's tokens were changed behind the first `keep`: what lies behind is read anew, not scored."""
        assert sequence.slot is not None
        if self.sharing is not Sharing.PREFIX:
            keep = 0
        length = min(keep, sequence.computed)
        self.tree.truncate(sequence.slot, length)
        self._operations.append(Trim(sequence.slot, length))
        sequence.computed = length
        sequence.scores = 0
        sequence.draft.clear()

    def stepped(self, plan: Plan, seconds: float) -> None:
        """A plan has been computed, in so many seconds. Cached sequences that have cost too much by now go."""
        decoded = read = 0
        for chunk in plan.chunks:
            if chunk.count == 1 and chunk.outputs:
                decoded += 1 + len(chunk.draft)
            else:
                read += chunk.count
        self._lane_s += seconds
        self.times.observe(decoded=decoded, read=read, cells=self.span, seconds=seconds)
        if self._cache:
            used = self.used_cells
            # what lies between the cells in use costs as much as they do, and stays for as long as the cache does
            weight = max(self.span - used, 0) / max(self.tree.cells - used, 1)
            self._cache.pay(self.times.pair_s * (decoded + read) * max(weight, 1.0))
            price = self.times.prefill_token_s
            for slot in self._cache.overdue(price) if price is not None else ():
                self._forget(slot)

    def forget_cache(self) -> None:
        """Drops every finished sequence from memory."""
        for slot in self._cache.slots():
            self._forget(slot)

    # --- what follows -------------------------------------------------------------------------------------------------

    def waiting_groups(self) -> list[object]:
        """The requests no choice of which has a slot yet, the next one first."""
        started = {id(sequence.group) for sequence in self.running}
        groups = {id(sequence.group): sequence.group for sequence in self.room.items()}
        return [group for key, group in groups.items() if key not in started]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to decode."""
        return not self.running and not self.room

    @property
    def span(self) -> int:
        """About how many cells every token attends to: those up to the highest one in use, whoever else they belong to.

        Cells are taken from the lowest free one on, so it is the most that were in use since the cache was empty.
        """
        if not self._cache:
            self._span = self.tree.cells
        return self._span

    @property
    def used_cells(self) -> int:
        """The cells that running sequences hold, what they share counted once."""
        return self.tree.cells_of({sequence.slot for sequence in self.running if sequence.slot is not None})

    @property
    def cached_cells(self) -> int:
        """The cells that only finished sequences hold."""
        return self.tree.cells - self.used_cells

    def plan(self) -> Plan:
        """The next batch; empty where nothing runs."""
        self._admit()
        while True:
            self._follow()
            lane = self._next_lane()
            here = [sequence for sequence in self.running if sequence.lane == lane and sequence.leader is None]
            decoding = [sequence for sequence in here if sequence.missing == 1]
            if not self._make_room(len(decoding)):
                self._preempt(self._victim())
                continue
            chunks = self._chunks(decoding, [sequence for sequence in here if sequence.missing > 1])
            if chunks or not self.running:
                if lane != self._lane:
                    self._lane, self._lane_s = lane, 0.0
                return Plan(tuple(chunks), lane)
            self._preempt(self._victim())  # prompts hold all the memory, and none has enough of it

    def operations(self) -> list[Operation]:
        """What is to be done to KV memory, in this order, before anything else is computed; each is told once."""
        operations, self._operations = self._operations, []
        return operations

    def validate(self) -> None:
        """Raises `AssertionError` unless every count agrees with every other; for tests."""
        slots = [sequence.slot for sequence in self.running]
        assert None not in slots
        taken = [slot for slot in slots if slot is not None] + self._cache.slots()
        assert sorted([*taken, *self._free]) == list(range(self.limits.slots + self.limits.cached))
        assert len(self.running) <= self.limits.slots
        assert len(self._cache) <= self.limits.cached + self.limits.slots
        assert all(sequence.slot is None and not sequence.computed for sequence in self.room.items())
        for sequence in self.running:
            assert sequence.slot is not None
            assert sequence.computed <= sequence.known <= sequence.most
            assert self.tree.length(sequence.slot) == sequence.computed
            assert self.tree.tokens(sequence.slot) == sequence.tokens[: sequence.computed]
            assert sequence.leader is None or not sequence.computed
        self.tree.validate()
        assert self.tree.cells <= self.limits.cells

    # --- batches ------------------------------------------------------------------------------------------------------

    def _chunks(self, decoding: list[Sequence], reading: list[Sequence]) -> list[Chunk]:
        limits = self.limits
        cells = limits.cells - self.tree.cells - len(decoding)
        tokens = limits.batch_tokens - len(decoding)
        outputs = limits.outputs - len(decoding)
        chunks = []
        for sequence in decoding:
            draft: tuple[int, ...] = ()
            if sequence.draft:
                most = min(tokens, outputs, cells, sequence.most - sequence.known - 1)
                draft = tuple(sequence.draft[: max(most, 0)])
                tokens, outputs, cells = tokens - len(draft), outputs - len(draft), cells - len(draft)
                sequence.draft = []
            chunks.append(Chunk(sequence, sequence.computed, 1, 1, draft))
        if decoding and reading:
            chunk = self.times.chunk(
                decoding=len(decoding),
                cells=self.span,
                target_s=limits.gap_s * _patience(len(decoding), len(reading)),
                most=limits.prefill_tokens,
            )
            tokens = min(tokens, chunk)
        reading.sort(key=lambda sequence: rank(sequence.priority))
        for sequence in reading:
            count = min(sequence.missing, tokens)
            scored = sequence.scores - sequence.computed
            if scored > 0:
                count = min(count, scored, outputs)
            if count > cells:
                cells += self._evict(count - cells)
                count = min(count, cells)
            if count <= 0 or outputs <= 0:
                continue
            wanted = count if scored > 0 else (1 if count == sequence.missing else 0)
            chunks.append(Chunk(sequence, sequence.computed, count, wanted))
            tokens, outputs, cells = tokens - count, outputs - wanted, cells - count
        return chunks

    def _next_lane(self) -> Hashable:
        """Lanes take turns: a batch each, or more as long as all of them have their turn within `gap_s`.

        Changing lanes costs about half a step, since the engine has to plan its memory anew for another adapter.
        """
        lanes = list(dict.fromkeys(sequence.lane for sequence in self.running if sequence.leader is None))
        if len(lanes) <= 1 or self._lane not in lanes:
            return lanes[0] if lanes else None
        if 0.0 < self._lane_s < self.limits.gap_s / len(lanes):
            return self._lane
        return lanes[(lanes.index(self._lane) + 1) % len(lanes)]

    # --- slots --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while not self._stuck and (sequence := self.room.first()) is not None:
            if not self._has_place(sequence):
                self._stuck = True  # nobody overtakes the first, or a large request would never have its turn
                return
            self.room.pop()
            self._begin(sequence)

    def _has_place(self, sequence: Sequence) -> bool:
        """Whether slot and memory are there for it, putting less urgent ones back where that makes it so."""
        ranked = rank(sequence.priority)
        outranked = [other for other in self.running if rank(other.priority) > ranked]
        if len(self.running) - len(outranked) >= self.limits.slots:
            return False
        shared = self._shared_with_running(sequence)
        claim = min(sequence.most, sequence.known + self.limits.allowance) - shared
        promised = sum(other.promised for other in self.running)
        if promised - sum(other.promised for other in outranked) + claim > self.limits.cells:
            return False
        while len(self.running) >= self.limits.slots or promised + claim > self.limits.cells:
            victim = self._victim()
            promised -= victim.promised
            self._preempt(victim)
        sequence.claim, sequence.spared = claim, shared
        return True

    def _begin(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        whole = self._whole_entry(sequence) if self.sharing is Sharing.WHOLE else None
        if whole is not None:
            self._cache.take(whole)
            sequence.slot, sequence.computed = whole, self.tree.length(whole)
        else:
            if not self._free:
                self._forget(self._cache.slots()[0])
            sequence.slot = self._free.pop()
            self.tree.add(sequence.slot, sequence.lane)
            sequence.leader, sequence.awaits = self._leader(sequence)
            if sequence.leader is None:
                self._take_prefix(sequence)
        if sequence.reused is None and sequence.leader is None:
            sequence.reused = sequence.computed

    def _shareable(self, sequence: Sequence) -> int:
        """How many of its tokens may come from elsewhere: the last is computed here, and so is what is scored."""
        return 0 if self.sharing is not Sharing.PREFIX or sequence.scores else sequence.known - 1

    def _take_prefix(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        most = self._shareable(sequence)
        if most < LEAST_SHARED:
            return
        length, source = self.tree.longest(sequence.tokens[:most], sequence.lane)
        if source is None or length < LEAST_SHARED:
            return
        if source in self._cache:
            self._cache.use(source)
        self._operations.append(Copy(source, sequence.slot, length))
        self.tree.share(source, sequence.slot, length)
        sequence.computed = length

    def _leader(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """Who reads more of the same prompt just now than is in memory yet, and how much of it."""
        most = self._shareable(sequence)
        if most < LEAST_SHARED:
            return None, 0
        found, best = None, 0
        for other in self.running:
            if other is not sequence and other.lane == sequence.lane and other.missing > 1:
                length = min(common_prefix(sequence.tokens, other.tokens), most)
                if length > max(best, other.computed):
                    found, best = other, length
        if found is None or best < LEAST_SHARED:
            return None, 0
        length, _ = self.tree.longest(sequence.tokens[:most], sequence.lane)
        return (found, best) if best >= length + LEAST_SHARED else (None, 0)

    def _shared_with_running(self, sequence: Sequence) -> int:
        """How many of its tokens running sequences hold or read, so that they need no cells of their own."""
        most = self._shareable(sequence)
        if most < LEAST_SHARED or len(self.running) < 1:
            return 0
        shared = max(
            (common_prefix(sequence.tokens, other.tokens) for other in self.running if other.lane == sequence.lane),
            default=0,
        )
        return min(shared, most) if shared >= LEAST_SHARED else 0

    def _whole_entry(self, sequence: Sequence) -> int | None:
        best, found = LEAST_SHARED - 1, None
        for slot in self._cache.slots() if not sequence.scores else ():
            tokens = self.tree.tokens(slot) if best < self.tree.length(slot) < sequence.known else ()
            if tokens and self.tree.lane(slot) == sequence.lane and sequence.tokens[: len(tokens)] == tokens:
                best, found = len(tokens), slot
        return found

    def _follow(self) -> None:
        """Lets those go on who waited for another to read what they share."""
        for sequence in self.running:
            leader = sequence.leader
            if leader is None or (leader.slot is not None and leader.computed < sequence.awaits and leader.missing > 1):
                continue
            sequence.leader, sequence.awaits = self._leader(sequence)
            if sequence.leader is None:
                self._take_prefix(sequence)
                if sequence.reused is None:
                    sequence.reused = sequence.computed

    # --- memory -------------------------------------------------------------------------------------------------------

    def _make_room(self, cells: int) -> bool:
        """Whether so many cells are free, having dropped cached sequences for them."""
        short = self.tree.cells + cells - self.limits.cells
        return short <= 0 or self._evict(short) >= short

    def _evict(self, cells: int) -> int:
        """Drops cached sequences, the least recently used first, until so many cells are won; returns how many were."""
        before = self.tree.cells
        for slot in self._cache.slots():
            if before - self.tree.cells >= cells:
                break
            self._forget(slot)
        return before - self.tree.cells

    def _victim(self) -> Sequence:
        """Who is put back first: the least urgent, and of these the one that came last."""
        return max(self.running, key=lambda sequence: (rank(sequence.priority), sequence.arrival))

    def _preempt(self, sequence: Sequence) -> None:
        self._stand_down(sequence, sound=True, returns=True)
        self.room.add(sequence, sequence.priority, sequence.arrival)
        self.preemptions += 1
        self._stuck = False

    def _stand_down(self, sequence: Sequence, *, sound: bool, returns: bool = False) -> None:
        slot = sequence.slot
        assert slot is not None
        self.running.remove(sequence)
        sequence.slot, sequence.leader, sequence.computed, sequence.claim, sequence.spared = None, None, 0, 0, 0
        sequence.draft.clear()
        keeps = sound and self.limits.cached and self.sharing is not Sharing.NONE
        self._cache.keep(slot, returns=returns)
        if not keeps or self.tree.length(slot) < LEAST_SHARED:
            self._forget(slot, covered=True)
            if not sound:  # what a batch that failed has left there is known to nobody
                self._operations.append(Trim(slot, 0))
        for cached in self._cache.slots():
            if self.tree.is_covered(cached):
                self._forget(cached, covered=True)
        while len(self._cache) > self.limits.cached:
            self._forget(self._cache.slots()[0])

    def _forget(self, slot: int, *, covered: bool = False) -> None:
        self._cache.drop(slot, covered=covered)
        if self.tree.length(slot):
            self._operations.append(Trim(slot, 0))
        self.tree.remove(slot)
        self._free.append(slot)


def _patience(decoding: int, reading: int) -> float:
    """How much longer a step may take where more streams wait for their first token than for their next one.

    Each step of a few streams that decode is paid by all that are read beside them.
    """
    return min(max(math.sqrt(reading / decoding), 1.0), _MOST_PATIENCE)
