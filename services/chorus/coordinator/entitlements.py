"""Before a request is looked at further: whether its caller's scopes have room for it, and its quotas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.api.inference.v1.generation_pb2 import Priority
from chorus.coordinator.callers import Callers
from chorus.coordinator.placing import Placing
from chorus.coordinator.spending import Spending, current_spending
from chorus.core.callers import Grant
from chorus.core.ensemble.choosing import Offer
from chorus.core.errors import ChorusError, PermissionDeniedError, QuotaExceededError, UnsupportedFeatureError
from chorus.core.placement import Needs
from chorus.core.placement.needs import LIKELY_CHARACTERS_PER_TOKEN
from chorus.telemetry.logs import get_logger
from chorus.wire.ensemble import decode_ensemble
from chorus.wire.generation import decode_generation, decode_priority

ANSWER_TOKENS = 1024
"""Reserved of an answer that has no bound."""
_MEMBERS = 3
"""Taken as an ensemble's, where the coordinator is to choose them."""

_log = get_logger()


class Entitlements:
    """What callers may ask, by their grants; without Callers everybody may ask everything.

    `denied` is told of each request that goes beyond scopes or quotas: its model, and why.
    """

    def __init__(self, callers: Callers | None, placing: Placing, denied: Callable[[str, ChorusError], object]) -> None:
        self._callers = callers
        self._placing = placing
        self._denied = denied

    @property
    def callers(self) -> Callers:
        """The keys' administration. Raises UnsupportedFeatureError where there is none."""
        if self._callers is None:
            raise UnsupportedFeatureError(
                "this coordinator knows no API keys; callers.listen says where their holders are served",
                metadata={"feature": "callers"},
            )
        return self._callers

    @asynccontextmanager
    async def generating(self, request: pb.GenerateRequest) -> AsyncIterator[None]:
        """Counts a generation while the block runs.

        Raises PermissionDeniedError, QuotaExceededError, UnavailableError.
        """
        grant = self._grant()
        if grant is None or self._callers is None:
            yield
            return
        async with AsyncExitStack() as held:
            with self._telling(request.spec.model):
                tokens = self._estimate(grant, request)
                await held.enter_async_context(self._callers.quotas.reserved(grant, tokens))
            yield

    async def placing(self, request: pb.PlaceRequest) -> Spending | None:
        """Reserves for a ticket, which is settled by what its runner tells. Raises as `generating`."""
        grant = self._grant()
        if grant is None or self._callers is None:
            return None
        if not grant.scopes.all_models:
            request.fallback.similar_model = False
        with self._telling(request.spec.model):
            tokens = self._estimate(grant, pb.GenerateRequest(spec=request.spec, fallback=request.fallback))
            return await self._callers.quotas.reserve(grant, tokens)

    def ticket_ended(self, spending: Spending | None, *, prompt: int = 0, output: int = 0, begun: bool) -> None:
        """A ticket was used to that extent, or not at all."""
        if spending is not None and self._callers is not None:
            spending.used(prompt, output)
            self._callers.quotas.settle(spending, begun=begun)

    def ticket_lost(self, spending: Spending | None) -> None:
        """Nobody knows what was used of a ticket."""
        if spending is not None and self._callers is not None:
            self._callers.quotas.leave(spending)

    @asynccontextmanager
    async def reading(self, model: str, priority: Priority.ValueType, texts: Iterable[str]) -> AsyncIterator[None]:
        """Counts an embedding, a ranking or a count of tokens while the block runs. Raises as `generating`.

        Without a grant nobody looks at `texts`.
        """
        grant = self._grant()
        if grant is None or self._callers is None:
            yield
            return
        async with AsyncExitStack() as held:
            with self._telling(model):
                grant.scopes.check_model(model)
                grant.scopes.check_priority(decode_priority("priority", priority))
                tokens = sum(len(text) // LIKELY_CHARACTERS_PER_TOKEN + 1 for text in texts)
                await held.enter_async_context(self._callers.quotas.reserved(grant, tokens))
            yield

    @contextmanager
    def _telling(self, model: str) -> Iterator[None]:
        try:
            yield
        except (PermissionDeniedError, QuotaExceededError) as error:
            self._denied(model, error)
            raise

    def _grant(self) -> Grant | None:
        return self._callers.grant() if self._callers is not None else None

    def _estimate(self, grant: Grant, request: pb.GenerateRequest) -> int:
        """Checks a generation's scopes, and returns how many tokens it may take."""
        generation = decode_generation(request.spec)
        needs = Needs.of_generation(generation)
        try:
            members = self._check(grant, request, needs)
        except PermissionDeniedError as error:
            _log.info("caller.refused", account=grant.account, why=error.message)
            raise
        grant.scopes.check_priority(generation.priority)
        return members * (needs.likely_prompt_tokens + (needs.answer_tokens or ANSWER_TOKENS * generation.choice_count))

    def _check(self, grant: Grant, request: pb.GenerateRequest, needs: Needs) -> int:
        """Checks models and strategy; returns how many members answer."""
        scopes = grant.scopes
        if not scopes.all_models:
            request.fallback.similar_model = False
        if not request.HasField("ensemble"):
            scopes.check_model(needs.model or self._unnamed(needs))
            return 1
        ensemble = decode_ensemble(request.ensemble)
        scopes.check_strategy(ensemble.strategy)
        # Those that the coordinator chooses are of the grant's models: see `of_permitted`.
        for model in filter(None, (request.spec.model, ensemble.aggregator_model)):
            scopes.check_model(model)
        for member in ensemble.members:
            scopes.check_model(member.model or self._unnamed(needs))
        return sum(member.sample_count or 1 for member in request.ensemble.members) or _MEMBERS

    def _unnamed(self, needs: Needs) -> str:
        """Who answers where no model is named: the default one; empty where tier, tags or an adapter choose any."""
        return "" if needs.with_model("").wants_any_model else self._placing.default_model()


def of_permitted(offers: Iterable[Offer], *, choosing: bool) -> tuple[Offer, ...]:
    """Those that may answer the request under way.

    Raises PermissionDeniedError where one of them is to be chosen and none is left: the mesh's default model, which
    answers where nothing is known of any, may be one that the caller may not ask.
    """
    spending = current_spending()
    if spending is None or spending.grant.scopes.all_models:
        return tuple(offers)
    scopes = spending.grant.scopes
    left = tuple(offer for offer in offers if scopes.has_model(*offer.names))
    if choosing and not left:
        raise PermissionDeniedError(
            f"no model that this key may ask could answer now; it is for {', '.join(scopes.models)[:300]}",
            metadata={"scope": "models"},
        )
    return left
