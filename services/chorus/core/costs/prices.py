"""What paid providers charge. Money is whole millionths of a US dollar ("micro USD"), always rounded up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MICRO = 1_000_000
"""Micro USD in a US dollar, and tokens for which token prices are told."""

ANY_MODEL = "*"


@dataclass(frozen=True, slots=True)
class Price:
    """Micro USD for a million tokens of prompts and of answers, and for each request."""

    prompt: int = 0
    completion: int = 0
    request: int = 0

    def of(self, prompt_tokens: int, completion_tokens: int) -> int:
        """What one request costs."""
        tokens = self.prompt * prompt_tokens + self.completion * completion_tokens
        return self.request - (-tokens // MICRO)

    @classmethod
    def parse(cls, text: str) -> Price:
        """The price that `PROMPT/COMPLETION` or `PROMPT/COMPLETION/REQUEST` spells. Raises ValueError."""
        numbers = [part.strip() for part in text.split("/")]
        if len(numbers) not in (2, 3) or not all(part.isascii() and part.isdigit() for part in numbers):
            raise ValueError(
                "should be PROMPT/COMPLETION, in millionths of a US dollar for a million tokens, such as "
                "150000/600000 for 0.15 and 0.60 USD; or PROMPT/COMPLETION/REQUEST, with what each request costs"
            )
        if any(len(part) > _DIGITS for part in numbers):
            raise ValueError(f"should have no number of more than {_DIGITS} digits")
        return cls(*map(int, numbers))


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices by a model's family or an artifact's name; `*` is for those without one of their own."""

    by_model: Mapping[str, Price] = field(default_factory=dict)

    def of(self, names: Iterable[str]) -> Price | None:
        """The price of the first of a model's names that has one; None where it isn't known."""
        for name in (*names, ANY_MODEL):
            if (found := self.by_model.get(name)) is not None:
                return found
        return None


# So that sums of many requests stay within SQLite's 64 bits.
_DIGITS = 10
