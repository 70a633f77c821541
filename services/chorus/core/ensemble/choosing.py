"""Which models take part where the caller names none: by tier, by tag, several samples where models are few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from chorus.core.costs.purse import Purse
from chorus.core.ensemble.prompts import question_of, told_plainly
from chorus.core.ensemble.records import Level, Member, MemberSpec
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.records import Artifact, Feature, ModelState, RunnerState, Tier
from chorus.core.generation import Conversation, GenerationRequest
from chorus.core.placement.fit import NOT_GENERATING_TAGS, is_external, may_fit
from chorus.core.placement.needs import Needs

# Of a model's further samples, in turn: unlike ones find out more than equal ones.
_TEMPERATURES = (0.6, 0.8, 1.0)
_CODE_TAG = "code"
_CODE_MARKS = ("```", "def ", "class ", "#include", "function ", "SELECT ")


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that could answer a request, and its artifacts' names. `external`: paid providers alone have it."""

    model: str
    tier: Tier
    parameter_count: int
    tags: frozenset[str] = frozenset()
    loaded: bool = False
    external: bool = False
    chats: bool = True
    tells_logprobs: bool = True
    artifacts: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """Whatever a request may call it."""
        return self.artifacts | {self.model}


def offers(
    request: GenerationRequest, directory: Directory, *, allow_external: bool, purse: Purse | None = None
) -> tuple[Offer, ...]:
    """What the mesh has for a request, the greatest first, paid providers last. Its `model`, where it names one, is the
    only one, and may be a paid provider's. Of those that it doesn't name, `purse` can pay for one more request."""
    found: dict[str, Offer] = {}
    fitting: dict[tuple[str, str, bool], bool] = {}
    for entry in directory.entries.values():
        runner = entry.record.runner
        if not entry.reachable or entry.record.state is not RunnerState.READY:
            continue
        for status in runner.models:
            artifact = status.artifact
            if request.model and request.model not in (artifact.family, artifact.name):
                continue
            model = request.model or artifact.family
            if status.state is ModelState.FAILED or not NOT_GENERATING_TAGS.isdisjoint(artifact.tags):
                continue
            chats = Feature.CHAT in status.features
            asked = (model, runner.runner_id, chats)
            if asked not in fitting:
                told = request if chats else told_plainly(request)
                needs = Needs.of_generation(replace(told, model=model), allow_external=allow_external)
                # That we name a model allows nothing.
                needs = replace(needs, allow_external=allow_external or bool(request.model))
                fitting[asked] = may_fit(needs, entry.record)
            external = is_external(entry.record, status)
            if external and purse is not None and not request.model and _is_too_dear(request, artifact, purse):
                continue
            if not fitting[asked]:
                continue
            offer = Offer(
                model,
                artifact.tier,
                artifact.parameter_count,
                frozenset(artifact.tags),
                loaded=status.state is ModelState.LOADED,
                external=external,
                chats=chats,
                tells_logprobs=Feature.LOGPROBS in status.features,
                artifacts=frozenset({artifact.name}),
            )
            found[model] = _both(found[model], offer) if model in found else offer
    return tuple(sorted(found.values(), key=lambda offer: (offer.external, -offer.parameter_count, offer.model)))


def _is_too_dear(request: GenerationRequest, artifact: Artifact, purse: Purse) -> bool:
    needs = Needs.of_generation(request)
    return purse.lacks(artifact, needs.most_prompt_tokens, needs.answer_tokens) is not None


