"""Why nobody can serve a request: the error speaks of whoever came closest, and says what would have to change."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given

from chorus.core.errors import (
    ChorusError,
    NoCapableRunnerError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
    RunnersUnavailableError,
    UnknownModelError,
    UnsupportedFeatureError,
)
from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import Feature, ModelState, RunnerState, Tier
from chorus.core.placement import Needs, RejectionReason, Situation, Work, place, survey
from chorus.core.placement.fit import CLOSENESS
from tests.core import placement_fleet as fleet

READY = fleet.runner("ready", fleet.model())


def refused(needs: Needs, *entries: DirectoryEntry, situation: Situation | None = None) -> ChorusError:
    with pytest.raises(ChorusError) as caught:
        place(needs, fleet.directory(*entries), rng=random.Random(0), situation=situation or Situation())
    return caught.value


def test_an_unknown_model_names_those_there_are() -> None:
    error = refused(Needs(model="gpt-5"), READY, fleet.runner("other", fleet.model("beta")))
    assert isinstance(error, UnknownModelError)
    assert "'gpt-5'" in error.message
    assert "alpha, beta" in error.message
    assert error.metadata == {"model": "gpt-5", "available": "alpha,beta"}


def test_a_made_up_name_of_any_length_makes_a_short_message() -> None:
    error = refused(Needs(model="x" * 100_000), READY)
    assert len(error.message) < 300
    assert len(error.metadata["model"]) == 100


def test_a_mesh_of_many_models_names_some() -> None:
    many = [fleet.runner(f"r{number}", fleet.model(f"family{number:03}")) for number in range(60)]
    assert "and 20 more" in refused(Needs(model="nothing"), *many).message


def test_a_missing_feature_is_named() -> None:
    needs = Needs(model="alpha", features=frozenset({Feature.JSON_SCHEMA}))
    error = refused(needs, READY)
    assert isinstance(error, UnsupportedFeatureError)
    assert "json_schema" in error.message
    assert error.metadata["feature"] == "json_schema"


def test_only_the_features_that_the_least_lacking_runner_lacks_are_named() -> None:
    needs = Needs(features=frozenset({Feature.JSON_SCHEMA, Feature.CHAT}))
    error = refused(needs, READY, fleet.runner("bare", fleet.model(features=frozenset())))
    assert error.message == "the request needs json_schema, which no runner can do"


def test_an_adapter_that_nobody_has_is_not_found_and_those_there_are_are_named() -> None:
    needs = Needs(model="alpha", adapter="lawyer")
    have = fleet.runner("r1", fleet.model(adapters=("poet",))), fleet.runner("r2", fleet.model(adapters=("pirate",)))
    error = refused(needs, *have)
    assert isinstance(error, NotFoundError)
    assert error.message == "no runner has the adapter 'lawyer' for 'alpha'; there are: pirate, poet"
    assert error.metadata == {"adapter": "lawyer", "available": "pirate,poet"}
    assert "put a LoRA adapter's GGUF file" in refused(needs, READY).message
    unable = refused(replace(needs, features=frozenset({Feature.ADAPTER})), READY)
    assert isinstance(unable, UnsupportedFeatureError)


@pytest.mark.parametrize(
    ("needs", "entry", "told"),
    [
        (Needs(model="alpha", tier=Tier.LARGE), READY, "tier is small, not large"),
        (Needs(model="alpha", tags=frozenset({"code"})), READY, "lacks the tag code"),
        (Needs(model="alpha", labels={"room": "attic"}), READY, "no label room (needed: 'attic')"),
        (
            Needs(model="alpha", labels={"room": "attic"}),
            fleet.runner("r", fleet.model(), node_labels={"room": "cellar"}),
            "the label room='cellar', not 'attic'",
        ),
        (Needs(model="alpha", private=True), fleet.runner("r", fleet.model(engine="house")), "unencrypted"),
        (Needs(model="alpha", private=True), fleet.runner("r", fleet.model(engine="paid")), "paid provider"),
        (Needs(allow_external=False), fleet.runner("r", fleet.model(engine="paid")), "paid provider"),
        (Needs(model="alpha", artifact_sha256="00" * 32), READY, "another artifact"),
        (
            Needs(model="alpha"),
            fleet.runner("r", fleet.model(state=ModelState.AVAILABLE, size_bytes=99 * fleet.GIB)),
            "17.2 GB of memory",
        ),
        (
            Needs(model="alpha"),
            fleet.runner("r", fleet.model(state=ModelState.FAILED, error="not GGUF")),
            "could not load alpha.gguf: not GGUF",
        ),
    ],
)
def test_what_a_runner_lasts_to_lack_is_said(needs: Needs, entry: DirectoryEntry, told: str) -> None:
    error = refused(needs, entry)
    assert isinstance(error, NoCapableRunnerError)
    assert told in error.message
    assert entry.record.runner.runner_id in error.message


def test_a_pin_to_a_runner_without_the_model_says_who_has_it() -> None:
    other = fleet.runner("other", fleet.model("beta"))
    error = refused(Needs(model="alpha", runner_ids=frozenset({"other"})), READY, other)
    assert isinstance(error, NoCapableRunnerError)
    assert error.message.endswith("ready is not the runner asked for (other)")


@pytest.mark.parametrize("pin", [{"runner_ids": frozenset({"away"})}, {"node_ids": frozenset({"away"})}])
def test_a_pin_to_somebody_who_is_not_there_is_unavailable(pin: dict[str, frozenset[str]]) -> None:
    error = refused(Needs(model="alpha", **pin), READY)  # type: ignore[arg-type]
    assert isinstance(error, RunnersUnavailableError)
    assert "away, which is not in the mesh now" in error.message


def test_a_context_that_nobody_gives_has_both_numbers() -> None:
    longer = fleet.runner("longer", fleet.model("beta", context_length=8000))
    error = refused(Needs(context_length=9000), READY, longer)
    assert isinstance(error, NoCapableRunnerError)
    assert "9000 tokens" in error.message
    assert "8000 tokens (beta.gguf)" in error.message
    assert (error.metadata["needed"], error.metadata["context_length"]) == ("9000", "8000")


@pytest.mark.parametrize(("counted", "told"), [(True, "has 5000 tokens"), (False, "has at least 5000 tokens")])
def test_a_prompt_that_fits_nowhere_is_too_long(counted: bool, told: str) -> None:
    needs = Needs(model="alpha", context_length=5001, prompt_tokens=5000, prompt_is_counted=counted)
    error = refused(needs, READY)
    assert isinstance(error, PromptTooLongError)
    assert told in error.message
    assert (error.prompt_tokens, error.context_length) == (5000, 4096)


@pytest.mark.parametrize(
    ("entry", "situation", "told"),
    [
        (fleet.runner("r", fleet.model(), state=RunnerState.DRAINING), Situation(), "r is draining"),
        (fleet.runner("r", state=RunnerState.STARTING), Situation(), "r is starting"),
        (fleet.runner("r", fleet.model(), reachable=False), Situation(), "r cannot be reached"),
        (fleet.runner("r", fleet.model()), Situation(tried={"r"}), "r was tried already"),
    ],
)
def test_who_is_only_away_is_unavailable(entry: DirectoryEntry, situation: Situation, told: str) -> None:
    error = refused(Needs(model="alpha"), entry, fleet.runner("x", fleet.model("beta")), situation=situation)
    assert isinstance(error, RunnersUnavailableError)
    assert told in error.message


def test_full_runners_are_overload_with_a_time_to_wait() -> None:
    full = fleet.runner("full", fleet.model(), loads=(fleet.load(used=4, queued=64, rate=64),))
    error = refused(Needs(model="alpha"), full, fleet.runner("off", fleet.model(), reachable=False))
    assert isinstance(error, OverloadedError)
    assert "68 requests" in error.message
    assert error.retry_after_s == pytest.approx(1.0)


def test_an_empty_mesh_says_what_to_start() -> None:
    assert "chorus runner" in refused(Needs()).message
    with pytest.raises(RunnersUnavailableError, match="no registry has told"):
        place(Needs(), Directory(), rng=random.Random(0))


def test_reranking_needs_a_model_that_reranks() -> None:
    needs = Needs(work=Work.RERANK, features=frozenset({Feature.RERANK}))
    error = refused(needs, READY)
    assert isinstance(error, UnsupportedFeatureError)
    assert "rerank" in error.message


def test_embeddings_need_a_model_that_embeds() -> None:
    needs = Needs(work=Work.EMBED, features=frozenset({Feature.EMBED}))
    error = refused(needs, READY)
    assert isinstance(error, UnsupportedFeatureError)
    assert "embed" in error.message


_ERRORS: dict[type[ChorusError], set[RejectionReason]] = {
    UnknownModelError: {RejectionReason.MODEL},
    NotFoundError: {RejectionReason.ADAPTER},
    UnsupportedFeatureError: {RejectionReason.FEATURE},
    PromptTooLongError: {RejectionReason.CONTEXT},
    OverloadedError: {RejectionReason.FULL},
    RunnersUnavailableError: {
        RejectionReason.STATE,
        RejectionReason.UNREACHABLE,
        RejectionReason.BREAKER_OPEN,
        RejectionReason.TRIED,
    },
    NoCapableRunnerError: {
        RejectionReason.TIER,
        RejectionReason.TAG,
        RejectionReason.PRIVATE,
        RejectionReason.CONTEXT,
        RejectionReason.LABEL,
        RejectionReason.PINNED,
        RejectionReason.MEMORY,
        RejectionReason.NOT_LOADED,
    },
}


@given(fleet.needs, fleet.directories(), fleet.situations)
def test_the_error_is_that_of_the_closest_runner(needs: Needs, directory: Directory, situation: Situation) -> None:
    found = survey(needs, directory, situation=situation)
    if found.candidates:
        return
    with pytest.raises(ChorusError) as caught:
        place(needs, directory, rng=random.Random(0), situation=situation)
    here = directory.entries.values()
    pinned_away = (needs.runner_ids and not needs.runner_ids & directory.entries.keys()) or (
        needs.node_ids and not needs.node_ids & {entry.record.node.node_id for entry in here}
    )
    if not directory.entries or pinned_away:
        assert isinstance(caught.value, RunnersUnavailableError)
        return
    closest = max((rejected.miss.reason for rejected in found.rejected), key=CLOSENESS.__getitem__)
    assert closest in _ERRORS[type(caught.value)]
    assert (caught.value.retry_after_s is not None) is isinstance(caught.value, OverloadedError)
