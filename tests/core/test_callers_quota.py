"""Quotas against a log of everything that was ever taken, and what keys and scopes let pass."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.core.callers import Account, ApiKey, KeyRing, KeyText, Limits, Scopes, parse_grant
from chorus.core.callers.quota import CELLS, DAY_MS, LEASE_MS, MINUTE_MS
from chorus.core.errors import (
    ApiKeyError,
    ApiKeyExpiredError,
    ApiKeyRevokedError,
    InvalidRequestError,
    PermissionDeniedError,
)
from chorus.core.generation import Priority

START_MS = 1_790_000_000_123
LIMITS = st.builds(
    Limits,
    requests_per_minute=st.sampled_from([0, 1, 3, 7]),
    tokens_per_minute=st.sampled_from([0, 5, 40]),
    tokens_per_day=st.sampled_from([0, 60, 200]),
    concurrent=st.sampled_from([0, 1, 2]),
    total_tokens=st.sampled_from([0, 300]),
)


class QuotaMachine(RuleBasedStateMachine):
    """`log` holds every request that was let go: when, and what it is counted as now."""

    @initialize(limits=LIMITS)
    def begin(self, limits: Limits) -> None:
        self.limits = limits
        self.account = Account()
        self.now = START_MS
        self.log: dict[str, tuple[int, int]] = {}
        self.open: dict[str, int] = {}  # until when, unless it is renewed
        self.never: set[str] = set()

    @rule(tokens=st.integers(0, 45))
    def take(self, tokens: int) -> None:
        name = f"r{len(self.log)}"
        refusal = self.account.take(name, self.now, self.limits, tokens)
        if refusal is None:
            self.log[name] = (self.now, tokens)
            self.open[name] = self.now + LEASE_MS
            assert self.account.take(name, self.now, self.limits, tokens) is None  # asked twice, it is one
        else:
            assert refusal.limit == getattr(self.limits, refusal.quota) > 0
            self._check_refused(refusal.quota, tokens)
            if refusal.retry_ms is not None and refusal.quota != "concurrent":
                # Not a moment before: what is told is when there is room, if nothing else is taken.
                twin = Account({key: dict(v) if isinstance(v, dict) else v for key, v in self.account.state.items()})
                twin.state["open"] = {}
                again = twin.take("twin", self.now + refusal.retry_ms, self.limits, tokens)
                assert again is None or again.quota == "total_tokens"

    def _check_refused(self, quota: str, tokens: int) -> None:
        """There was no room, but for what the last cell of a window may hold too long."""
        if quota == "concurrent":
            assert sum(until > self.now for until in self.open.values()) >= self.limits.concurrent
        elif quota == "total_tokens":
            assert sum(n for _, n in self.log.values()) + tokens > self.limits.total_tokens
        else:
            length, amounts = self._window(quota)
            slack = length // CELLS
            held = sum(n for at, n in amounts if at > self.now - length - slack)
            assert held + (1 if quota.startswith("requests") else tokens) > getattr(self.limits, quota)

    def _window(self, quota: str) -> tuple[int, list[tuple[int, int]]]:
        length = DAY_MS if quota.endswith("day") else MINUTE_MS
        if quota.startswith("requests"):
            return length, [(at, 1) for name, (at, _) in self.log.items() if name not in self.never]
        return length, list(self.log.values())

    @precondition(lambda self: self.log)
    @rule(data=st.data(), begun=st.booleans(), prompt=st.integers(0, 20), output=st.integers(0, 20))
    def settle(self, data: st.DataObject, begun: bool, prompt: int, output: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.log)))
        at, tokens = self.log[name]
        prompt, output = (min(prompt, tokens), 0) if begun else (0, 0)  # never more than reserved: see test_debt
        self.account.settle(name, self.now, begun=begun, prompt=prompt, output=output)
        if self.open.pop(name, 0) > self.now:
            self.log[name] = (at, prompt + output)
            if not begun:
                self.never.add(name)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        self.account.renew([name], self.now)
        if self.open[name] > self.now:
            self.open[name] = self.now + LEASE_MS

    @rule(by_ms=st.sampled_from([1, 250, 999, 20_000, 59_999, 60_250, DAY_MS // 3]))
    def pass_time(self, by_ms: int) -> None:
        self.now += by_ms

    @invariant()
    def nothing_is_over(self) -> None:
        if not hasattr(self, "limits"):
            return
        for quota in ("requests_per_minute", "tokens_per_minute", "tokens_per_day"):
            length, amounts = self._window(quota)
            limit = getattr(self.limits, quota)
            assert not limit or sum(n for at, n in amounts if at > self.now - length) <= limit
        alive = sum(until > self.now for until in self.open.values())
        assert not self.limits.concurrent or alive <= self.limits.concurrent
        usage = Account({**self.account.state}).usage(self.now)
        assert usage.requests == len(self.log) - len(self.never)
        assert usage.total_tokens == sum(n for _, n in self.log.values())
        assert usage.concurrent == alive


QuotaMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestQuota = QuotaMachine.TestCase


def test_debt_is_counted_where_it_was_made() -> None:
    account, limits = Account(), Limits(tokens_per_minute=100)
    assert account.take("a", START_MS, limits, 50) is None
    account.settle("a", START_MS + 29_000, begun=True, prompt=60, output=90)
    refusal = account.take("b", START_MS + 29_000, limits, 1)
    assert refusal is not None
    assert 30_000 < (refusal.retry_ms or 0) <= 31_250  # a minute after it was reserved, not settled
    assert account.take("b", START_MS + 29_000 + (refusal.retry_ms or 0), limits, 1) is None


def test_what_can_never_be_had_names_no_time() -> None:
    refusal = Account().take("a", START_MS, Limits(tokens_per_minute=100), 101)
    assert refusal is not None
    assert (refusal.quota, refusal.retry_ms) == ("tokens_per_minute", None)


PEPPER = b"p" * 32


def _key(**changes: object) -> tuple[KeyText, ApiKey]:
    text = KeyText("0123456789abcdef", bytes(range(32)))
    return text, ApiKey(text.key_id, "ann", text.digest(PEPPER), created_at=0.0, **changes)  # type: ignore[arg-type]


def test_a_key_is_known_by_its_secret_alone() -> None:
    text, key = _key()
    ring = KeyRing([key])
    assert ring.admit(KeyText.parse(str(text)), PEPPER, 1.0) is key
    wrong = [(text, b"q" * 32), (KeyText(text.key_id, bytes(32)), PEPPER), (KeyText("f" * 16, text.secret), PEPPER)]
    for shown, pepper in wrong:
        with pytest.raises(ApiKeyError):
            ring.admit(shown, pepper, 1.0)
    assert str(text).split("_", 2)[2] not in repr(text) + repr(key)


def test_a_key_ends() -> None:
    text, key = _key(expires_at=10.0)
    assert KeyRing([key]).admit(text, PEPPER, 9.9) is key
    with pytest.raises(ApiKeyExpiredError):
        KeyRing([key]).admit(text, PEPPER, 10.0)
    text, key = _key(revoked_at=5.0)
    with pytest.raises(ApiKeyRevokedError):
        KeyRing([key]).admit(text, PEPPER, 1.0)


@pytest.mark.parametrize("text", ["", "chorus_", "chorus_0123456789abcdef_short", f"chorus_{'A' * 16}_{'a' * 43}"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(ApiKeyError) as told:
        KeyText.parse(text)
    assert len(text) < 10 or text not in str(told.value)


def test_scopes() -> None:
    scopes, limits = parse_grant("models=qwen3-*|smol priorities=batch; requests_per_minute=60")
    assert limits == Limits(requests_per_minute=60)
    for name in ("qwen3-8b", "Qwen3-8B", "Smol"):
        scopes.check_model(name)
    for name in ("qwen2", "", "smollm"):
        with pytest.raises(PermissionDeniedError):
            scopes.check_model(name)
    with pytest.raises(PermissionDeniedError, match="batch"):
        scopes.check_priority(Priority.INTERACTIVE)
    Scopes().check_model("")
    for wrong in ("models=", "speed=3", "priorities=soon", "requests_per_minute=-1", "strategies=votes"):
        with pytest.raises(InvalidRequestError):
            parse_grant(wrong)
