"""Why nobody can serve a request: the error for its caller, and each runner's reason in words.

The rule: the error speaks of the runners that came closest, those that passed the most checks (in the order of
RejectionReason). If one of them only has no place just now, the request is overload; if it is only away just now, the
mesh is unavailable; if something lasting is wrong with it, no runner is capable; if it lacks an adapter, that is not
found; if it lacks a feature, the feature is unsupported; and only where nobody has the model at all, the model is
unknown. So the caller hears of the least that has to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from chorus.core.costs.purse import exhausted, usd
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
from chorus.core.placement.cost import wait_seconds
from chorus.core.placement.fit import CLOSENESS, Miss, RejectionReason, Situation
from chorus.core.placement.models import families
from chorus.core.placement.needs import Needs, Work

Missed: TypeAlias = tuple[DirectoryEntry, Miss]

# Enough to choose from, and short enough for a gRPC status.
NAMED_MODELS = 40
_NAMED_RUNNERS = 3
_SHOWN_NAME = 100
RETRY_AFTER_MIN_S = 0.1
RETRY_AFTER_MAX_S = 30.0

_AWAY = (
    RejectionReason.STATE,
    RejectionReason.UNREACHABLE,
    RejectionReason.BREAKER_OPEN,
    RejectionReason.TRIED,
)


def refusal(needs: Needs, directory: Directory, missed: Sequence[Missed], situation: Situation) -> ChorusError:
    """The error for a request that none of a directory's runners can serve; `missed` has every one of them."""
    absent = _absent(needs, directory)
    if absent is not None:
        return absent
    most = max(CLOSENESS[miss.reason] for _, miss in missed)
    closest = [(entry, miss) for entry, miss in missed if CLOSENESS[miss.reason] == most]
    reason = closest[0][1].reason
    if reason is RejectionReason.MODEL:
        return _unknown_model(needs, directory)
    if reason is RejectionReason.FEATURE:
        return _unsupported(needs, closest)
    if reason is RejectionReason.ADAPTER:
        return _unknown_adapter(needs, closest)
    if reason is RejectionReason.CONTEXT:
        return _too_short(needs, closest)
    if reason is RejectionReason.BUDGET:
        return exhausted(min((miss.found for _, miss in closest), key=lambda lack: lack.amount))
    because = _because(needs, closest)
    if reason is RejectionReason.FULL:
        wait_s = min(wait_seconds(entry.record, miss.model, situation) for entry, miss in closest if miss.model)
        wait_s = min(max(wait_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
        return OverloadedError(f"every runner that could serve this is full: {because}", retry_after_s=wait_s)
    if reason in _AWAY:
        return RunnersUnavailableError(f"no runner that could serve this can be asked now: {because}")
    return NoCapableRunnerError(
        f"no runner of the mesh can serve this as asked: {because}", metadata={"requirement": reason.value}
    )


def _absent(needs: Needs, directory: Directory) -> RunnersUnavailableError | None:
    """What to say where there is nobody to judge: an empty mesh, or nobody of those that the request asks for."""
    if not directory.entries:
        if directory.synced:
            return RunnersUnavailableError("the mesh has no runner; start one with `chorus runner` or `chorus up`")
        return RunnersUnavailableError(
            "no registry has told of any runner yet; `chorus status` shows whether the registry runs"
        )
    here = directory.entries.values()
    if needs.runner_ids and not any(entry.record.runner.runner_id in needs.runner_ids for entry in here):
        return RunnersUnavailableError(
            f"the request is for {_names('runner', needs.runner_ids)} not in the mesh now; `chorus status` lists all"
        )
    if needs.node_ids and not any(entry.record.node.node_id in needs.node_ids for entry in here):
        return RunnersUnavailableError(
            f"the request is for {_names('node', needs.node_ids)} not in the mesh now; `chorus status` lists all"
        )
    return None


def _unknown_model(needs: Needs, directory: Directory) -> UnknownModelError:
    known = families(directory)
    shown = ", ".join(known[:NAMED_MODELS]) + (
        f" and {len(known) - NAMED_MODELS} more" if len(known) > NAMED_MODELS else ""
    )
    there_are = f"there are: {shown}" if known else "the mesh has no model yet; `chorus models pull NAME` gets one"
    if needs.model:
        problem = f"no runner has the model {_shown(needs.model)}"
    elif needs.work is Work.EMBED:
        problem = "no runner has a model that embeds"
    elif needs.work is Work.RERANK:
        problem = "no runner has a model that reranks"
    else:
        problem = "no runner has a model that generates"
    metadata = {"model": needs.model[:_SHOWN_NAME], "available": ",".join(known[:NAMED_MODELS])}
    return UnknownModelError(f"{problem}; {there_are}", metadata=metadata)


def _unsupported(needs: Needs, closest: Sequence[Missed]) -> UnsupportedFeatureError:
    """Names the features that the least lacking runner lacks."""
    lacking = min((sorted(miss.found) for _, miss in closest), key=lambda features: (len(features), features))
    named = ", ".join(lacking)
    whom = f"no runner that has {_shown(needs.model)}" if needs.model else "no runner"
    return UnsupportedFeatureError(f"the request needs {named}, which {whom} can do", metadata={"feature": lacking[0]})


def _unknown_adapter(needs: Needs, closest: Sequence[Missed]) -> NotFoundError:
    """Names the adapters that there are for the models that could have been meant."""
    known = sorted({name for _, miss in closest for name in miss.found})
    whom = _shown(needs.model) if needs.model else "any model"
    if known:
        more = f" and {len(known) - NAMED_MODELS} more" if len(known) > NAMED_MODELS else ""
        there_are = f"there are: {', '.join(known[:NAMED_MODELS])}{more}"
    else:
        there_are = "there is none; put a LoRA adapter's GGUF file into a runner's models folder"
    return NotFoundError(
        f"no runner has the adapter {_shown(needs.adapter)} for {whom}; {there_are}",
        metadata={"adapter": needs.adapter[:_SHOWN_NAME], "available": ",".join(known[:NAMED_MODELS])},
    )


def _too_short(needs: Needs, closest: Sequence[Missed]) -> ChorusError:
    """Both numbers: what is needed, and the longest context that there is."""
    longest, name = max((miss.found, miss.model.artifact.name) for _, miss in closest if miss.model is not None)
    if needs.prompt_tokens + 1 > longest:
        return PromptTooLongError(needs.prompt_tokens, longest, model=name, at_least=not needs.prompt_is_counted)
    return NoCapableRunnerError(
        f"the request needs a context of {needs.context_length} tokens, and the longest that a runner of the mesh "
        f"gives to one request is {longest} tokens ({name})",
        metadata={
            "requirement": RejectionReason.CONTEXT.value,
            "needed": str(needs.context_length),
            "context_length": str(longest),
        },
    )


def _because(needs: Needs, closest: Sequence[Missed]) -> str:
    told = [f"{entry.record.runner.runner_id} {detail(needs, entry, miss)}" for entry, miss in closest[:_NAMED_RUNNERS]]
    more = len(closest) - len(told)
    return "; ".join(told) + (f"; and {more} more like these" if more else "")


def detail(needs: Needs, entry: DirectoryEntry, miss: Miss) -> str:
    """Why a runner can't serve a request, as the rest of a sentence that begins with its name."""
    model = miss.model.artifact.name if miss.model is not None else needs.model
    match miss.reason:
        case RejectionReason.MODEL:
            return f"does not have {_shown(needs.model)}" if needs.model else "has no model for this kind of request"
        case RejectionReason.FEATURE:
            return f"lacks {', '.join(sorted(miss.found))} for {model}"
        case RejectionReason.ADAPTER:
            return f"has no adapter {_shown(needs.adapter)} for {model}"
        case RejectionReason.TIER:
            tier = miss.model.artifact.tier if miss.model is not None else ""
            return f"has {model}, whose tier is {tier}, not {needs.tier}"
        case RejectionReason.TAG:
            return f"has {model}, which lacks the tag {', '.join(sorted(miss.found))}"
        case RejectionReason.PRIVATE:
            return f"has {model} {_exposure(miss)}, which the request does not allow"
        case RejectionReason.UNPRICED:
            return f"has {model} through a paid provider whose price the coordinator isn't told (costs.prices)"
        case RejectionReason.BUDGET:
            left = max(0, miss.found.limit - miss.found.spent - miss.found.reserved)
            of_budget = f"of this {miss.found.period}'s budget {usd(left)} is left"
            return f"has {model} through a paid provider: {of_budget}, and this may cost {usd(miss.found.amount)}"
        case RejectionReason.CONTEXT:
            needed = needs.context_length
            return f"gives a request {miss.found} tokens of context with {model}; at least {needed} are needed"
        case RejectionReason.LABEL:
            return _label_detail(needs, entry, miss.found)
        case RejectionReason.PINNED:
            return _pinned_detail(needs, miss, model)
        case RejectionReason.MEMORY:
            size = miss.model.artifact.size_bytes if miss.model is not None else 0
            return f"has {miss.found / 1e9:.1f} GB of memory, and {model} alone takes {size / 1e9:.1f} GB"
        case RejectionReason.NOT_LOADED:
            return f"could not load {model}" + (f": {miss.found}" if miss.found else "")
        case RejectionReason.STATE:
            return f"is {entry.record.state}"
        case RejectionReason.UNREACHABLE:
            return "cannot be reached"
        case RejectionReason.BREAKER_OPEN:
            return "has failed too often lately"
        case RejectionReason.TRIED:
            return "was tried already"
        case RejectionReason.FULL:
            return f"has {miss.found} requests for {model} decoding and waiting"


def _label_detail(needs: Needs, entry: DirectoryEntry, key: str) -> str:
    has = entry.record.runner.labels.get(key, entry.record.node.labels.get(key))
    if has is None:
        return f"has no label {key} (needed: {needs.labels[key]!r})"
    return f"has the label {key}={has!r}, not {needs.labels[key]!r}"


def _pinned_detail(needs: Needs, miss: Miss, model: str) -> str:
    if miss.found == "artifact":
        return f"has another artifact of {model} than the one asked for ({needs.artifact_sha256[:12]}...)"
    ids = needs.runner_ids if miss.found == "runner" else needs.node_ids
    return f"is not the {miss.found} asked for ({', '.join(sorted(ids)[:_NAMED_RUNNERS])})"


def _exposure(miss: Miss) -> str:
    return "only through a paid provider" if miss.found == "external" else "only over an unencrypted connection"


def _names(what: str, ids: frozenset[str]) -> str:
    shown = sorted(ids)
    named = ", ".join(shown[:_NAMED_RUNNERS])
    return f"{what} {named}, which is" if len(shown) == 1 else f"{what}s {named}, which are"


def _shown(name: str) -> str:
    """A name that a caller made up, bounded and quoted."""
    return repr(name[:_SHOWN_NAME])
