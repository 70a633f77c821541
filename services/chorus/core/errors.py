"""The one exception tree of Chorus.

Every error that a caller may see is a `ChorusError`. `chorus.wire.errors` holds the one table that turns each class
into a gRPC status with `google.rpc.ErrorInfo` (and back, on the client's side). `reason` is the stable name
that programs may branch on; `str(error)` is for people and says what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ChorusError(Exception):
    """Root of the tree.

    `metadata` holds short facts for programs (never a prompt's text or a key); `retry_after_s` is set only where
    waiting that many seconds is known to help.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, metadata: Mapping[str, str] | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InternalError(ChorusError):
    """A defect of Chorus itself; the log beside the request id holds the traceback, the caller does not."""


# --- the request is wrong; sending it again unchanged cannot help --------------------------------------------------


class InvalidRequestError(ChorusError):
    """A field is missing, out of range or contradicts another; `metadata["field"]` names it."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", metadata={"field": field})


class MalformedMessageError(ChorusError):
    """The bytes are not a message of the expected type."""

    reason = "MALFORMED_MESSAGE"


class PromptTooLongError(ChorusError):
    """The prompt (and the tokens asked for) cannot fit the context of the model where it ran."""

    reason = "PROMPT_TOO_LONG"

    def __init__(self, prompt_tokens: int, context_length: int, *, model: str, at_least: bool = False) -> None:
        count = f"at least {prompt_tokens}" if at_least else str(prompt_tokens)
        super().__init__(
            f"the prompt has {count} tokens, but {model} has a context of {context_length} tokens; "
            "shorten the prompt or choose a model with a longer context",
            metadata={
                "prompt_tokens": str(prompt_tokens),
                "context_length": str(context_length),
                "model": model,
            },
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class UnknownModelError(ChorusError):
    """No runner, or no catalog, has that model; the message names those there are."""

    reason = "UNKNOWN_MODEL"


class NotFoundError(ChorusError):
    """A runner, lease, file or other named thing does not exist."""

    reason = "NOT_FOUND"


class UnknownLeaseError(NotFoundError):
    """The registry does not know this runner's incarnation; register again."""

    reason = "UNKNOWN_LEASE"


class UnsupportedFeatureError(ChorusError):
    """The request needs a feature that nothing able to serve it has; `metadata["feature"]` names it."""

    reason = "UNSUPPORTED_FEATURE"


class StaleIncarnationError(ChorusError):
    """A newer incarnation of this runner is registered; the older process must stop heartbeating."""

    reason = "STALE_INCARNATION"


# --- the mesh cannot serve it now -----------------------------------------------------------------------------------


class NoCapableRunnerError(ChorusError):
    """Runners live, but none of them can ever serve this request as asked (labels, tier, context, memory)."""

    reason = "NO_CAPABLE_RUNNER"


class RunnersUnavailableError(ChorusError):
    """Nobody who could serve this request is alive and reachable now."""

    reason = "RUNNERS_UNAVAILABLE"


class OverloadedError(ChorusError):
    """Queues are full; `retry_after_s` says when a place is likely."""

    reason = "OVERLOADED"


class SlowReaderError(ChorusError):
    """The caller does not read its stream."""

    reason = "SLOW_READER"


class BudgetExhaustedError(ChorusError):
    """Only a paid provider could serve this request, and the budget does not allow it; `metadata` has the figures."""

    reason = "BUDGET_EXHAUSTED"


class DrainingError(ChorusError):
    """This process is shutting down and takes no new work; another one will."""

    reason = "DRAINING"


class UnavailableError(ChorusError):
    """A peer could not be reached, or the connection to it broke."""

    reason = "UNAVAILABLE"


# --- models and engines ---------------------------------------------------------------------------------------------


class ModelFileError(ChorusError):
    """The file is corrupt, truncated, not GGUF, or does not match its SHA-256."""

    reason = "MODEL_FILE_INVALID"


class OutOfMemoryError(ChorusError):
    """Loading the model needs more memory than is free; the message holds both numbers."""

    reason = "OUT_OF_MEMORY"


class DownloadError(ChorusError):
    """A source refused, broke off or cannot be reached; what arrived is kept for resuming."""

    reason = "DOWNLOAD_FAILED"


class EngineError(ChorusError):
    """The engine failed while it worked on this request; the same request may succeed elsewhere."""

    reason = "ENGINE_FAILED"


# --- who is calling -------------------------------------------------------------------------------------------------


class UnauthenticatedError(ChorusError):
    """The caller showed no identity that this mesh knows."""

    reason = "UNAUTHENTICATED"


class RevokedError(UnauthenticatedError):
    """The caller's certificate, or all that it is, was revoked by an admin."""

    reason = "REVOKED"


class PermissionDeniedError(ChorusError):
    """The caller's role may not call this RPC, or not about that runner; or its key's scopes leave that out."""

    reason = "PERMISSION_DENIED"


class ApiKeyError(UnauthenticatedError):
    """The API key is damaged, or none of this mesh."""

    reason = "API_KEY_INVALID"


class ApiKeyExpiredError(ApiKeyError):
    """The API key was good until a time that has passed."""

    reason = "API_KEY_EXPIRED"


class ApiKeyRevokedError(ApiKeyError):
    """An admin took the API key back."""

    reason = "API_KEY_REVOKED"


class BearerTokenError(UnauthenticatedError):
    """The token of an identity provider is damaged, expired, or not meant for this mesh."""

    reason = "BEARER_TOKEN_INVALID"


class QuotaExceededError(ChorusError):
    """The caller has used what it may for now, or for good; `retry_after_s` says when there is more.

    `metadata["quota"]` names the limit, `metadata["limit"]` says how much it is.
    """

    reason = "QUOTA_EXCEEDED"


# --- joining a mesh, and staying in it -----------------------------------------------------------------------------


class TokenInvalidError(UnauthenticatedError):
    """The join token is not one of this mesh."""

    reason = "JOIN_TOKEN_INVALID"


class TokenUsedError(TokenInvalidError):
    """Somebody has joined with the token already."""

    reason = "JOIN_TOKEN_USED"


class TokenExpiredError(TokenInvalidError):
    """The token was good until a time that has passed."""

    reason = "JOIN_TOKEN_EXPIRED"


class TokenRevokedError(TokenInvalidError):
    """An admin took the token back."""

    reason = "JOIN_TOKEN_REVOKED"


class TokenNodeError(TokenInvalidError):
    """The token is good on another machine alone."""

    reason = "JOIN_TOKEN_NODE"


class NameTakenError(ChorusError):
    """Another machine has joined under that name."""

    reason = "NAME_TAKEN"


class NodeTakenError(NameTakenError):
    """Another member of the mesh is on the node that this one states."""

    reason = "NODE_TAKEN"


class RenewalError(UnauthenticatedError):
    """A certificate is not renewed for whoever asks; it has to join again."""

    reason = "RENEWAL_REFUSED"


# --- a ticket of direct mode, by which a runner would serve a client; a coordinator's relay needs none ---------------


class TicketError(ChorusError):
    """The ticket is damaged, or its signature is nobody's of this mesh."""

    reason = "TICKET_INVALID"


class TicketRequiredError(TicketError):
    """A client asks a runner without a ticket."""

    reason = "TICKET_REQUIRED"


class TicketGrantorError(TicketError):
    """Somebody of this mesh who is no coordinator signed the ticket."""

    reason = "TICKET_OF_NO_COORDINATOR"


class TicketCallerError(TicketError):
    """The ticket was granted to another caller."""

    reason = "TICKET_OF_ANOTHER_CALLER"


class TicketRequestError(TicketError):
    """The ticket was granted for another request than the one that it came with."""

    reason = "TICKET_FOR_ANOTHER_REQUEST"


class TicketRunnerError(TicketError):
    """The ticket is for another runner, or for an earlier life of this one."""

    reason = "TICKET_FOR_ANOTHER_RUNNER"


class TicketExpiredError(TicketError):
    """The ticket came too late."""

    reason = "TICKET_EXPIRED"


class TicketUsedError(TicketError):
    """The ticket was used before."""

    reason = "TICKET_USED"


# --- how a call ended -----------------------------------------------------------------------------------------------


class DeadlineExceededError(ChorusError):
    """The caller's deadline passed before the work was done."""

    reason = "DEADLINE_EXCEEDED"


class CancelledError(ChorusError):
    """The caller went away."""

    reason = "CANCELLED"


# --- this machine ---------------------------------------------------------------------------------------------------


class ConfigError(ChorusError):
    """A configured value is wrong; the message names the key, the value's problem and where it was set."""

    reason = "CONFIG_INVALID"


class CertificateError(ChorusError):
    """A certificate or key file is missing, unreadable, expired or not of this mesh."""

    reason = "CERTIFICATE_INVALID"
