"""What a caller may ask for (scopes), and how much (limits)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from chorus.core.ensemble.records import Strategy
from chorus.core.errors import InvalidRequestError, PermissionDeniedError
from chorus.core.generation import Priority

_PATTERNS_MAX = 64
_PATTERN_LENGTH_MAX = 200
_LIMIT_MAX = 10**12


@dataclass(frozen=True, slots=True)
class Scopes:
    """What may be asked for; an empty set of anything is all of it.

    `models` are patterns as of a shell (`qwen3-*`), for which upper and lower case are alike: models are named as their
    files are, in either.

    Raises InvalidRequestError for patterns that can't be.
    """

    models: tuple[str, ...] = ()
    strategies: frozenset[Strategy] = frozenset()
    priorities: frozenset[Priority] = frozenset()

    def __post_init__(self) -> None:
        if len(self.models) > _PATTERNS_MAX or not all(0 < len(one) <= _PATTERN_LENGTH_MAX for one in self.models):
            raise InvalidRequestError(
                "scopes.models", f"should be at most {_PATTERNS_MAX} patterns of 1 to {_PATTERN_LENGTH_MAX} characters"
            )

    @property
    def all_models(self) -> bool:
        """Whether any model may be asked, whatever its name."""
        return not self.models or "*" in self.models

    def has_model(self, *names: str) -> bool:
        """Whether a model that is called any of these may be asked."""
        patterns = [pattern.casefold() for pattern in self.models]
        return self.all_models or any(fnmatchcase(name.casefold(), pattern) for name in names for pattern in patterns)

    def check_model(self, name: str) -> None:
        """Raises PermissionDeniedError unless `name` may be asked; empty: whichever model there is."""
        if self.has_model(name) and (name or self.all_models):
            return
        said = f"may not ask {name[:100]!r}" if name else "must name the model that it asks"
        raise PermissionDeniedError(
            f"this key {said}; it is for {', '.join(self.models)[:300]}", metadata={"scope": "models"}
        )

    def check_strategy(self, strategy: Strategy) -> None:
        """Raises PermissionDeniedError unless ensembles of that kind may be asked for."""
        self._check("strategies", strategy, self.strategies)

    def check_priority(self, priority: Priority) -> None:
        """Raises PermissionDeniedError unless requests of that class may be sent."""
        self._check("priorities", priority, self.priorities)

    def _check(self, scope: str, asked: str, allowed: Iterable[str]) -> None:
        allowed = sorted(allowed)
        if allowed and asked not in allowed:
            raise PermissionDeniedError(
                f"this key may not ask for {asked}; its {scope} are {', '.join(allowed)}", metadata={"scope": scope}
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be asked for; 0 is no limit. Raises InvalidRequestError for what can't be.

    `requests_per_minute`, `tokens_per_minute` and `tokens_per_day` hold for any 60 seconds and any 24 hours;
    `concurrent` requests are under way at once; `total_tokens` is a budget for good. Tokens are those of prompts and
    answers together.
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    concurrent: int = 0
    total_tokens: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= _LIMIT_MAX:
                raise InvalidRequestError(f"limits.{field.name}", f"should be from 0 (none) to {_LIMIT_MAX}")

    @property
    def any(self) -> bool:
        """Whether there is any."""
        return self != UNLIMITED


EVERYTHING = Scopes()
UNLIMITED = Limits()


@dataclass(frozen=True, slots=True)
class Grant:
    """What somebody may do. `account` is what is counted for: several callers of one account share its limits."""

    account: str
    scopes: Scopes = EVERYTHING
    limits: Limits = UNLIMITED


def parse_grant(text: str) -> tuple[Scopes, Limits]:
    """What a line of configuration grants: `models=qwen3-*|smollm2-* strategies=vote requests_per_minute=60`.

    Words stand apart by blanks or semicolons, alternatives by `|`. Raises InvalidRequestError.
    """
    scopes: dict[str, tuple[str, ...]] = {}
    limits: dict[str, int] = {}
    for word in text.replace(";", " ").split():
        name, _, value = word.partition("=")
        values = tuple(filter(None, value.split("|")))
        if name in ("models", "strategies", "priorities") and values:
            scopes[name] = values
        elif name in {field.name for field in fields(Limits)} and value.isascii() and value.isdigit():
            limits[name] = int(value)
        else:
            known = ["models", "strategies", "priorities", *(field.name for field in fields(Limits))]
            raise InvalidRequestError("grant", f"{word[:60]!r} should be NAME=VALUE with one of {', '.join(known)}")
    return scopes_of(**scopes), Limits(**limits)


def scopes_of(models: Iterable[str] = (), strategies: Iterable[str] = (), priorities: Iterable[str] = ()) -> Scopes:
    """Scopes out of words. Raises InvalidRequestError for one that is none."""
    try:
        return Scopes(tuple(models), frozenset(map(Strategy, strategies)), frozenset(map(Priority, priorities)))
    except ValueError as error:
        known = f"strategies {', '.join(Strategy)}; priorities {', '.join(Priority)}"
        raise InvalidRequestError("scopes", f"{error}; there are {known}") from None
