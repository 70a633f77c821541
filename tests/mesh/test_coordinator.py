"""Requests through a coordinator, over real TLS: placed, retried before the first token, refused, ended."""

from __future__ import annotations

import asyncio

import pytest

from chorus.client import StartedAt
from chorus.core.errors import (
    CancelledError,
    ChorusError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    NoCapableRunnerError,
    OverloadedError,
    PromptTooLongError,
    RunnersUnavailableError,
    UnavailableError,
    UnknownModelError,
    UnsupportedFeatureError,
)
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import Feature, ModelState, RunnerState
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Finished,
    GenerationRequest,
    Progress,
    Queued,
    Requirements,
    RerankRequest,
    TextPrompt,
    TokenDelta,
    TokenPrompt,
)
from chorus.testing.certificates import MeshCertificates
from chorus.testing.engine_fake import FAKE_FEATURES, FakeEngine, FakeModel, fake_artifact
from chorus.testing.mesh import InProcessMesh
from chorus.testing.pace import ManualPace


def mesh_of(certificates: MeshCertificates, *engines: FakeEngine, **options: object) -> InProcessMesh:
    return InProcessMesh(runners=engines or (FakeEngine(),), certificates=certificates, **options)  # type: ignore[arg-type]


def raw(text: str = "echo:hello", **fields: object) -> GenerationRequest:
    return GenerationRequest(model="", prompt=TextPrompt(text), **fields)  # type: ignore[arg-type]


def on(index: int) -> Requirements:
    return Requirements(runner_ids=(f"runner-{index}",))


def slots_used(engine: FakeEngine) -> int:
    return sum(load.slots_used for load in engine.load_report())


def reported_slots(directory: Directory) -> int:
    """Slots in use at the first runner, as its last heartbeat said."""
    entry = directory.get("runner-1")
    return sum(load.slots_used for load in entry.record.load.models) if entry is not None else -1


async def failure(mesh: InProcessMesh, request: GenerationRequest) -> ChorusError:
    with pytest.raises(ChorusError) as caught:
        await mesh.client().complete(request)
    return caught.value


# --- answers --------------------------------------------------------------------------------------------------------


async def test_an_answer_comes_whole_and_says_who_gave_it(certificates: MeshCertificates) -> None:
    async with mesh_of(certificates, FakeEngine(), FakeEngine()) as mesh:
        answer = await mesh.client().complete(raw("echo:grüße", requirements=on(2)))
        assert answer.text == "grüße"
        assert (answer.runner_id, answer.node_id, answer.attempts) == ("runner-2", "node-of-runner-2", 1)
        assert (answer.model, answer.artifact) == ("fake-1b", fake_artifact().name)
        assert answer.usage.completion_tokens == len(answer.choices[0].token_ids)
        assert answer.request_id
        assert answer.time_to_first_token_s is not None


async def test_events_come_in_their_order(certificates: MeshCertificates) -> None:
    async with mesh_of(certificates) as mesh:
        events = [event async for event in mesh.client().generate(raw("hi", prompt_logprobs=0, choice_count=2))]
        kinds = [type(event).__name__ for event in events]
        assert kinds[:2] == ["StartedAt", "PromptScored"]
        assert set(kinds[2:-1]) == {"TokenDelta"}
        assert isinstance(events[-1], Finished)
        for choice in range(2):
            deltas = [event for event in events if isinstance(event, TokenDelta) and event.choice == choice]
            assert [delta.index for delta in deltas] == list(range(len(deltas)))


