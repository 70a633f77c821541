"""Tickets of direct mode between their messages and core types."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from chorus.api.identity.v1 import ticket_pb2
from chorus.api.inference.v1 import generation_pb2
from chorus.api.runner.v1 import runner_pb2
from chorus.core.errors import TicketError
from chorus.core.identity.tickets import Ticket, TicketUse
from chorus.wire.resources import decode_duration, encode_duration


@dataclass(frozen=True, slots=True)
class Signed:
    """A ticket's bytes with their signature; `certificates` are DER, the grantor's first."""

    ticket: bytes
    certificates: tuple[bytes, ...]
    signature: bytes


def spec_sha256(spec: generation_pb2.GenerationSpec) -> bytes:
    """The digest that binds a ticket to its request.

    Both who grants and who checks parse the client's message and encode it again, so that it does not matter how a
    client's language encodes maps, defaults and the order of fields.
    """
    return hashlib.sha256(spec.SerializeToString(deterministic=True)).digest()


def encode_ticket(ticket: Ticket) -> bytes:
    """The bytes that are signed."""
    message = ticket_pb2.Ticket(
        ticket_id=ticket.ticket_id,
        caller=ticket.caller,
        runner_id=ticket.runner_id,
        incarnation=ticket.incarnation,
        spec_sha256=ticket.spec_sha256,
        artifact=ticket.artifact,
        reserved_token_count=ticket.reserved_tokens,
    )
    message.expires_at.FromNanoseconds(round(ticket.expires_at * 1e9))
    return message.SerializeToString()


def decode_ticket(raw: bytes) -> Ticket:
    """What signed bytes say. Raises TicketError where they are no ticket."""
    try:
        message = ticket_pb2.Ticket.FromString(raw)
    except DecodeError:
        raise TicketError("what is signed is no ticket") from None
    expires = message.expires_at
    return Ticket(
        ticket_id=message.ticket_id,
        caller=message.caller,
        runner_id=message.runner_id,
        incarnation=message.incarnation,
        spec_sha256=message.spec_sha256,
        artifact=message.artifact,
        reserved_tokens=message.reserved_token_count,
        expires_at=expires.seconds + expires.nanos / 1e9,
    )


def encode_signed(ticket: bytes, certificates: Sequence[bytes], signature: bytes) -> bytes:
    """What a client is given."""
    return ticket_pb2.SignedTicket(ticket=ticket, certificates=certificates, signature=signature).SerializeToString()


def decode_signed(raw: bytes) -> Signed:
    """What a client shows. Raises TicketError where it is damaged."""
    try:
        message = ticket_pb2.SignedTicket.FromString(raw)
    except DecodeError:
        raise TicketError("the ticket is damaged: pass on the bytes that Place gave as they are") from None
    return Signed(message.ticket, tuple(message.certificates), message.signature)


def encode_use(use: TicketUse) -> runner_pb2.TicketUse:
    """What has become of a ticket."""
    if not use.ended:
        return runner_pb2.TicketUse(ticket_id=use.ticket_id)
    usage = generation_pb2.Usage(
        prompt_token_count=use.prompt_tokens,
        cached_token_count=use.cached_tokens,
        completion_token_count=use.output_tokens,
    )
    return runner_pb2.TicketUse(
        ticket_id=use.ticket_id,
        ended=True,
        reason=use.reason,
        usage=usage,
        time_to_first_token=None if use.first_token_s is None else encode_duration(use.first_token_s),
        duration=encode_duration(use.seconds),
    )


def decode_use(message: runner_pb2.TicketUse) -> TicketUse:
    """What has become of a ticket."""
    return TicketUse(
        ticket_id=message.ticket_id,
        ended=message.ended,
        reason=message.reason,
        prompt_tokens=message.usage.prompt_token_count,
        cached_tokens=message.usage.cached_token_count,
        output_tokens=message.usage.completion_token_count,
        first_token_s=decode_duration(message.time_to_first_token) if message.HasField("time_to_first_token") else None,
        seconds=decode_duration(message.duration),
    )
