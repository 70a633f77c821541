"""Which finished sequences stay in memory for whoever begins alike, and for how long they are worth it.

A cached token slows every decode, since each token that is drawn attends to all of unified memory. So an entry pays
rent: what it costs the steps that are taken meanwhile. It goes once that rent reaches what reading it again would cost,
the rule of the ski rental problem (Karlin, Manasse, Rudolph, Sleator, "Competitive snoopy caching", 1988), which never
costs more than twice the best choice. An entry that nobody has used yet gets that much only in proportion to how often
entries have been of use lately. One that was put back for a more urgent one comes back, whatever others do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_MEMORY = 0.98  # of earlier entries, with each that is used or goes unused
_FIRST_USED, _FIRST_UNUSED = 1.0, 9.0  # what is believed before anything is known: one entry in ten is of use


@dataclass(slots=True)
class _Entry:
    rent_from: float
    proven: bool


@dataclass(slots=True)
class CachedSlots:
    """The slots that nobody decodes, the least recently used first. Rent is in seconds for each of an entry's cells."""

    _entries: dict[int, _Entry] = field(default_factory=dict)
    _rent: float = 0.0
    _used: float = 0.0
    _unused: float = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, slot: int) -> bool:
        return slot in self._entries

    def slots(self) -> list[int]:
        """Every cached slot, the least recently used first."""
        return list(self._entries)

    def keep(self, slot: int, *, returns: bool = False) -> None:
        """A sequence ended, and its slot stays as it is; `returns` where it was only put back, and will go on."""
        self._entries[slot] = _Entry(self._rent, proven=returns)

    def use(self, slot: int) -> None:
        """Somebody goes on from this entry."""
        entry = self._entries.pop(slot)
        if not entry.proven:
            self._count(used=True)
        self._entries[slot] = _Entry(self._rent, proven=True)

    def drop(self, slot: int, *, covered: bool = False) -> None:
        """An entry goes; `covered` where another holds all of it, which says nothing about its use."""
        entry = self._entries.pop(slot)
        if not entry.proven and not covered:
            self._count(used=False)

    def take(self, slot: int) -> None:
        """An entry becomes a running sequence's own slot."""
        self.use(slot)
        del self._entries[slot]

    @property
    def usefulness(self) -> float:
        """The share of entries that were of use lately, between 0 and 1; a tenth before anything is known."""
        return (self._used + _FIRST_USED) / (self._used + self._unused + _FIRST_USED + _FIRST_UNUSED)

    def pay(self, seconds_per_cell: float) -> None:
        """A step was taken, and each cell of every entry has cost it so much."""
        self._rent += seconds_per_cell

    def overdue(self, read_token_s: float) -> list[int]:
        """The entries that have cost as much as they are worth, where reading a token takes so long."""
        return [
            slot
            for slot, entry in self._entries.items()
            if self._rent - entry.rent_from > read_token_s * (1.0 if entry.proven else self.usefulness)
        ]

    def _count(self, *, used: bool) -> None:
        self._used = self._used * _MEMORY + (1.0 if used else 0.0)
        self._unused = self._unused * _MEMORY + (0.0 if used else 1.0)
