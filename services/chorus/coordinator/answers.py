"""What a coordinator tells of its mesh, as messages: models, nodes, and why a request goes where it goes."""

from __future__ import annotations

from collections.abc import Iterable

from chorus.api.coordinator.v1 import coordinator_pb2 as pb
from chorus.coordinator.placing import Explanation
from chorus.coordinator.registries import RegistryHealth
from chorus.core.fleet.directory import Directory
from chorus.core.fleet.listing import NodePage
from chorus.core.fleet.records import Artifact
from chorus.core.placement import Needs, RejectionReason, detail
from chorus.wire.directory import encode_node_entry
from chorus.wire.resources import encode_artifact, encode_duration, encode_model_status

REJECTION_REASONS: dict[RejectionReason, pb.RejectionReason.ValueType] = {
    reason: pb.RejectionReason.Value(f"REJECTION_REASON_{reason.name}") for reason in RejectionReason
}


def encode_models(directory: Directory, default_model: str) -> pb.ListModelsResponse:
    """Each artifact of the mesh once, by family and name, with the runners that have it, by id."""
    artifacts: dict[tuple[str, str, str], Artifact] = {}
    places: dict[tuple[str, str, str], list[pb.ModelPlace]] = {}
    for runner_id, entry in sorted(directory.entries.items()):
        for status in entry.record.runner.models:
            artifact = status.artifact
            key = (artifact.family, artifact.name, artifact.sha256)
            artifacts.setdefault(key, artifact)
            places.setdefault(key, []).append(
                pb.ModelPlace(
                    node_id=entry.record.node.node_id,
                    runner_id=runner_id,
                    status=encode_model_status(status, with_artifact=False),
                )
            )
    return pb.ListModelsResponse(
        models=[
            pb.MeshModel(artifact=encode_artifact(artifact), places=places[key])
            for key, artifact in sorted(artifacts.items())
        ],
        default_model=default_model,
    )


def encode_nodes(
    page: NodePage, directory: Directory, *, epoch: int, registries: Iterable[RegistryHealth]
) -> pb.ListNodesResponse:
    """A page of nodes, and how the registries stand."""
    return pb.ListNodesResponse(
        nodes=[encode_node_entry(entry) for entry in page.nodes],
        next_page_token=page.next_page_token,
        epoch=epoch,
        revision=directory.version,
        synced=directory.synced,
        registries=[_encode_registry(registry) for registry in registries],
    )


def _encode_registry(health: RegistryHealth) -> pb.RegistryStatus:
    return pb.RegistryStatus(
        address=health.address,
        connected=health.connected,
        synced=health.synced,
        problem=health.problem,
        last_heard=None if health.last_heard_s is None else encode_duration(health.last_heard_s),
    )


def encode_explanation(needs: Needs, explanation: Explanation) -> pb.ExplainPlacementResponse:
    """Who would be chosen (the cheapest: the likeliest choice), and why nobody else."""
    candidates = explanation.survey.candidates
    error = explanation.error
    return pb.ExplainPlacementResponse(
        chosen_runner_id=candidates[0].runner_id if candidates else "",
        candidates=[
            pb.Candidate(
                node_id=candidate.node_id,
                runner_id=candidate.runner_id,
                artifact=candidate.model.artifact.name,
                cost=candidate.cost,
                terms=[pb.CostTerm(name=name, value=value) for name, value in candidate.terms],
            )
            for candidate in candidates
        ],
        rejected=[
            pb.Rejected(
                node_id=rejected.entry.record.node.node_id,
                runner_id=rejected.runner_id,
                reason=REJECTION_REASONS[rejected.miss.reason],
                detail=detail(needs, rejected.entry, rejected.miss),
            )
            for rejected in explanation.survey.rejected
        ],
        error_reason=error.reason if error is not None else "",
        error_message=error.message if error is not None else "",
    )
