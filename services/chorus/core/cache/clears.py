"""How often answers were forgotten, so that one which was begun before is not kept after."""

from __future__ import annotations

from collections import Counter


class Clears:
    """Counts, for each caller and for everybody."""

    def __init__(self) -> None:
        self._of_everybody = 0
        self._of: Counter[str] = Counter()

    def cleared(self, caller: str | None) -> None:
        """One caller's answers are forgotten, or (None) everybody's."""
        if caller is None:
            self._of_everybody += 1
        else:
            self._of[caller] += 1

    def seen_by(self, caller: str) -> tuple[int, int]:
        """The counts that a caller's answers go by: another one now means that they were forgotten since."""
        return self._of_everybody, self._of[caller]
