"""What a request to generate may not ask for, whatever the model."""

from __future__ import annotations

from chorus.core.errors import InvalidRequestError, UnsupportedFeatureError
from chorus.core.fleet.records import Feature
from chorus.core.generation import Dry, GenerationRequest, ToolChoice

_MOST_BREAKERS = 64  # each is looked for in every token


def check_request(request: GenerationRequest) -> None:
    """What no engine may be given; a caller past the wire's own checks gets these as errors, not as crashes.

    Raises `InvalidRequestError` and `UnsupportedFeatureError`.
    """
    if request.tools and request.tool_choice is ToolChoice.REQUIRED:
        raise UnsupportedFeatureError(
            "this engine cannot force a model to call a tool", metadata={"feature": Feature.TOOLS.value}
        )
    if request.constraint is not None and request.stop.ignore_eos:
        raise InvalidRequestError("ignore_eos", "a constrained answer ends where its form is complete")
    if not 1 <= request.choice_count <= 128:
        raise InvalidRequestError("choice_count", "must be 1 to 128")
    for delivered in request.resume:
        if not 0 <= delivered.choice < request.choice_count:
            raise InvalidRequestError("resume", f"choice {delivered.choice} is not one of {request.choice_count}")
        if delivered.text and not delivered.token_ids:
            raise UnsupportedFeatureError(
                "this engine resumes from token ids, not from text", metadata={"feature": Feature.RESUME.value}
            )
    for field, count in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if count is not None and not 0 <= count <= 20:
            raise InvalidRequestError(field, "must be 0 to 20")
    if request.context_shift and request.stop.max_tokens is None:
        raise InvalidRequestError(
            "max_tokens", "must be set where the oldest tokens may go: nothing else ends the answer"
        )
    if request.stop.max_tokens is not None and request.stop.max_tokens < 0:
        raise InvalidRequestError("max_tokens", "cannot be negative")
    sampling = request.sampling
    if sampling.seed is not None and not 0 <= sampling.seed < 2**64:
        raise InvalidRequestError("seed", "must fit 64 bits")
    numbers = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.typical_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        *sampling.logit_bias.values(),
        *((sampling.dry.multiplier, sampling.dry.base) if sampling.dry is not None else ()),
        *((sampling.xtc.probability, sampling.xtc.threshold) if sampling.xtc is not None else ()),
    )
    if not all(abs(number) < 1e6 for number in numbers):
        raise InvalidRequestError("sampling", "holds a number that is not finite or out of all bounds")
    if sampling.top_k < 0 or sampling.penalty_window < 0 or sampling.repetition_penalty <= 0 or sampling.top_p <= 0:
        raise InvalidRequestError("sampling", "holds a number out of its range")
    if sampling.dry is not None:
        _check_dry(sampling.dry)


def _check_dry(dry: Dry) -> None:
    if dry.base < 1.0 or dry.allowed_length < 0 or (dry.window is not None and dry.window < 0):
        raise InvalidRequestError("sampling.dry", "holds a number out of its range")
    if len(dry.sequence_breakers) > _MOST_BREAKERS:
        raise InvalidRequestError(
            "sampling.dry.sequence_breakers", f"has {len(dry.sequence_breakers)}; at most {_MOST_BREAKERS} are taken"
        )
