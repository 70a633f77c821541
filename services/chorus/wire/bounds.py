"""How many things a request may hold, checked before any of them is looked at.

Requests are decoded on the event loop, where everything else waits meanwhile: a few megabytes of tiny parts take a
second. Long texts and lists of token ids cost next to nothing there, and are not bounded here.
"""

from __future__ import annotations

from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.core.errors import InvalidRequestError

MAX_PARTS = 20_000
MAX_TOOLS = 128
MAX_REQUIREMENTS = 256
MAX_STRUCT_BYTES = 512 * 1024


def check_bounds(message: pb.GenerationSpec) -> None:
    """Raises `InvalidRequestError` where a request holds so much that decoding it would take long."""
    if message.HasField("conversation"):
        messages = message.conversation.messages
        # Counted separately: a message without parts costs as much as one with.
        _at_most("conversation.messages", len(messages), MAX_PARTS)
        _at_most("conversation.messages.parts", sum(len(turn.parts) for turn in messages), MAX_PARTS)
    _at_most("tools", len(message.tools), MAX_TOOLS)
    structs = [message.conversation.template_variables, *(tool.parameters for tool in message.tools)]
    size = sum(struct.ByteSize() for struct in structs)
    if size > MAX_STRUCT_BYTES:
        field = "tools.parameters" if message.tools else "conversation.template_variables"
        raise InvalidRequestError(field, f"takes {size} bytes; at most {MAX_STRUCT_BYTES} are taken")
    if message.HasField("requirements"):
        _check_requirements(message.requirements)


def _check_requirements(needs: pb.Requirements) -> None:
    for name, values in (
        ("labels", needs.labels),
        ("tags", needs.tags),
        ("runner_ids", needs.runner_ids),
        ("node_ids", needs.node_ids),
    ):
        _at_most(f"requirements.{name}", len(values), MAX_REQUIREMENTS)


def _at_most(field: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequestError(field, f"has {count} entries; at most {most} are taken")
