"""What a request needs, and the model that stands in where it names none."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from chorus.core.fleet.records import Feature, ModelState, RunnerState, Tier
from chorus.core.generation import (
    Constraint,
    ConstraintKind,
    Conversation,
    DeliveredChoice,
    EmbeddingRequest,
    GenerationRequest,
    ImagePart,
    Message,
    MessageRole,
    Requirements,
    RerankRequest,
    StopConditions,
    TextPart,
    TextPrompt,
    TokenPrompt,
)
from chorus.core.placement import Needs, Roster, Work, default_model
from tests.core import placement_fleet as fleet
from tests.wire import strategies


def chat(text: str) -> Conversation:
    return Conversation((Message(MessageRole.USER, (TextPart(text), ImagePart(b"x" * 10_000, "image/png"))),))


def test_token_ids_are_counted_exactly_with_one_more_to_come() -> None:
    needs = Needs.of_generation(GenerationRequest("m", TokenPrompt((1,) * 100)))
    assert (needs.context_length, needs.prompt_tokens, needs.prompt_is_counted) == (101, 100, True)
    assert needs.features == {Feature.TOKEN_INPUT}


def test_text_is_never_counted_for_more_than_it_can_be() -> None:
    for prompt in (TextPrompt(" " * 12_800), chat(" " * 12_800)):
        needs = Needs.of_generation(GenerationRequest("m", prompt))
        assert (needs.context_length, needs.prompt_is_counted) == (101, False)
        assert needs.likely_context_length == 3201


def test_what_is_asked_for_and_what_was_delivered_take_context_too() -> None:
    request = GenerationRequest(
        "m",
        TokenPrompt((1,) * 10),
        stop=StopConditions(max_tokens=500),
        choice_count=2,
        resume=(DeliveredChoice(0, (1,) * 3), DeliveredChoice(1, (1,) * 7)),
    )
    needs = Needs.of_generation(request)
    assert (needs.context_length, needs.likely_context_length) == (18, 518)


def test_a_required_context_counts_where_it_is_greater() -> None:
    request = GenerationRequest("m", TextPrompt("hi"), requirements=Requirements(context_length=9000))
    assert Needs.of_generation(request).context_length == 9000


def test_counting_tokens_needs_the_template_and_no_context() -> None:
    request = GenerationRequest(
        "m",
        chat("x" * 100_000),
        constraint=Constraint(ConstraintKind.JSON_SCHEMA, "{}"),
        logprobs=3,
        requirements=Requirements(context_length=9000, node_ids=("n",)),
    )
    needs = Needs.of_token_count(request)
    assert needs.features == {Feature.CHAT, Feature.IMAGES, Feature.TOKENIZE}
    assert (needs.context_length, needs.node_ids) == (0, frozenset({"n"}))


def test_a_text_that_may_be_cut_needs_no_context() -> None:
    long = EmbeddingRequest("m", ("x" * 1280, (1, 2, 3)))
    assert Needs.of_embedding(long).context_length == 10
    pairs = RerankRequest("m", "q" * 256, ("x" * 1280, "x"))
    assert Needs.of_rerank(pairs).context_length == 12
    assert Needs.of_rerank(replace(pairs, truncate="end")).context_length == 2
    cut = EmbeddingRequest("m", ("x" * 1280,), truncate="end")
    assert Needs.of_embedding(cut).context_length == 0


def test_a_paid_provider_is_asked_only_by_name_or_with_leave() -> None:
    named = GenerationRequest("gpt", TextPrompt("hi"))
    unnamed = GenerationRequest("", TextPrompt("hi"))
    assert Needs.of_generation(named).allow_external
    assert not Needs.of_generation(unnamed).allow_external
    assert not Needs.of_generation(unnamed).with_model("gpt").allow_external
    assert Needs.of_generation(unnamed, allow_external=True).allow_external
    going_on = replace(named, resume=(DeliveredChoice(0, (), "once"),), allow_text_resume=True)
    assert not Needs.of_generation(going_on).allow_external
    assert Needs.of_generation(going_on, allow_external=True).allow_external


@given(strategies.requests())
def test_any_request_has_needs_that_only_grow(request: GenerationRequest) -> None:
    needs = Needs.of_generation(request)
    assert needs.features == request.needed_features()
    assert needs.prompt_tokens < needs.context_length <= needs.likely_context_length
    more = needs.with_context(needs.context_length + 10)
    assert more.context_length == needs.context_length + 10 <= more.likely_context_length
    assert needs.with_context(0) == needs


@given(st.text(max_size=300))
def test_the_bound_is_never_more_than_bytes_as_tokens(text: str) -> None:
    assert Needs.of_generation(GenerationRequest("m", TextPrompt(text))).prompt_tokens <= len(text.encode())


# --- the default model ----------------------------------------------------------------------------------------------


def test_the_default_is_the_chat_model_that_most_have_loaded() -> None:
    directory = fleet.directory(
        fleet.runner("r1", fleet.model("alpha"), fleet.model("beta")),
        fleet.runner("r2", fleet.model("beta"), fleet.model("code", features=frozenset())),
        fleet.runner("r3", fleet.model("alpha", state=ModelState.AVAILABLE), fleet.model("code", features=frozenset())),
        fleet.runner("r4", fleet.model("alpha", state=ModelState.AVAILABLE), fleet.model("code", features=frozenset())),
    )
    assert default_model(directory) == "beta"
    assert default_model(directory, configured="mine") == "mine"


def test_of_equals_the_greater_model_then_the_first_by_name() -> None:
    small = fleet.model("alpha", parameter_count=1)
    great = fleet.model("beta", parameter_count=9)
    assert default_model(fleet.directory(fleet.runner("r1", small, great))) == "beta"
    assert default_model(fleet.directory(fleet.runner("r1", fleet.model("b"), fleet.model("a")))) == "a"


def test_models_that_cannot_answer_are_no_default() -> None:
    directory = fleet.directory(
        fleet.runner("r1", fleet.model("failed", state=ModelState.FAILED)),
        fleet.runner("r2", fleet.model("paid", engine="paid")),
        fleet.runner("r3", fleet.model("vectors", tags=("embedding",), features=frozenset({Feature.EMBED}))),
        fleet.runner("r4", fleet.model("scores", tags=("rerank",), features=frozenset({Feature.RERANK}))),
        fleet.runner("r5", fleet.model("leaving"), state=RunnerState.DRAINING),
    )
    assert default_model(directory) == ""
    assert default_model(directory, Work.EMBED) == "vectors"
    assert default_model(directory, Work.EMBED, "chatty") == "vectors"
    assert default_model(directory, Work.RERANK, "chatty") == "scores"


def test_a_base_model_is_the_default_where_nothing_chats() -> None:
    assert default_model(fleet.directory(fleet.runner("r1", fleet.model("base", features=frozenset())))) == "base"


def test_an_adapter_goes_where_it_is_and_chooses_the_model_where_none_is_named() -> None:
    request = GenerationRequest("", TextPrompt("Ahoy"), adapter="pirate")
    needs = Needs.of_generation(request)
    assert needs.adapter == "pirate"
    assert Feature.ADAPTER in needs.features
    plain = fleet.runner("r1", fleet.model("alpha", features=frozenset({Feature.ADAPTER})))
    has = fleet.runner("r2", fleet.model("beta", features=frozenset({Feature.ADAPTER}), adapters=("pirate", "poet")))
    directory = fleet.directory(plain, has)
    resolved = Roster().resolve(needs, directory)
    assert resolved.model == ""
    assert Roster().pool(resolved, directory).everybody == ("r2",)
    assert Needs.of_token_count(request).adapter == ""


def test_tier_and_tags_choose_among_all_models() -> None:
    directory = fleet.directory(fleet.runner("r1", fleet.model("alpha"), fleet.model("beta", tier=Tier.LARGE)))
    roster = Roster()
    assert roster.resolve(Needs(), directory).model == "alpha"
    assert roster.resolve(Needs(tier=Tier.LARGE), directory).model == ""
    assert roster.resolve(Needs(model="beta"), directory).model == "beta"
    assert roster.resolve(Needs(), fleet.directory(fleet.runner("r1", fleet.model("gamma")))).model == "gamma"