def choose_members(request: GenerationRequest, available: Sequence[Offer], level: Level) -> tuple[Member, ...]:
    """As many members as the level wants: each suitable model once, then again as further samples.

    Models of the level's tiers; where there is none, of the tier that is nearest. Unequal models can spoil a vote
    (Self-MoA, arXiv 2502.00674), so the greatest of those tiers come first.
    """
    suitable = [offer for offer in _for_code(request, available) if not offer.external] or list(available)
    if isinstance(request.prompt, Conversation):
        suitable = [offer for offer in suitable if offer.chats] or suitable
    chosen = [offer for offer in suitable if offer.tier in level.tiers] or _nearest(suitable, level.tiers)
    if not chosen:
        return ()
    specs = [MemberSpec(offer.model) for offer in chosen[: level.members]]
    counts = [level.members // len(specs) + (place < level.members % len(specs)) for place in range(len(specs))]
    counted = [replace(spec, sample_count=count) for spec, count in zip(specs, counts, strict=True)]
    return tuple(
        replace(member, temperature=_TEMPERATURES[(member.draw - 1) % len(_TEMPERATURES)]) if member.draw else member
        for member in expanded(counted, available)
    )


def expanded(specs: Sequence[MemberSpec], available: Sequence[Offer]) -> tuple[Member, ...]:
    """One member for each sample, with ids of their own and the tiers that the mesh knows.

    Who is told something else than others of his model says something else by himself, and draws no sample.
    """
    tiers = {name: offer.tier for offer in available for name in offer.names}
    members: list[Member] = []
    taken = {spec.member_id for spec in specs if spec.member_id}
    draws: Counter[tuple[str, str]] = Counter()
    for spec in specs:
        name = spec.member_id or _free(spec.model or "default", taken)
        taken.add(name)
        for number in range(1, spec.sample_count + 1):
            member_id = name if spec.sample_count == 1 else f"{name}-{number}"
            asked = spec.model, spec.instructions
            draw = draws[asked]
            draws[asked] += 1
            members.append(Member(member_id, spec.model, spec.instructions, draw=draw, tier=tiers.get(spec.model)))
    return tuple(members)


def choose_aggregator(available: Sequence[Offer], members: Sequence[Member]) -> str:
    """The greatest model that chats, of the mesh's own; where none is known, the first member's."""
    own = [offer for offer in available if not offer.external] or list(available)
    chatting = [offer for offer in own if offer.chats] or own
    if chatting:
        return max(chatting, key=lambda offer: (offer.parameter_count, offer.loaded)).model
    return members[0].model if members else ""


def by_size(members: Sequence[Member], available: Sequence[Offer]) -> tuple[Member, ...]:
    """The smallest first, paid providers last; equals, and those that nobody knows, as they were given."""
    place = {name: (offer.external, offer.parameter_count) for offer in available for name in offer.names}
    return tuple(sorted(members, key=lambda member: place.get(member.model, (False, 0))))


def _both(one: Offer, other: Offer) -> Offer:
    """One model, found twice."""
    greater = max(one, other, key=lambda offer: offer.parameter_count)
    return replace(
        greater,
        loaded=one.loaded or other.loaded,
        external=one.external and other.external,
        chats=one.chats and other.chats,
        tells_logprobs=one.tells_logprobs and other.tells_logprobs,
        artifacts=one.artifacts | other.artifacts,
    )


def _for_code(request: GenerationRequest, available: Sequence[Offer]) -> Sequence[Offer]:
    """Code goes to code models, where there are any, and other questions to the others."""
    question = question_of(request.prompt)
    about_code = any(mark in question for mark in _CODE_MARKS)
    return [offer for offer in available if (_CODE_TAG in offer.tags) is about_code] or available


def _nearest(available: Sequence[Offer], tiers: Collection[Tier]) -> list[Offer]:
    order = list(Tier)
    wanted = [order.index(tier) for tier in tiers]
    if not available or not wanted:
        return list(available)
    distance = {offer.tier: min(abs(order.index(offer.tier) - place) for place in wanted) for offer in available}
    least = min(distance.values())
    return [offer for offer in available if distance[offer.tier] == least]


def _free(name: str, taken: Collection[str]) -> str:
    """A name that nobody has."""
    if name not in taken:
        return name
    return next(f"{name}_{number}" for number in range(2, len(taken) + 3) if f"{name}_{number}" not in taken)
