"""What may answer in place of a model, and what does: `chorus.api.coordinator.v1` and `chorus.core.generation`."""

from __future__ import annotations

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.core.generation import Fallback, Substitution


def encode_fallback(fallback: Fallback) -> pb.Fallback:
    """What may be done."""
    return pb.Fallback(
        similar_model=fallback.similar_model, external=fallback.external, cached_answer=fallback.cached_answer
    )


def decode_fallback(message: pb.Fallback) -> Fallback:
    """What may be done."""
    return Fallback(similar_model=message.similar_model, external=message.external, cached_answer=message.cached_answer)


def encode_substitution(substitution: Substitution) -> pb.Substitution:
    """What was done."""
    return pb.Substitution(
        requested_model=substitution.requested_model, model=substitution.model, reason=substitution.reason
    )


def decode_substitution(message: pb.Substitution) -> Substitution:
    """What was done."""
    return Substitution(message.requested_model, message.model, message.reason)
