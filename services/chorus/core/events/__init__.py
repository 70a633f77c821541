"""What happens in a mesh as a coordinator tells it: typed events, the latest of which are kept for whoever reads."""

from chorus.core.events.fleet import FleetEvents
from chorus.core.events.log import Batch, Bookmark, Cursor, EventLog, EventReader, Lost, LostReason, Told
from chorus.core.events.records import (
    KIND_OF,
    AttemptFailed,
    AttemptHedged,
    AttemptResumed,
    Detail,
    Event,
    EventFilter,
    EventKind,
    Outcome,
    RequestAdmitted,
    RequestFinished,
    RequestRefused,
    RunnerJoined,
    RunnerLost,
    Subject,
)

__all__ = [
    "KIND_OF",
    "AttemptFailed",
    "AttemptHedged",
    "AttemptResumed",
    "Batch",
    "Bookmark",
    "Cursor",
    "Detail",
    "Event",
    "EventFilter",
    "EventKind",
    "EventLog",
    "EventReader",
    "FleetEvents",
    "Lost",
    "LostReason",
    "Outcome",
    "RequestAdmitted",
    "RequestFinished",
    "RequestRefused",
    "RunnerJoined",
    "RunnerLost",
    "Subject",
    "Told",
]