async def test_progress_and_the_queue_are_seen_while_they_last(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    cold = FakeEngine([FakeModel(loaded=False)], slots=1, pace=pace)
    async with mesh_of(certificates, cold) as mesh:
        client = mesh.client()
        async with client.generate(raw()) as first, client.generate(raw()) as second:
            assert isinstance(await anext(first), Progress)
            pace.release()
            while not isinstance(await anext(first), TokenDelta):
                pass
            assert await anext(second) == Queued(0, None) or isinstance(await anext(second), Progress | Queued)
            pace.release_all()
            assert [event async for event in first]
            assert isinstance([event async for event in second][-1], Finished)


# --- another runner, before the first token ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineError("crashed"), EngineError),
        (UnavailableError("gone"), UnavailableError),
        (OverloadedError("full", retry_after_s=1.0), OverloadedError),
        # What a caller would hear of an out-of-date directory is that nobody can be asked.
        (UnknownModelError("unloaded a moment ago"), RunnersUnavailableError),
    ],
    ids=lambda value: getattr(value, "reason", ""),
)
async def test_a_failed_attempt_is_made_up_for_by_another_runner(
    certificates: MeshCertificates, error: ChorusError, told: type[ChorusError]
) -> None:
    engines = FakeEngine(), FakeEngine()
    async with mesh_of(certificates, *engines) as mesh:
        client = mesh.client()
        for engine in engines:
            engine.fail_next(error=error)
            answer = await client.complete(raw("echo:whole"))
            assert answer.text == "whole"
            engine.faults.clear()
        engines[0].fail_next(error=error)
        engines[1].fail_next(error=error)
        with pytest.raises(told) as caught:
            await client.complete(raw())
        assert caught.value.metadata["attempts"] == "2"
        assert caught.value.metadata["runner_id"] in ("runner-1", "runner-2")


