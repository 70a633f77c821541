"""Listing nodes: which runners match a filter, and one page after another."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from chorus.core.errors import InvalidRequestError
from chorus.core.fleet.events import LeasedRecord
from chorus.core.fleet.records import Feature, ModelStatus, Node, RunnerRecord, RunnerState, Tier

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
_PAGE_AFTER = "after:"
_TOKEN_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class NodeFilter:
    """Conditions on a runner; all that are set must hold. What is said of a model must hold for one and the same model.

    A label counts whether the node or the runner carries it.
    """

    model: str = ""  # a family's or an artifact's name
    labels: Mapping[str, str] = field(default_factory=dict)
    state: RunnerState | None = None
    features: frozenset[Feature] = frozenset()
    tier: Tier | None = None
    node_id: str = ""

    def matches(self, record: RunnerRecord) -> bool:
        """Whether `record` meets every condition."""
        if self.node_id and record.node.node_id != self.node_id:
            return False
        if self.state is not None and record.state is not self.state:
            return False
        for key, value in self.labels.items():
            if record.node.labels.get(key) != value and record.runner.labels.get(key) != value:
                return False
        if not (self.model or self.features or self.tier):
            return True
        return any(self._matches_model(model) for model in record.runner.models)

    def _matches_model(self, model: ModelStatus) -> bool:
        return (
            (not self.model or self.model in (model.artifact.family, model.artifact.name))
            and self.features <= model.features
            and (self.tier is None or model.artifact.tier is self.tier)
        )


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """A machine with those of its runners that match, by id. Where runners differ in what they say of the machine, the
    one heard from last is believed."""

    node: Node
    runners: tuple[LeasedRecord, ...]


@dataclass(frozen=True, slots=True)
class NodePage:
    """One page of nodes, ordered by node id. `next_page_token` is empty on the last one."""

    nodes: tuple[NodeEntry, ...]
    next_page_token: str


def list_nodes(
    runners: Iterable[LeasedRecord], *, condition: NodeFilter | None = None, page_size: int = 0, page_token: str = ""
) -> NodePage:
    """Groups `runners` by node and returns one page: at most `page_size` nodes (0: 100) after those of `page_token`.

    Pages are of the present state: a node that is there throughout is listed exactly once. Raises InvalidRequestError
    for a page size over 1000 or a token that is not from here.
    """
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise InvalidRequestError(
            "page_size", f"is {page_size}; ask for 1 to {MAX_PAGE_SIZE} nodes, or 0 for the default"
        )
    size = page_size or DEFAULT_PAGE_SIZE
    after = _decode_token(page_token)
    groups: dict[str, list[LeasedRecord]] = {}
    for leased in runners:
        node_id = leased.record.node.node_id
        if node_id > after and (condition is None or condition.matches(leased.record)):
            groups.setdefault(node_id, []).append(leased)
    ordered = sorted(groups)
    nodes = tuple(_entry(groups[node_id]) for node_id in ordered[:size])
    return NodePage(nodes, _encode_token(ordered[size - 1]) if len(ordered) > size else "")


def _entry(group: list[LeasedRecord]) -> NodeEntry:
    freshest = min(group, key=lambda leased: (leased.lease_age_s, leased.record.runner.runner_id))
    return NodeEntry(freshest.record.machine, tuple(sorted(group, key=lambda leased: leased.record.runner.runner_id)))


def _encode_token(node_id: str) -> str:
    return base64.urlsafe_b64encode((_PAGE_AFTER + node_id).encode()).decode("ascii")


def _decode_token(token: str) -> str:
    """The node id that the page before ended with; "" (which every node id is greater than) at the beginning."""
    if not token:
        return ""
    foreign = InvalidRequestError("page_token", "is not a next_page_token of ListNodes; start again without one")
    if len(token) > _TOKEN_MAX_LENGTH:
        raise foreign
    try:
        text = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        raise foreign from None
    if not text.startswith(_PAGE_AFTER) or _encode_token(text.removeprefix(_PAGE_AFTER)) != token:
        raise foreign
    return text.removeprefix(_PAGE_AFTER)
