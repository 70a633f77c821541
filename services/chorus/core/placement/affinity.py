"""Who has read a prompt's beginning already, as far as a coordinator can guess: the prefixes of what it sent where.

A runner keeps what it computed of recent prompts, so the next turn of a conversation costs least where the last one
was. The coordinator knows no tokens, so it goes by text: a prompt is cut into blocks, each block is named by a hash of
the whole prompt up to its end, and an index tells which runners were sent a prompt that begins so. It is the radix tree
of SGLang's router (L. Zheng et al., "SGLang", 2024), flattened: a node is a hash, an edge is the next block.

This is a guess in every respect, so it is worth exactly what it saves: the seconds of reading what need not be read
again. Nobody is sent anywhere for affinity's sake once waiting there costs more.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from chorus.core.generation import Conversation, GenerationRequest, ImagePart, TextPrompt, TokenPrompt, ToolCall
from chorus.core.placement.needs import LIKELY_CHARACTERS_PER_TOKEN

Place: TypeAlias = tuple[str, str]
"""A runner and an artifact, by id and name."""

BLOCK_TOKENS = 128
_BLOCK_BYTES = BLOCK_TOKENS * LIKELY_CHARACTERS_PER_TOKEN
# What is longer is told apart no further; it is long enough to know its runner by.
MAX_BLOCKS = 256
# Of a prefix that everybody has, such as a common system prompt, only the latest few are remembered.
MAX_PLACES = 4
_IMAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PromptTrace:
    """A prompt as affinity sees it: a hash for each of its blocks, of everything up to the block's end.

    `session` is the caller's name for the conversation, or empty; `tokens` about how long the prompt is.
    """

    blocks: tuple[bytes, ...] = ()
    session: str = ""
    tokens: int = 0


NO_TRACE = PromptTrace()


def trace_of(request: GenerationRequest, tokens: int) -> PromptTrace:
    """The trace of a generation's prompt, of about `tokens` tokens. Prompts that begin alike have traces that do."""
    blocks: list[bytes] = []
    state = hashlib.blake2b(digest_size=8)
    size = _BLOCK_BYTES
    pieces = _pieces(request)
    if isinstance(request.prompt, TokenPrompt):
        size = BLOCK_TOKENS * 4
    room = size
    for piece in pieces:
        start = 0
        while len(piece) - start >= room:
            state.update(piece[start : start + room])
            blocks.append(state.digest())
            if len(blocks) == MAX_BLOCKS:
                return PromptTrace(tuple(blocks), request.session_id, tokens)
            start, room = start + room, size
        state.update(piece[start:])
        room -= len(piece) - start
    return PromptTrace(tuple(blocks), request.session_id, tokens)


def _pieces(request: GenerationRequest) -> Iterator[bytes]:
    """The prompt's bytes, about in the order in which a template writes them, in pieces."""
    prompt = request.prompt
    if isinstance(prompt, TokenPrompt):
        yield b"\0ids" + request.adapter.encode() + b"\0"
        yield array("I", prompt.token_ids[: MAX_BLOCKS * BLOCK_TOKENS]).tobytes()
        return
    yield request.adapter.encode() + b"\0"
    for tool in request.tools:
        yield f"{tool.name}\0{tool.description}\0".encode()
    if isinstance(prompt, TextPrompt):
        yield prompt.text[: MAX_BLOCKS * _BLOCK_BYTES].encode(errors="replace")
        return
    yield from _conversation_pieces(prompt)


def _conversation_pieces(conversation: Conversation) -> Iterator[bytes]:
    for message in conversation.messages:
        yield b"\1" + message.role.encode()
        for part in message.parts:
            if isinstance(part, ImagePart):
                yield b"%d\0" % len(part.data) + part.data[:_IMAGE_BYTES]
            elif isinstance(part, ToolCall):
                yield f"{part.name}\0{part.arguments_json}".encode(errors="replace")
            else:
                yield part.text.encode(errors="replace")


class Affinity:
    """Which prompts were sent where. At most `max_blocks` blocks and as many sessions are remembered, the latest."""

    def __init__(self, *, max_blocks: int = 32_768) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[bytes, dict[Place, int]] = OrderedDict()  # with the runner's incarnation
        self._sessions: OrderedDict[str, tuple[Place, int, int]] = OrderedDict()  # incarnation, tokens
        self._lives: dict[str, int] = {}

    def sent(self, place: Place, incarnation: int, trace: PromptTrace) -> None:
        """A prompt was sent to a runner, which will have its blocks from now on."""
        self._lives.setdefault(place[0], incarnation)
        # The last block first: what is forgotten first is the end of a prompt, never its beginning alone.
        for block in reversed(trace.blocks):
            places = self._blocks.get(block)
            if places is None:
                places = self._blocks[block] = {}
            else:
                places.pop(place, None)
                self._blocks.move_to_end(block)
            places[place] = incarnation
            if len(places) > MAX_PLACES:
                del places[next(iter(places))]
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
        if trace.session:
            self._sessions[trace.session] = (place, incarnation, trace.tokens)
            self._sessions.move_to_end(trace.session)
            if len(self._sessions) > self._max_blocks:
                self._sessions.popitem(last=False)

    def shared(self, trace: PromptTrace) -> Mapping[Place, int]:
        """About how many tokens of a prompt need not be read again, by runner and artifact; never more than it has.

        A session is taken to go on where it was, so what is counted of it is all that it had then.
        """
        known: list[dict[Place, int]] = []
        for block in trace.blocks:
            places = self._blocks.get(block)
            if places is None:
                break
            known.append(places)
        found: dict[Place, int] = {}
        for depth in range(len(known), 0, -1):  # whoever has the most of it, first
            places = known[depth - 1]
            if places.keys() <= found.keys():  # mostly: who has a block has those before it
                continue
            for place, incarnation in places.items():
                if place not in found and self._lives.get(place[0]) == incarnation:
                    found[place] = min(depth * BLOCK_TOKENS, trace.tokens)
        if trace.session and trace.session in self._sessions:
            place, incarnation, before = self._sessions[trace.session]
            if self._lives.get(place[0]) == incarnation:
                found[place] = max(found.get(place, 0), min(before, trace.tokens))
        return found

    def incarnated(self, runner_id: str, incarnation: int) -> None:
        """This incarnation of a runner lives; another process has nothing in memory."""
        self._lives[runner_id] = incarnation

    def forget(self, runner_id: str) -> None:
        """The runner left the directory."""
        self._lives.pop(runner_id, None)