async def test_what_an_attempt_said_before_it_failed_is_not_said_twice(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    async with mesh_of(certificates, *engines) as mesh:
        # Each fails once after its Started event, instead of its first token.
        engines[0].fail_next(before=0)
        engines[1].fail_next(before=0)
        with pytest.raises(EngineError):
            await mesh.client().complete(raw())
        engines[0].fail_next(before=0)
        events = [event async for event in mesh.client().generate(raw(requirements=Requirements()))]
        again = [event async for event in mesh.client().generate(raw())]
        for stream in (events, again):
            assert sum(isinstance(event, StartedAt) for event in stream) == 1
        attempts = [event.origin.attempt for event in (*events, *again) if isinstance(event, StartedAt)]
        assert sorted(attempts) in ([1, 1], [1, 2])


async def test_a_retry_is_bounded_by_max_attempts(certificates: MeshCertificates) -> None:
    engines = [FakeEngine() for _ in range(3)]
    async with mesh_of(certificates, *engines, coordinator={"max_attempts": 2}) as mesh:
        for engine in engines:
            engine.fail_next(times=5)
        error = await failure(mesh, raw())
        assert isinstance(error, EngineError)
        assert error.metadata["attempts"] == "2"
        assert sum(len(engine.faults) for engine in engines) == 13


async def test_the_requests_own_fault_is_told_at_once(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine()
    async with mesh_of(certificates, *engines) as mesh:
        for engine in engines:
            engine.fail_next(error=InvalidRequestError("grammar", "does not parse"))
        error = await failure(mesh, raw())
        assert isinstance(error, InvalidRequestError)
        assert error.metadata["field"] == "grammar"
        assert error.metadata["attempts"] == "1"


async def test_a_prompt_too_long_for_one_goes_to_a_longer_context(certificates: MeshCertificates) -> None:
    short = FakeEngine([FakeModel(context_length=64)])
    long = FakeEngine([FakeModel(context_length=400)], slots=1)
    async with mesh_of(certificates, short, long) as mesh:
        client = mesh.client()
        text = "x" * 100 + "\necho:fits"  # 111 tokens; by its length alone it might fit into 64
        for _ in range(4):
            answer = await client.complete(raw(text))
            assert (answer.runner_id, answer.text) == ("runner-2", "fits")
        with pytest.raises(PromptTooLongError) as caught:
            await client.complete(raw("x" * 500))
        assert caught.value.prompt_tokens == 501
        assert caught.value.context_length == 400
        exact = GenerationRequest(model="", prompt=TokenPrompt((65,) * 450))
        assert isinstance(await failure(mesh, exact), PromptTooLongError)


# --- refusals -------------------------------------------------------------------------------------------------------


async def test_refusals_say_what_there_is(certificates: MeshCertificates) -> None:
    named = FakeModel(fake_artifact("other.gguf", family="other"))
    async with mesh_of(certificates, FakeEngine([FakeModel(), named])) as mesh:
        client = mesh.client()
        with pytest.raises(UnknownModelError, match="fake-1b, other") as unknown:
            await client.complete("hi", model="gpt-9")
        assert unknown.value.metadata["available"] == "fake-1b,other"
        with pytest.raises(UnsupportedFeatureError, match="json_schema"):
            await client.complete(raw(constraint=Constraint(ConstraintKind.JSON_SCHEMA, "{}")))
        with pytest.raises(NoCapableRunnerError, match="attic"):
            await client.complete(raw(requirements=Requirements(labels={"room": "attic"})))
        with pytest.raises(RunnersUnavailableError, match="runner-7"):
            await client.complete(raw(requirements=on(7)))
        with pytest.raises(InvalidRequestError, match="choice_count"):
            await client.complete(raw(choice_count=1000))


async def test_models_are_told_apart_by_name(certificates: MeshCertificates) -> None:
    models = [FakeModel(fake_artifact(f"{name}.gguf", family=name)) for name in ("alpha", "beta")]
    async with mesh_of(certificates, *(FakeEngine([model]) for model in models)) as mesh:
        client = mesh.client()
        for family, runner_id in (("alpha", "runner-1"), ("beta", "runner-2"), ("beta.gguf", "runner-2")):
            answer = await client.complete("hi", model=family)
            assert answer.runner_id == runner_id


async def test_a_full_coordinator_refuses_with_a_time_to_wait(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace), coordinator={"max_requests": 1, "max_queued": 0}) as mesh:
        async with mesh.client().generate(raw()) as running:
            pace.release()
            while not isinstance(await anext(running), TokenDelta):
                pass
            error = await failure(mesh, raw())
            assert isinstance(error, OverloadedError)
            assert error.retry_after_s is not None
            pace.release_all()
            assert isinstance([event async for event in running][-1], Finished)
        assert (await mesh.client().complete(raw())).text == "hello"


async def test_full_runners_are_overload(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(slots=1, max_queue=0, pace=pace)
    async with mesh_of(certificates, engine) as mesh, mesh.client().generate(raw()) as running:
        pace.release()
        while not isinstance(await anext(running), TokenDelta):
            pass
        assert isinstance(await failure(mesh, raw()), OverloadedError)


# --- ends -----------------------------------------------------------------------------------------------------------


async def test_a_caller_who_goes_away_frees_the_slot(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(slots=1, pace=pace)
    async with mesh_of(certificates, engine) as mesh:
        client = mesh.client()
        for _ in range(2):
            async with client.generate(raw()) as generation:
                pace.release()
                while not isinstance(await anext(generation), TokenDelta):
                    pass
                await mesh.until(lambda directory: reported_slots(directory) == 1)
            await mesh.until(lambda directory: reported_slots(directory) == 0)
            assert slots_used(engine) == 0
        pace.release_all()
        assert (await client.complete(raw())).text == "hello"


async def test_a_callers_task_may_be_cancelled(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(slots=1, pace=pace)
    async with mesh_of(certificates, engine) as mesh:
        client = mesh.client()
        asking = asyncio.create_task(client.complete(raw()))
        await pace.waiting(1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        pace.release_all()
        assert (await client.complete(raw())).text == "hello"


async def test_a_deadline_is_kept_and_frees_the_slot(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    engine = FakeEngine(slots=1, pace=pace)
    async with mesh_of(certificates, engine) as mesh:
        client = mesh.client()
        with pytest.raises(DeadlineExceededError):
            await client.complete(raw(), timeout_s=0.3)
        pace.release_all()
        assert (await client.complete(raw())).text == "hello"


async def test_a_hung_runner_does_not_hold_a_deadline(certificates: MeshCertificates) -> None:
    engine = FakeEngine()
    async with mesh_of(certificates, engine) as mesh:
        engine.hang_next(before=1)
        with pytest.raises((DeadlineExceededError, CancelledError)):
            await mesh.client().complete(raw(), timeout_s=0.3)


# --- other questions ------------------------------------------------------------------------------------------------


async def test_embeddings_and_counts_are_placed_too(certificates: MeshCertificates) -> None:
    without = FakeModel(features=FAKE_FEATURES - {Feature.EMBED, Feature.TOKENIZE})
    async with mesh_of(certificates, FakeEngine([without]), FakeEngine()) as mesh:
        client = mesh.client()
        answer = await client.embed(["one", "two", "one"])
        assert answer.runner_id == "runner-2"
        assert answer.embeddings[0] == answer.embeddings[2] != answer.embeddings[1]
        counted = await client.count_tokens(raw("four"))
        assert (counted.token_count, counted.context_length, counted.model) == (5, 4096, "fake-1b")
        with pytest.raises(UnknownModelError, match="fake-1b"):
            await client.embed("one", model="nothing")


async def test_documents_are_ranked_by_a_runner_that_can(certificates: MeshCertificates) -> None:
    without = FakeModel(features=FAKE_FEATURES - {Feature.RERANK})
    async with mesh_of(certificates, FakeEngine([without]), FakeEngine()) as mesh:
        client = mesh.client()
        documents = ["nothing of it", "a red fox", "a red brick"]
        answer = await client.rerank("red fox", documents)
        assert (answer.runner_id, answer.model) == ("runner-2", "fake-1b")
        assert [ranked.index for ranked in answer.documents] == [1, 2, 0]
        assert answer.documents[0].score == 1.0
        assert answer.token_count > 0
        request = RerankRequest("", "red fox", tuple(documents))
        (best,) = (await client.rerank(request, top_n=1)).documents
        assert best == answer.documents[0]
        with pytest.raises(InvalidRequestError, match="query"):
            await client.rerank("", documents)


async def test_a_unary_request_is_tried_on_another_runner(certificates: MeshCertificates) -> None:
    async with mesh_of(certificates, FakeEngine(), FakeEngine()) as mesh:
        # It stops answering, and nobody has told the coordinator yet.
        await mesh.runners[0]._engine.stop()
        for _ in range(4):
            assert (await mesh.client().embed("text")).runner_id == "runner-2"


async def test_models_are_listed_by_artifact(certificates: MeshCertificates) -> None:
    rare = FakeModel(fake_artifact("rare.gguf", family="rare"), loaded=False)
    async with mesh_of(certificates, FakeEngine(), FakeEngine([FakeModel(), rare])) as mesh:
        listed = await mesh.client().list_models()
        assert listed.default_model == "fake-1b"
        places = {model.artifact.name: [place.runner_id for place in model.places] for model in listed.models}
        assert places == {fake_artifact().name: ["runner-1", "runner-2"], "rare.gguf": ["runner-2"]}
        assert listed.models[1].places[0].status.state is ModelState.AVAILABLE


async def test_a_configured_default_model_answers(certificates: MeshCertificates) -> None:
    models = [FakeModel(fake_artifact(f"{name}.gguf", family=name)) for name in ("alpha", "beta")]
    async with mesh_of(certificates, FakeEngine(models), coordinator={"default_model": "beta"}) as mesh:
        client = mesh.client()
        assert (await client.complete("hi")).model == "beta"
        assert (await client.list_models()).default_model == "beta"


async def test_a_placement_is_explained_without_being_made(certificates: MeshCertificates) -> None:
    engines = FakeEngine(), FakeEngine([FakeModel(context_length=100)])
    async with mesh_of(certificates, *engines) as mesh:
        client = mesh.client()
        explained = await client.explain_placement(raw(requirements=Requirements(context_length=2000)))
        assert explained.chosen_runner_id == "runner-1"
        (candidate,) = explained.candidates
        assert candidate.cost == pytest.approx(sum(candidate.terms.values()))
        (rejected,) = explained.rejected
        assert (rejected.runner_id, rejected.reason) == ("runner-2", "context")
        assert "100 tokens" in rejected.detail
        nobody = await client.explain_placement("hi", model="nothing")
        assert (nobody.chosen_runner_id, nobody.error_reason) == ("", "UNKNOWN_MODEL")
        assert "fake-1b" in nobody.error_message
        assert [used for engine in engines for used in [slots_used(engine)]] == [0, 0]


async def test_a_draining_runner_gets_nothing_new_and_finishes_what_it_has(certificates: MeshCertificates) -> None:
    pace = ManualPace()
    async with mesh_of(certificates, FakeEngine(pace=pace), FakeEngine()) as mesh:
        client = mesh.client()
        async with client.generate(raw("echo:steady", requirements=on(1))) as running:
            pace.release()
            while not isinstance(await anext(running), TokenDelta):
                pass
            stopping = asyncio.create_task(mesh.runners[0].stop(10.0))
            await mesh.until(
                lambda directory: (
                    (entry := directory.get("runner-1")) is None or entry.record.state is RunnerState.DRAINING
                )
            )
            assert (await client.complete(raw())).runner_id == "runner-2"
            assert isinstance(await failure(mesh, raw(requirements=on(1))), RunnersUnavailableError)
            pace.release_all()
            rest = [event async for event in running]
            assert isinstance(rest[-1], Finished)
            await stopping
