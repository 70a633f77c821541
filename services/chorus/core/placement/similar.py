"""Another model in place of one that nobody can serve: which one is most like it, and when a request may have it.

Alike are models that have every capability tag of the one asked for; of them the one of the nearest tier is taken.
What a model was like is remembered for a week after the last runner that had it is gone, or has removed it. Of a model
that was never seen nothing is known, so the mesh's default stands in for it. Whoever stands in serves all that the
request needs, and can do so now.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import log2

from chorus.core.errors import (
    ChorusError,
    NoCapableRunnerError,
    OverloadedError,
    RunnersUnavailableError,
    UnsupportedFeatureError,
)
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import Artifact, ModelState, ModelStatus, RunnerRecord, Tier
from chorus.core.generation import Fallback, GenerationRequest, Substitution, TokenPrompt
from chorus.core.placement.fit import Miss, Situation, fit
from chorus.core.placement.needs import Needs
from chorus.core.resilience.retries import may_go_better_elsewhere

# Names of models remembered that no runner has any more, and for how long.
MAX_REMEMBERED = 512
REMEMBERED_S = 7 * 86_400.0
# Placement's own word that nobody serves the model.
_REFUSALS = (NoCapableRunnerError, RunnersUnavailableError, UnsupportedFeatureError)
_TIERS = tuple(Tier)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model as some runner had it, the last time at `seen_at`."""

    artifact: Artifact
    seen_at: float


class KnownModels:
    """What models are like, or were before they left. Times are seconds since the Unix epoch."""

    def __init__(self) -> None:
        self._here: dict[str, tuple[ModelStatus, ...]] = {}  # by runner
        self._gone: OrderedDict[str, KnownModel] = OrderedDict()  # by family and by name, the last at the end

    def has(self, record: RunnerRecord, now: float) -> None:
        """A runner of the directory says what models it has; it may have removed some."""
        runner_id, models = record.runner.runner_id, record.runner.models
        before = self._here.get(runner_id, ())
        if before is models:
            return
        self._here[runner_id] = models
        names = {status.artifact.name for status in models}
        for status in before:
            if status.artifact.name not in names:
                self._go(KnownModel(status.artifact, now))

    def left(self, record: RunnerRecord, now: float) -> None:
        """A runner has left the directory, perhaps as the last one with its models."""
        self._here.pop(record.runner.runner_id, None)
        for status in record.runner.models:
            self._go(KnownModel(status.artifact, now))

    def find(self, model: str, directory: Directory, now: float) -> Artifact | None:
        """An artifact of that family or name; None for one that was not seen lately."""
        for _, entry in sorted(directory.entries.items()):
            for status in entry.record.runner.models:
                if model in (status.artifact.family, status.artifact.name):
                    return status.artifact
        gone = self._gone.get(model)
        return gone.artifact if gone is not None and now - gone.seen_at <= REMEMBERED_S else None

    def remembered(self, now: float) -> tuple[KnownModel, ...]:
        """All that `recall` has to be given after a restart, the latest last; those that are here are seen now."""
        gone = {known.artifact.name: known for known in self._gone.values() if now - known.seen_at <= REMEMBERED_S}
        here = {
            status.artifact.name: KnownModel(status.artifact, now)
            for models in self._here.values()
            for status in models
        }
        return (*(known for name, known in gone.items() if name not in here), *here.values())[-MAX_REMEMBERED:]

    def recall(self, known: Iterable[KnownModel]) -> None:
        """What was remembered before a restart."""
        for one in known:
            self._go(one)

    def _go(self, known: KnownModel) -> None:
        for name in (known.artifact.family, known.artifact.name):
            self._gone[name] = known
            self._gone.move_to_end(name)
        while len(self._gone) > MAX_REMEMBERED:
            self._gone.popitem(last=False)


def may_be_replaced(request: GenerationRequest) -> bool:
    """Whether another model could answer at all: token ids are of one vocabulary, and pins are meant."""
    return not (
        request.resume
        or request.adapter
        or request.requirements.artifact_sha256
        or request.sampling.logit_bias
        or isinstance(request.prompt, TokenPrompt)
    )


def most_similar(
    needs: Needs, directory: Directory, situation: Situation, *, like: Artifact | None, default: str, external: bool
) -> Needs | None:
    """The same needs of the family that stands in best for `needs.model`; None where none can now.

    `like` is the model as it is or was, None where that is not known. `external`: a paid provider may stand in.
    """
    tags = needs.tags if like is None else needs.tags.union(like.tags)
    anything = replace(needs, model="", tags=tags, allow_external=external)
    best: dict[str, tuple[object, ...]] = {}
    for entry in directory.entries.values():
        found = fit(anything, entry, situation)
        if isinstance(found, Miss):
            continue
        for status, _, _ in found:
            artifact = status.artifact
            if needs.model in (artifact.family, artifact.name):
                continue
            key = _distance(artifact, like, default, loaded=status.state is ModelState.LOADED)
            best[artifact.family] = min(key, best.get(artifact.family, key))
    if not best:
        return None
    return replace(anything, model=min(best, key=lambda family: (best[family], family)))


def _distance(artifact: Artifact, like: Artifact | None, default: str, *, loaded: bool) -> tuple[object, ...]:
    """How unlike a model is, for comparing; of two tiers as near, the more capable one, and then who is in memory."""
    if like is None:
        return (artifact.family != default, not loaded, -artifact.parameter_count)
    there, asked = _TIERS.index(artifact.tier), _TIERS.index(like.tier)
    apart = abs(log2((artifact.parameter_count + 1) / (like.parameter_count + 1)))
    more_tags = len(set(artifact.tags).difference(like.tags))
    return (artifact.family != like.family, abs(there - asked), there < asked, not loaded, apart, more_tags)


class FallingBack:
    """One request's leave to be answered by another model, and which one answers. One without leave never changes."""

    def __init__(self, allowed: Fallback, request: GenerationRequest) -> None:
        self._external = allowed.external
        self.is_open = allowed.similar_model and may_be_replaced(request)
        self.substitution: Substitution | None = None

    def applies_to(self, needs: Needs, refused: ChorusError) -> bool:
        """Whether another model is looked for, now that nobody can serve the request as it is."""
        if not self.is_open or not needs.model or isinstance(refused, OverloadedError):  # who is full is waited for
            return False
        return may_go_better_elsewhere(refused) or isinstance(refused, _REFUSALS)

    def instead(
        self,
        needs: Needs,
        refused: ChorusError,
        directory: Directory,
        situation: Situation,
        *,
        known: KnownModels,
        default: str,
        now: float,
    ) -> Needs:
        """What the request needs of another model; the same as before where there is none. `now` is as `known` has it.

        This is asked once. Where the substitute is lost too, whoever asked is told so.
        """
        self.is_open = False
        like = known.find(needs.model, directory, now)
        found = most_similar(needs, directory, situation, like=like, default=default, external=self._external)
        if found is None:
            return needs
        self.substitution = Substitution(needs.model, found.model, refused.reason)
        return found
