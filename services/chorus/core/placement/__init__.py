"""Which runner serves a request: what it needs, who has it, what it would cost there, and why nobody can."""

from chorus.core.placement.affinity import NO_TRACE, Affinity, PromptTrace, trace_of
from chorus.core.placement.capacity import NodeLoad, has_quiet_node, node_loads, slots_for
from chorus.core.placement.fit import NOTHING_MORE, Miss, RejectionReason, Situation, is_external
from chorus.core.placement.in_flight import InFlight
from chorus.core.placement.models import artifacts_of, default_model, families
from chorus.core.placement.needs import Needs, Work
from chorus.core.placement.patterns import Patterns
from chorus.core.placement.place import Candidate, Rejected, Survey, place, survey
from chorus.core.placement.refusal import detail, refusal
from chorus.core.placement.replicas import LoadReason, Replicas, Wanted, load_times
from chorus.core.placement.roster import Pool, Roster, pool_of
from chorus.core.placement.similar import FallingBack, KnownModel, KnownModels

__all__ = [
    "NOTHING_MORE",
    "NO_TRACE",
    "Affinity",
    "Candidate",
    "FallingBack",
    "InFlight",
    "KnownModel",
    "KnownModels",
    "LoadReason",
    "Miss",
    "Needs",
    "NodeLoad",
    "Patterns",
    "Pool",
    "PromptTrace",
    "Rejected",
    "RejectionReason",
    "Replicas",
    "Roster",
    "Situation",
    "Survey",
    "Wanted",
    "Work",
    "artifacts_of",
    "default_model",
    "detail",
    "families",
    "has_quiet_node",
    "is_external",
    "load_times",
    "node_loads",
    "place",
    "pool_of",
    "refusal",
    "slots_for",
    "survey",
    "trace_of",
]
