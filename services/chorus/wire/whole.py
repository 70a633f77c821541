"""What whoever carries a generation over several attempts puts into its messages: a coordinator with runners, a client
with coordinators. What was delivered is `core/resilience/delivered.py`'s."""

from __future__ import annotations

from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.core.resilience.delivered import Delivered
from chorus.wire.generation import encode_delivered
from chorus.wire.resources import encode_duration


def ask_to_go_on(spec: pb.GenerationSpec, delivered: Delivered, *, seed: int | None, artifact_sha256: str) -> None:
    """Makes a request one for the rest of its answer: after what was delivered, with that seed, on that artifact.

    `seed` None leaves what the caller asked for. The model's name stays as it is.
    """
    spec.ClearField("prompt_logprobs")  # they were told before the first token
    del spec.resume.choices[:]
    spec.resume.choices.extend(map(encode_delivered, delivered.choices()))
    if seed is not None:
        spec.sampling.seed = seed
    if artifact_sha256:
        spec.requirements.artifact_sha256 = artifact_sha256


def check_counts(finished: pb.Finished, delivered: Delivered) -> list[int]:
    """How many tokens each choice has. Raises EngineError where less came than the message says."""
    return [delivered.token_count(outcome.choice, outcome.token_count) for outcome in finished.choices]


def tell_whole(finished: pb.Finished, counts: list[int], delivered: Delivered, *, arrived: float) -> None:
    """Makes Finished tell of the whole answer, where its sender knows but the last part; `arrived` is when it was
    asked for, by the clock of `delivered`."""
    for outcome, count in zip(finished.choices, counts, strict=True):
        outcome.token_count = count
    usage, timings = finished.usage, finished.timings
    usage.completion_token_count = sum(counts)
    if delivered.prompt_tokens:  # else the engine tells it at the end alone
        usage.prompt_token_count = delivered.prompt_tokens
        usage.cached_token_count = delivered.cached_tokens
    delivered.prompt_tokens = usage.prompt_token_count
    if delivered.first_at is not None and delivered.last_at is not None:
        decode_s = delivered.last_at - delivered.first_at
        timings.time_to_first_token.CopyFrom(encode_duration(delivered.first_at - arrived))
        timings.decode.CopyFrom(encode_duration(decode_s))
        timings.tokens_per_second = (delivered.output_tokens - 1) / decode_s if decode_s > 0 else 0.0
