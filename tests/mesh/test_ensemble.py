"""Ensembles from end to end: members stream beside each other, then the answer, the verdict, and the end."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.api.coordinator.v1 import coordinator_pb2_grpc, ensemble_pb2
from chorus.api.inference.v1 import generation_pb2
from chorus.client import (
    EnsembleEvent,
    EnsembleRestarted,
    MemberEvent,
    MemberSpec,
    SeenEvent,
    StartedAt,
    SyncMeshClient,
    Verdict,
    ensemble_spec,
)
from chorus.config import ChorusConfig
from chorus.coordinator import ensembles
from chorus.core.ensemble import machine
from chorus.core.ensemble.records import Complexity, EnsembleSpec, MemberState, Strategy
from chorus.core.errors import InvalidRequestError, UnknownModelError
from chorus.core.events import Event, EventFilter, EventKind, Outcome, RequestFinished
from chorus.core.generation import Finished, TokenDelta
from chorus.core.identity import Role
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FakeEngine, FakeModel, fake_artifact
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace
from chorus.transport import open_channel
from tests.mesh.test_coordinator_lost_process import slots_used

ASKED = "echo:Paris"


def engine(*families: str, pace: ManualPace | None = None, slots: int = 8) -> FakeEngine:
    models = [FakeModel(fake_artifact(f"{family}.Q8_0.gguf", family=family), answer_tokens=6) for family in families]
    return FakeEngine(models, pace=pace, slots=slots)


async def told(mesh: InProcessMesh, spec: EnsembleSpec, asked: str = ASKED) -> list[EnsembleEvent]:
    async with mesh.client().ensemble(asked, spec) as events:
        return [event async for event in events]


def verdict_of(events: list[EnsembleEvent]) -> Verdict:
    (verdict,) = [event for event in events if isinstance(event, Verdict)]
    return verdict


def text_of(events: list[EnsembleEvent], member_id: str = "") -> str:
    own = [
        event.event if isinstance(event, MemberEvent) else event
        for event in events
        if (event.member_id if isinstance(event, MemberEvent) else "") == member_id
    ]
    return "".join(event.text for event in own if isinstance(event, TokenDelta))


@pytest.mark.parametrize("strategy", ["vote", "refine"])
async def test_long_answers_are_compared_beside_the_event_loop(
    certificates: MeshCertificates, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    threads = set[int]()
    compare = machine.judged

    def noted(*what: Any, **how: Any) -> Verdict:
        threads.add(threading.get_ident())
        return compare(*what, **how)

    monkeypatch.setattr(machine, "judged", noted)
    async with InProcessMesh(runners=[engine("one", "two")], certificates=certificates) as mesh:
        spec = ensemble_spec(strategy, ("one", "two"))
        events = await told(mesh, spec)
        assert verdict_of(events)
        assert threads == {threading.get_ident()}
        threads.clear()
        monkeypatch.setattr(ensembles, "_LONG_CHARACTERS", len("Paris") * 2)
        again = await told(mesh, spec)
        assert (text_of(again), verdict_of(again).agreement) == (text_of(events), verdict_of(events).agreement)
        assert threads
        assert threading.get_ident() not in threads


async def test_a_vote_is_streamed_and_judged(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=[engine("one", "two"), engine("one", "three")], certificates=certificates) as mesh:
        members = ("one*2", "two", MemberSpec("three", member_id="other", instructions="Say something else."))
        spec = ensemble_spec("vote", members, quorum=4)
        events = await told(mesh, spec)
        names = ["one-1", "one-2", "two", "other"]
        for name in names:
            own = [event.event for event in events if isinstance(event, MemberEvent) and event.member_id == name]
            assert isinstance(own[0], StartedAt)
            assert isinstance(own[-1], Finished)
            assert text_of(events, name) == "Paris"
        whose = [index for index, event in enumerate(events) if isinstance(event, MemberEvent)]
        assert whose == list(range(len(whose))), "the answer comes after the members"
        started, delta, verdict, finished = events[len(whose) :]
        assert isinstance(started, StartedAt)
        assert isinstance(delta, TokenDelta)
        assert (delta.text, delta.index, len(delta.token_ids)) == ("Paris", 0, 6), "with its end"
        assert not delta.logprobs, "the caller asked for none"
        assert isinstance(verdict, Verdict)
        assert isinstance(finished, Finished)
        assert (verdict.strategy, verdict.agreement, verdict.coherence) == (Strategy.VOTE, 1.0, 1.0)
        assert [(outcome.member_id, outcome.model, outcome.state) for outcome in verdict.members] == [
            ("one-1", "one", MemberState.ANSWERED),
            ("one-2", "one", MemberState.ANSWERED),
            ("two", "two", MemberState.ANSWERED),
            ("other", "three", MemberState.ANSWERED),
        ]
        assert {outcome.node_id for outcome in verdict.members} <= {"node-of-runner-1", "node-of-runner-2"}
        assert verdict.members[3].agrees_with == ("one-1", "one-2", "two")
        (confidence,) = {outcome.confidence for outcome in verdict.members}  # the engine scores all alike
        assert 0 < confidence < 0.5, "tokens that are as likely as not, several of them"

        # It is one request, whose tries its members are.
        kinds = frozenset({EventKind.REQUEST_ADMITTED, EventKind.REQUEST_FINISHED})
        watch = mesh.client().watch_events(EventFilter(kinds=kinds), since_s=60.0)
        ended: list[Event] = []
        async for news in watch:
            if isinstance(news, SeenEvent):
                ended.append(news.event)
            if len(ended) == 2:
                break
        await watch.aclose()
        detail = ended[1].detail
        assert isinstance(detail, RequestFinished)
        assert (detail.outcome, detail.attempts, detail.output_tokens) == (Outcome.COMPLETED, 4, 24)


async def test_members_stream_beside_each_other(certificates: MeshCertificates) -> None:
    paces = [ManualPace(), ManualPace()]
    engines = [engine(name, pace=pace) for name, pace in zip(("one", "two"), paces, strict=True)]
    async with InProcessMesh(runners=engines, certificates=certificates) as mesh:
        generation = mesh.client().ensemble(ASKED, ensemble_spec("vote", ("one", "two")))
        order: list[str] = []
        async with generation as events:
            for pace, name in ((paces[0], "one"), (paces[1], "two"), (paces[0], "one"), (paces[1], "two")):
                pace.release()
                async for event in events:
                    if isinstance(event, MemberEvent) and isinstance(event.event, TokenDelta):
                        order.append(event.member_id)
                        break
                assert order[-1] == name
            for pace in paces:
                pace.release_all()
            rest = [event async for event in events]
        assert verdict_of(rest).count(MemberState.ANSWERED) == 2


async def test_a_settled_vote_ends_and_frees_the_slots_of_who_cannot_change_it(certificates: MeshCertificates) -> None:
    stuck = engine("stuck", pace=ManualPace())
    async with InProcessMesh(runners=[engine("one", "two"), stuck], certificates=certificates) as mesh:
        events = await told(mesh, ensemble_spec("vote", ("stuck", "one", "two")))
        verdict = verdict_of(events)
        assert {outcome.member_id: outcome.state for outcome in verdict.members} == {
            "stuck": MemberState.UNNEEDED,
            "one": MemberState.ANSWERED,
            "two": MemberState.ANSWERED,
        }
        assert (verdict.asked, verdict.agreement, text_of(events)) == (3, 1.0, "Paris")
        await mesh.until(lambda directory: slots_used(directory, "runner-2") == 0)


async def test_a_race_frees_the_slots_of_who_is_slower(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engines = [engine("quick", pace=pace), engine("slow", pace=ManualPace())]
    async with InProcessMesh(runners=engines, certificates=certificates) as mesh:
        racing = asyncio.ensure_future(told(mesh, ensemble_spec("race", ("slow", "quick"))))
        await mesh.until(lambda directory: slots_used(directory, "runner-2") == 1)
        pace.release_all()
        events = await racing
        verdict = verdict_of(events)
        assert verdict.answered_by == "quick"
        assert verdict.count(MemberState.UNNEEDED) == 1
        assert text_of(events) == "Paris"
        await mesh.until(lambda directory: slots_used(directory, "runner-2") == 0)


async def test_routing_streams_the_answer_itself_and_goes_to_the_next_model(certificates: MeshCertificates) -> None:
    broken = engine("one")
    broken.fail_next(times=10)
    async with InProcessMesh(runners=[broken, engine("two")], certificates=certificates) as mesh:
        events = await told(mesh, ensemble_spec("route", ("one", "two")))
        assert not any(isinstance(event, MemberEvent) for event in events)
        assert len([event for event in events if isinstance(event, TokenDelta)]) > 1, "as it is decoded"
        verdict = verdict_of(events)
        assert [(outcome.state, outcome.reason) for outcome in verdict.members] == [
            (MemberState.FAILED, "ENGINE_FAILED"),
            (MemberState.ANSWERED, ""),
        ]


async def test_a_composed_text_streams_after_drafts_and_reviews(certificates: MeshCertificates) -> None:
    members = (MemberSpec("one", instructions="Say yes."), MemberSpec("two", instructions="Say no."))
    async with InProcessMesh(runners=[engine("one", "two")], certificates=certificates) as mesh:
        for strategy, sides in (("refine", set()), ("council", {"+review-one", "+review-two"}), ("facets", set())):
            events = await told(mesh, ensemble_spec(strategy, members, aggregator_model="two"), "which?")
            assert {event.member_id for event in events if isinstance(event, MemberEvent)} == {"one", "two"} | sides
            answer = [event for event in events if not isinstance(event, MemberEvent)]
            assert isinstance(answer[0], StartedAt)
            assert answer[0].started.model == "two"
            assert len([event for event in answer if isinstance(event, TokenDelta)]) == 7, "as it is decoded"
            assert isinstance(answer[-2], Verdict)
            assert isinstance(answer[-1], Finished)
            assert (answer[-2].strategy, answer[-2].answered_by) == (Strategy(strategy), "")


async def test_a_client_that_wants_text_gets_the_final_text_alone(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=[engine("one", "two")], certificates=certificates) as mesh:
        completion = await mesh.client().complete(ASKED, ensemble=ensemble_spec("vote", ("one*3", "two")))
        assert completion.text == "Paris"
        whole = await mesh.client().ensemble(ASKED, ensemble_spec("vote", complexity=Complexity.SIMPLE)).completion()
        assert whole.text == "Paris"
        assert whole.verdict is not None
        assert (whole.verdict.complexity, whole.verdict.asked) == (Complexity.SIMPLE, 3)


async def test_the_deadline_and_the_quorum_leave_the_others(certificates: MeshCertificates) -> None:
    hanging = engine("two")
    async with InProcessMesh(runners=[engine("one"), hanging], certificates=certificates) as mesh:
        for more in ({"deadline_s": 0.5}, {"quorum": 1}):
            hanging.hang_next(before=1)
            verdict = verdict_of(await told(mesh, ensemble_spec("vote", ("one", "two"), **more)))
            assert [outcome.state for outcome in verdict.members] == [MemberState.ANSWERED, MemberState.LATE]


async def test_a_stuck_model_that_composes_is_left_for_the_drafts(certificates: MeshCertificates) -> None:
    composes = engine("great")
    async with InProcessMesh(runners=[engine("one", "two"), composes], certificates=certificates) as mesh:
        for strategy in ("refine", "council"):
            composes.hang_next(before=0)
            spec = ensemble_spec(strategy, ("one", "two"), aggregator_model="great", deadline_s=1.0)
            events = await told(mesh, spec)
            assert text_of(events) == "Paris"
            assert verdict_of(events).answered_by in {"one", "two"}
        await mesh.until(lambda directory: slots_used(directory, "runner-2") == 0)


async def test_blank_answers_are_given_where_there_are_no_others(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=[engine("one", "two")], certificates=certificates) as mesh:
        for strategy in ("route", "vote"):
            events = await told(mesh, ensemble_spec(strategy, ("one", "two")), "echo:  ")
            assert text_of(events) == "  "
            assert isinstance(events[-1], Finished)
            verdict = verdict_of(events)
            assert [outcome.state for outcome in verdict.members] == [MemberState.ANSWERED] * 2
            assert verdict.confidence == 0.0


async def test_a_member_that_fails_is_told_and_the_others_go_on(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=[engine("one")], certificates=certificates) as mesh:
        verdict = verdict_of(await told(mesh, ensemble_spec("vote", ("one", "nobody-has-it"))))
        assert [(outcome.state, outcome.reason) for outcome in verdict.members] == [
            (MemberState.ANSWERED, ""),
            (MemberState.FAILED, "UNKNOWN_MODEL"),
        ]
        with pytest.raises(UnknownModelError):
            await told(mesh, ensemble_spec("vote", ("nobody-has-it",)))


async def test_who_goes_away_frees_every_members_slot(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[engine("one", pace=pace)], certificates=certificates) as mesh:
        reading = asyncio.ensure_future(told(mesh, ensemble_spec("vote", ("one*3",))))
        await mesh.until(lambda directory: slots_used(directory, "runner-1") == 3)
        reading.cancel()
        await asyncio.wait({reading})
        await mesh.until(lambda directory: slots_used(directory, "runner-1") == 0)
        assert mesh.coordinators[0]._admission.running == 0


async def test_what_makes_no_sense_is_refused_with_its_field(certificates: MeshCertificates) -> None:
    same = (MemberSpec("one", member_id="a"), MemberSpec("one", member_id="a"))
    async with InProcessMesh(runners=[engine("one")], certificates=certificates) as mesh:
        for spec, field in (
            (ensemble_spec("vote", same), "ensemble.members[1].member_id"),
            (ensemble_spec("vote", ("one*33",)), "ensemble.members"),
            (ensemble_spec("vote", ("one",), confidence_threshold=1.5), "ensemble.confidence_threshold"),
            (ensemble_spec("vote", ("one",), deadline_s=0.0), "ensemble.deadline"),
            (ensemble_spec("vote", ("one",), round_count=5), "ensemble.round_count"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                await told(mesh, spec)
            assert caught.value.metadata["field"] == field


async def test_every_event_is_attributed_on_the_wire(certificates: MeshCertificates) -> None:
    async with InProcessMesh(runners=[engine("one", "two")], certificates=certificates) as mesh:
        request = pb.GenerateRequest(
            spec=generation_pb2.GenerationSpec(prompt=ASKED, logprobs=0),
            ensemble=ensemble_pb2.EnsembleSpec(
                strategy=ensemble_pb2.STRATEGY_VOTE,
                members=[ensemble_pb2.Member(model="one"), ensemble_pb2.Member(model="two")],
            ),
        )
        address = mesh.coordinators[0].address
        me, server = certificates.identity(Role.CLIENT, "kim"), certificates.id(Role.COORDINATOR, "coordinator-1")
        async with open_channel(address, identity=me, server=server) as channel:
            stub = coordinator_pb2_grpc.CoordinatorStub(channel)
            responses = [response async for response in stub.Generate(request)]
            assert {response.member_id for response in responses} == {"one", "two", ""}
            answer = [response for response in responses if not response.member_id]
            assert [response.event.WhichOneof("event") or "verdict" for response in answer] == [
                "started",
                "delta",
                "verdict",
                "finished",
            ]
            assert len(answer[1].event.delta.logprobs) == 6, "they were asked for"
            request.ensemble.strategy = 77  # type: ignore[assignment]
            with pytest.raises(grpc.aio.AioRpcError, match="it has route"):
                await anext(aiter(stub.Generate(request)))


async def test_a_lost_coordinator_is_replaced_until_the_answer_has_begun(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[engine("one", pace=pace)], coordinators=2, certificates=certificates) as mesh:
        client = mesh.client()
        async with client.ensemble(ASKED, ensemble_spec("vote", ("one*2",))) as events:
            pace.release(2)
            first = await anext(events)
            assert isinstance(first, MemberEvent)
            busy = [service._admission.running for service in mesh.coordinators].index(2)
            await mesh.kill_coordinator(busy)
            pace.release_all()
            rest = [event async for event in events]
        assert any(isinstance(event, EnsembleRestarted) for event in rest)
        assert text_of(rest) == "Paris"
        assert verdict_of(rest).count(MemberState.ANSWERED) == 2


async def test_the_rest_of_one_models_answer_can_be_had_elsewhere(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with InProcessMesh(runners=[engine("one", pace=pace)], coordinators=2, certificates=certificates) as mesh:
        async with mesh.client().ensemble(ASKED, ensemble_spec("route", ("one",))) as events:
            pace.release(2)
            seen = [await anext(events), await anext(events)]
            busy = [service._admission.running for service in mesh.coordinators].index(1)
            await mesh.kill_coordinator(busy)
            pace.release_all()
            seen += [event async for event in events]
        assert text_of(seen) == "Paris"
        assert not any(isinstance(event, Verdict) for event in seen), "whoever knew it is lost"


def test_without_an_event_loop(tmp_path: Path, certificates: MeshCertificates) -> None:
    async def run() -> None:
        async with InProcessMesh(runners=[engine("one")], certificates=certificates) as mesh:
            await asyncio.to_thread(_ask_plainly, mesh.client_config(tmp_path))

    asyncio.run(run())


def _ask_plainly(config: ChorusConfig) -> None:
    with SyncMeshClient(config) as client:
        whole = client.ensemble(ASKED, ensemble_spec("vote", ("one*2",))).completion()
        assert whole.text == "Paris"
        with client.ensemble(ASKED, ensemble_spec("race", ("one*2",))) as events:
            assert next(event for event in events if isinstance(event, Verdict)).strategy is Strategy.RACE
        assert client.complete(ASKED, ensemble=ensemble_spec("vote", ("one",))).text == "Paris"
