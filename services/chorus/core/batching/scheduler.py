"""What the next batch holds: who is admitted to which slot, who goes on by how many tokens, who waits.

Pure: the engine's owner thread tells it what came, left and was computed, and carries out its plans. A sequence is one
choice of one request; it is admitted once the cells of KV memory that it may ever need are free, so memory never runs
out under way and nothing has to be preempted. Sequences that decode always go first, one token each; what is left of
the batch reads prompts, in order of admission.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chorus.core.batching.waiting import WaitingRoom
from chorus.core.errors import ChorusError
from chorus.core.generation import Priority


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one context can take.

    `slots` sequences at a time, `cells` tokens of KV memory over all of them, `batch_tokens` tokens and `outputs`
    positions with logits in one batch. While somebody decodes, prompts are read by at most `prefill_tokens` a batch, so
    that streams keep moving. At most `waiting` requests wait.
    """

    slots: int
    cells: int
    batch_tokens: int
    prefill_tokens: int
    outputs: int
    waiting: int

    def __post_init__(self) -> None:
        if min(self.slots, self.cells, self.batch_tokens, self.prefill_tokens) < 1 or self.waiting < 0:
            raise ValueError(f"impossible limits: {self}")
        if self.outputs < self.slots or self.batch_tokens < self.slots:
            raise ValueError(f"each of {self.slots} slots needs a token and an output in every batch: {self}")


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice on its way through the batches.

    `known` tokens exist (prompt, and what was drawn), `computed` of them are in KV memory, `most` is how many there can
    ever be. The first `shared` tokens are the same in all sequences of `group`. With `scores`, logits are wanted at
    the first `scores` positions and not only at the last.
    """

    known: int
    most: int
    group: object
    priority: Priority = Priority.INTERACTIVE
    shared: int = 0
    scores: int = 0
    computed: int = 0
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """Before the batch, let slot `target` share the first `count` tokens of slot `source`."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence. The last `outputs` positions are to have logits."""

    sequence: Sequence
    start: int
    count: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One batch, with the copies that must come before it."""

    copies: tuple[Copy, ...]
    chunks: tuple[Chunk, ...]


@dataclass(slots=True)
class Scheduler:
    """Keeps slots, queue and memory; see the module's text. `share_prefixes`: siblings may copy their common prefix."""

    limits: BatchLimits
    share_prefixes: bool = True
    room: WaitingRoom[Sequence] = field(init=False)
    running: list[Sequence] = field(default_factory=list)
    reserved: int = 0
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.room = WaitingRoom(1 << 30)
        self._free = list(range(self.limits.slots - 1, -1, -1))

    # --- what happens -----------------------------------------------------------------------------------------------

    def submit(self, sequences: list[Sequence]) -> None:
        """Takes the sequences of one request. Raises `OverloadedError`, having taken none, if too many wait already.

        `sequence.slot` is set at once for those that are admitted. Each `most` must be at most `limits.cells`.
        """
        for sequence in sequences:
            if not 1 <= sequence.known <= sequence.most <= self.limits.cells:
                raise ValueError(f"a sequence of {sequence.known} to {sequence.most} tokens cannot run here")
        waited_before = self.waiting_groups()
        for sequence in sequences:
            self.room.add(sequence, sequence.priority)
        self._admit()
        if sequences[0].slot is None and len(waited_before) >= self.limits.waiting:
            refusal: ChorusError = self.room.refusal(len(waited_before))
            for sequence in sequences:
                self.room.remove(sequence)
            raise refusal

    def leave(self, sequence: Sequence, now: float) -> int | None:
        """A sequence ended, was cancelled or failed, wherever it stood; returns the slot to clear, if it had one.

        Others are admitted by the next `plan`, when that slot has been cleared.
        """
        if sequence.slot is None:
            self.room.remove(sequence)
            return None
        slot, sequence.slot = sequence.slot, None
        self.running.remove(sequence)
        self._free.append(slot)
        self.reserved -= sequence.most
        self.room.rate.finished(now)
        if not self.running and not self.room:
            self.room.rate.idle()
        return slot

    def computed(self, chunk: Chunk) -> bool:
        """A chunk is in KV memory now; returns whether its sequence's next token can be drawn."""
        chunk.sequence.computed += chunk.count
        return chunk.sequence.computed == chunk.sequence.known

    def extend(self, sequence: Sequence) -> None:
        """A token was drawn, and it is not the last one."""
        sequence.known += 1

    # --- what follows -----------------------------------------------------------------------------------------------

    def waiting_groups(self) -> list[object]:
        """The requests no choice of which has a slot yet, the next one first."""
        started = {id(sequence.group) for sequence in self.running}
        groups = {id(sequence.group): sequence.group for sequence in self.room.items()}
        return [group for key, group in groups.items() if key not in started]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to decode."""
        return not self.running and not self.room

    def plan(self) -> Plan:
        """The next batch; empty where nothing runs."""
        self._admit()
        copies = self._copies()
        chunks = [
            Chunk(sequence, sequence.computed, 1, 1)
            for sequence in self.running
            if sequence.known - sequence.computed == 1
        ]
        tokens = self.limits.batch_tokens - len(chunks)
        if chunks:
            tokens = min(tokens, self.limits.prefill_tokens)
        outputs = self.limits.outputs - len(chunks)
        for sequence in self.running:
            missing = sequence.known - sequence.computed
            if missing <= 1 or tokens <= 0 or outputs <= 0 or self._leader_reads(sequence):
                continue
            count = min(missing, tokens)
            scored = sequence.scores - sequence.computed
            if scored > 0:
                count = min(count, scored, outputs)
                wanted = count
            else:
                wanted = 1 if count == missing else 0
            chunks.append(Chunk(sequence, sequence.computed, count, wanted))
            tokens -= count
            outputs -= wanted
        return Plan(tuple(copies), tuple(chunks))

    def validate(self) -> None:
        """Raises `AssertionError` unless every count agrees with every other; for tests."""
        slots = [sequence.slot for sequence in self.running]
        assert None not in slots
        assert len(set(slots)) == len(slots)
        assert sorted([*slots, *self._free], key=str) == sorted(range(self.limits.slots), key=str)
        assert self.reserved == sum(sequence.most for sequence in self.running) <= self.limits.cells
        assert all(sequence.slot is None and not sequence.computed for sequence in self.room.items())
        assert all(sequence.computed <= sequence.known <= sequence.most for sequence in self.running)

    def _admit(self) -> None:
        while self._free and (sequence := self.room.first()) is not None:
            if self.reserved + sequence.most > self.limits.cells:
                return  # nobody overtakes the first, or a large request would never have its turn
            self.room.pop()
            sequence.slot = self._free.pop()
            self.reserved += sequence.most
            self.running.append(sequence)

    def _copies(self) -> list[Copy]:
        copies = []
        for sequence in self.running:
            if sequence.computed or not self._shares(sequence):
                continue
            for sibling in self.running:
                if sibling.group is sequence.group and sibling.computed >= sequence.shared:
                    assert sibling.slot is not None
                    assert sequence.slot is not None
                    copies.append(Copy(sibling.slot, sequence.slot, sequence.shared))
                    sequence.computed = sequence.shared
                    break
        return copies

    def _leader_reads(self, sequence: Sequence) -> bool:
        """Whether an earlier sibling is reading the prefix that this sequence will then copy."""
        if sequence.computed or not self._shares(sequence):
            return False
        leader = next(other for other in self.running if other.group is sequence.group)
        return leader is not sequence

    def _shares(self, sequence: Sequence) -> bool:
        return self.share_prefixes and sequence.shared > 0 and not sequence.scores
