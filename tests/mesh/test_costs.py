"""What paid providers cost, from end to end: bills, budgets, several coordinators, one that is killed."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from chorus.client import MeshClient, MeshCosts, Verdict, ensemble_spec
from chorus.config import Endpoint
from chorus.core.costs import Grouping, Where
from chorus.core.errors import (
    BudgetExhaustedError,
    ChorusError,
    ConfigError,
    NoCapableRunnerError,
    OverloadedError,
    RunnersUnavailableError,
    UnsupportedFeatureError,
)
from chorus.core.generation import (
    Conversation,
    DeliveredChoice,
    EmbeddingRequest,
    Fallback,
    Finished,
    GenerationRequest,
    Message,
    MessageRole,
    Requirements,
    StopConditions,
    TextPart,
    TextPrompt,
    TokenDelta,
)
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine
from chorus.testing.mesh import InProcessMesh
from tests.cli.test_events import chorus, environment
from tests.engine.upstream import Refusal, Upstream, UpstreamModel
from tests.mesh.child import COORDINATOR, Child, child, configured
from tests.mesh.conftest import TRUST_DOMAIN
from tests.mesh.test_remote_runner import Outside, engine_at

# A micro USD for a token of the prompt, 2 for one of the answer, 7 for each request: sums that can be done in the head.
PRICES = {"tiny": "1000000/2000000/7", "text-embedding": "1000000/0"}
WORDS = 8
PROMPT = "Once upon a time"
# The provider counts 5 tokens; at most it may count as many as there are bytes.
COST = 5 + 2 * WORDS + 7
RESERVED = len(PROMPT) + 2 * WORDS + 7
LOCAL = "fake-1b"


def paid(**more: Any) -> GenerationRequest:
    return GenerationRequest("tiny", TextPrompt(PROMPT), stop=StopConditions(max_tokens=WORDS), **more)


def money(file: Path, **more: Any) -> dict[str, Any]:
    return {"file": file, "prices": PRICES, **more}


def spent(seen: MeshCosts) -> dict[str, int]:
    return {line.name: line.spent for line in seen.lines if line.spent}


@asynccontextmanager
async def at_a_provider(
    certificates: MeshCertificates, folder: Path
) -> AsyncGenerator[tuple[Upstream, InProcessMesh], None]:
    """A mesh whose only runner is in front of a paid provider."""
    async with Upstream("vllm", UpstreamModel()) as upstream:
        costs = money(folder / "costs.db")
        async with InProcessMesh(
            runners=[engine_at(upstream, Outside)], certificates=certificates, costs=costs
        ) as mesh:
            yield upstream, mesh


async def settled(mesh: InProcessMesh) -> None:
    """Until no attempt is under way at a provider: what it cost is told as soon as it has ended."""
    for coordinator in mesh.coordinators:
        if coordinator._costs._settling:
            await asyncio.wait(coordinator._costs._settling)


async def test_a_provider_lost_before_it_answered_may_have_read_the_prompt(
    certificates: MeshCertificates, tmp_path: Path
) -> None:
    async with at_a_provider(certificates, tmp_path) as (upstream, mesh):
        client = mesh.client()
        upstream.cut_after = 0
        with pytest.raises(ChorusError):
            await client.complete(paid())
        await settled(mesh)
        assert len(upstream.asked("/v1/completions")) == 1
        assert (await client.costs()).total.spent == len(PROMPT) // 4 + 7


async def test_an_answer_of_which_nothing_is_missing_costs_nothing(
    certificates: MeshCertificates, tmp_path: Path
) -> None:
    async with at_a_provider(certificates, tmp_path) as (upstream, mesh):
        client = mesh.client()
        ids = tuple(range(WORDS))
        for had, asked in (
            (DeliveredChoice(0, (), "x" * WORDS, WORDS), 0),
            (DeliveredChoice(0, ids, "x"), 0),  # several tokens make up one character
            (DeliveredChoice(0, (), "x" * (WORDS - 1), WORDS - 1), 1),
        ):
            completion = await client.complete(
                paid(resume=(had,), allow_text_resume=True), fallback=Fallback(external=True)
            )
            assert completion.usage.completion_tokens == WORDS
            assert len(upstream.asked("/v1/completions")) == asked
            assert (completion.usage.cost_micro_usd > 0) == bool(asked)


async def test_every_way_in_which_a_provider_is_asked_is_billed(certificates: MeshCertificates, tmp_path: Path) -> None:
    upstream = Upstream("vllm", UpstreamModel(), UpstreamModel("text-embedding", ("embedding",)))
    async with upstream:
        engine = engine_at(upstream, Outside)
        costs = money(tmp_path / "costs.db", baseline_usd=0.15)
        mesh = InProcessMesh(runners=[engine, FakeEngine()], certificates=certificates, costs=costs, cache={})
        async with mesh:
            ann, bob, root = mesh.client(name="ann"), mesh.client(name="bob"), mesh.client(role=Role.ADMIN, name="root")

            # A generation, and one at home.
            assert (await ann.complete(paid())).usage.cost_micro_usd == COST
            assert (await ann.complete("echo:hi", model=LOCAL)).usage.cost_micro_usd == 0
            await settled(mesh)
            seen = await ann.costs(by=Grouping.MODEL, latest=5)
            assert spent(seen) == {"tiny": COST}
            assert (seen.total.local, seen.total.external, seen.total.kept_local) == (1, 1, 0.5)
            assert (seen.total.avoided, seen.baseline) == (150_000, 150_000)
            assert [(one.model, one.where, one.spent) for one in seen.latest] == [
                (LOCAL, Where.LOCAL, 0),
                ("tiny", Where.EXTERNAL, COST),
            ]

            # Given again out of the cache.
            for _ in range(2):
                await bob.complete("echo:again", model=LOCAL, cache="exact")
            total = (await bob.costs()).total
            assert (total.local, total.cached, total.avoided) == (1, 1, 300_000)

            # Several models: the verdict tells what all of them cost.
            words = Conversation((Message(MessageRole.USER, (TextPart("which?"),)),))
            asked = GenerationRequest("", words, stop=StopConditions(max_tokens=WORDS))
            async with bob.ensemble(asked, ensemble_spec("vote", ("tiny*2", LOCAL), quorum=3)) as events:
                verdicts = [event async for event in events if isinstance(event, Verdict)]
            await settled(mesh)
            # `which?` is 2 tokens for the provider.
            assert verdicts[0].cost_micro_usd == 2 * (2 + 2 * WORDS + 7)
            assert spent(await bob.costs(by=Grouping.MODEL)) == {"tiny": verdicts[0].cost_micro_usd}

            # A provider that refuses is owed nothing, one that is left what it has brought by then.
            before = (await root.costs()).total.spent
            upstream.refusals.append(Refusal(429, b"{}"))
            with pytest.raises(OverloadedError):
                await ann.complete(paid())
            await settled(mesh)
            assert (await root.costs()).total.spent == before
            upstream.pause_after = 3
            async with ann.generate(paid()) as events:
                came = 0
                async for event in events:
                    came += isinstance(event, TokenDelta)
                    if came == 3:
                        break
            await upstream.hung_up.wait()
            upstream.pause_after = None
            (entry,) = (await ann.costs(latest=1)).latest
            assert (entry.completed, entry.spent) == (False, len(PROMPT) // 4 + 2 * 3 + 7)
            assert (await root.costs()).total.spent == before + entry.spent

            # Vectors have no answer's tokens, and are no request here.
            await ann.embed(EmbeddingRequest("text-embedding", ("one two three", "four")))
            await settled(mesh)
            seen = await ann.costs(by=Grouping.CALLER)
            assert spent(seen)[str(certificates.id(Role.CLIENT, "ann"))] == COST + entry.spent + 4
            assert seen.total.external == 3

            # Everybody's by caller for an admin, one's own for a client; the command prints what a client sees.
            names = {line.name.rpartition("/")[2] for line in (await root.costs(by=Grouping.CALLER)).lines}
            assert names == {"ann", "bob"}
            assert {line.name.rpartition("/")[2] for line in seen.lines} == {"ann"}
            async with chorus("costs", "--json", env=environment(mesh, tmp_path)) as process:
                told, problems = await process.communicate()
            assert json.loads(told)["total"]["requests"] == 0, problems
            with pytest.raises(UnsupportedFeatureError, match="through the coordinator alone"):
                await mesh.client(name="ann", direct="always").complete(paid())


async def test_a_budget_that_two_coordinators_share(certificates: MeshCertificates, tmp_path: Path) -> None:
    # Three requests, and no fourth: each is let in with what it may cost at most.
    budget = 2 * COST + RESERVED
    costs = money(tmp_path / "costs.db", daily_budget_usd=budget / 1e6)
    async with Upstream("vllm") as upstream:
        runners = [engine_at(upstream, Outside), FakeEngine()]
        async with InProcessMesh(runners=runners, coordinators=2, certificates=certificates, costs=costs) as mesh:
            one, two = (mesh.client(coordinators=[number]) for number in range(2))
            with pytest.raises(NoCapableRunnerError, match="paid provider"):
                await one.complete(paid(requirements=Requirements(private=True)))
            # At the same time: the second coordinator has not heard of what the first one spends.
            answers = await asyncio.gather(
                *(client.complete(paid()) for client in (one, two) * 4), return_exceptions=True
            )
            refused = [answer for answer in answers if isinstance(answer, BaseException)]
            assert all(isinstance(error, BudgetExhaustedError) for error in refused)
            assert len(refused) >= 5
            await settled(mesh)
            full = None
            while full is None:  # of two at once, one may be refused that would fit in its turn
                # What the other one spends is heard of within a second, or when somebody asks what things cost.
                await one.costs()
                try:
                    await one.complete(paid())
                except BudgetExhaustedError as error:
                    full = error
                await settled(mesh)
            await two.costs()
            with pytest.raises(BudgetExhaustedError) as caught:
                await two.complete(paid())
            assert caught.value.metadata["spent_micro_usd"] == str(3 * COST)
            assert len(upstream.asked("/v1/completions")) == 3
            assert full.retry_after_s is not None
            assert 0 < full.retry_after_s <= 86_400
            assert full.metadata["spent_micro_usd"] == str(3 * COST)
            assert "costs.daily_budget_usd" in full.message
            explained = await two.explain_placement(paid())
            assert any(rejected.reason == "budget" for rejected in explained.rejected)

            # Whoever lets another model answer gets one; a longer answer than the budget ever allows is no matter of
            # waiting.
            stands_in = await one.complete(paid(), fallback=Fallback(similar_model=True))
            assert stands_in.model == LOCAL
            with pytest.raises(BudgetExhaustedError) as caught:
                await one.complete(GenerationRequest("tiny", TextPrompt(PROMPT)))
            assert caught.value.retry_after_s is None

            # A coordinator that is started anew knows what was spent.
            await mesh.restart_coordinator(0)
            await mesh.until(lambda directory: len(directory.entries) == 2)
            with pytest.raises(BudgetExhaustedError):
                await mesh.client(coordinators=[0]).complete(paid())
            seen = await mesh.client(role=Role.ADMIN, name="root").costs()
            assert seen.total.spent == 3 * COST, "a ledger that is shared is counted once"
            (held,) = seen.budgets
            assert (held.limit, held.spent, held.reserved, len(held.coordinators)) == (budget, 3 * COST, 0, 2)


async def test_with_a_budget_who_has_no_price_is_not_asked(certificates: MeshCertificates, tmp_path: Path) -> None:
    async with Upstream("vllm") as upstream:
        costs = {"file": tmp_path / "costs.db", "monthly_budget_usd": 1.0}
        runners = [engine_at(upstream, Outside)]
        async with InProcessMesh(runners=runners, certificates=certificates, costs=costs) as mesh:
            with pytest.raises(NoCapableRunnerError, match=r"costs\.prices"):
                await mesh.client().complete(paid())
            assert (await mesh.client().costs()).unpriced == ("tiny",)
            assert not upstream.asked("/v1/completions")


async def test_without_its_ledger_a_budget_lets_nothing_out(certificates: MeshCertificates, tmp_path: Path) -> None:
    file = tmp_path / "costs.db"
    async with Upstream("vllm") as upstream:
        runners = [engine_at(upstream, Outside), FakeEngine()]
        costs = money(file, daily_budget_usd=1.0)
        async with InProcessMesh(runners=runners, certificates=certificates, costs=costs) as mesh:
            client = mesh.client()
            with sqlite3.connect(file) as db:
                db.execute("DROP TABLE reserved")
            with pytest.raises(RunnersUnavailableError, match="cost ledger can't be written"):
                await client.complete(paid())
            assert not upstream.asked("/v1/completions")
            assert (await client.complete("echo:hi", model=LOCAL)).text == "hi", "what costs nothing goes on"


async def test_a_ledger_that_can_not_be_had_ends_the_start(certificates: MeshCertificates, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"costs\.file: a budget needs one"):
        async with InProcessMesh(runners=0, certificates=certificates, costs={"daily_budget_usd": 1.0}):
            pass
    with pytest.raises(ConfigError, match=r"costs\.file: the ledger can't be opened"):
        async with InProcessMesh(runners=0, certificates=certificates, costs={"file": tmp_path}):
            pass


async def test_a_killed_coordinator_keeps_its_ledger(certificates: MeshCertificates, tmp_path: Path) -> None:
    name = "coordinator-k"
    certificates.leaf(Role.COORDINATOR, name).write(tmp_path)
    async with Upstream("vllm") as upstream:
        runners = [engine_at(upstream, Outside)]
        async with InProcessMesh(runners=runners, certificates=certificates, coordinators=0) as mesh:
            settings = {
                "name": name,
                "listen": "127.0.0.1:0",
                "registries": [f"registry-1@{mesh.registries[0].address}"],
            }
            costs = {"file": str(tmp_path / "costs.db"), "prices": PRICES, "daily_budget_usd": 1.0}
            started = configured(tmp_path, TRUST_DOMAIN, coordinator=settings, costs=costs)

            def client_of(serving: dict[str, Any]) -> MeshClient:
                identity = certificates.identity(Role.CLIENT, "ann")
                return MeshClient([Endpoint.parse(f"{name}@{serving['address']}")], identity=identity, timeout_s=30.0)

            async with child(COORDINATOR, started) as process:
                client = client_of(await process.event("service.ready"))
                assert (await client.complete(paid())).usage.cost_micro_usd == COST
                # Told only once it is written.
                assert (await client.costs()).total.spent == COST
                upstream.pause_after = 2
                with pytest.raises(ChorusError):
                    await killed_in_the_middle(client, process)
                await client.aclose()
                assert await process.ended() == -signal.SIGKILL
            upstream.pause_after = None
            upstream.go_on.set()
            async with child(COORDINATOR, started) as process:
                client = client_of(await process.event("service.ready"))
                seen = await client.costs(latest=5)
                await client.aclose()
                assert [one.spent for one in seen.latest] == [COST], "what was under way is no request that ended"
                assert seen.total.spent == COST + RESERVED, "and counts as if it had cost what was reserved"
                (budget,) = seen.budgets
                assert (budget.spent, budget.reserved) == (COST + RESERVED, 0)


async def killed_in_the_middle(client: MeshClient, process: Child) -> None:
    """Asks a provider, and kills the coordinator at the first token."""
    async with client.generate(paid()) as events:
        async for event in events:
            if isinstance(event, TokenDelta):
                process.signal(signal.SIGKILL)
            assert not isinstance(event, Finished)
