"""Affinity beside the plain truth: the longest beginning that a prompt shares with what was sent somewhere."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from chorus.core.generation import (
    Conversation,
    GenerationRequest,
    ImagePart,
    Message,
    MessageRole,
    Prompt,
    TextPart,
    TextPrompt,
    TokenPrompt,
    ToolCall,
)
from chorus.core.placement.affinity import BLOCK_TOKENS, MAX_BLOCKS, MAX_PLACES, Affinity, PromptTrace, trace_of

BLOCK = BLOCK_TOKENS * 4  # characters
PLACES = (("r1", "a"), ("r1", "b"), ("r2", "a"))


def trace(prompt: Prompt | str, *, tokens: int = 10**6, session: str = "") -> PromptTrace:
    if isinstance(prompt, str):
        prompt = TextPrompt(prompt)
    return trace_of(GenerationRequest("", prompt, session_id=session), tokens)


def named(*letters: int) -> PromptTrace:
    """A trace with one block a letter, each standing for all before it."""
    blocks = tuple(bytes(letters[: end + 1]) for end in range(len(letters)))
    return PromptTrace(blocks, "", len(letters) * BLOCK_TOKENS)


prompts = st.lists(st.integers(0, 2), max_size=5).map(lambda letters: named(*letters))


@given(st.lists(st.tuples(st.sampled_from(PLACES), prompts), max_size=12), prompts)
def test_what_is_shared_is_the_longest_common_beginning(
    sent: list[tuple[tuple[str, str], PromptTrace]], asked: PromptTrace
) -> None:
    affinity = Affinity()
    truth: dict[tuple[str, str], int] = {}
    for place, prompt in sent:
        affinity.sent(place, 1, prompt)
        common = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt.blocks, asked.blocks, strict=False))
        )
        if common:
            truth[place] = max(truth.get(place, 0), common * BLOCK_TOKENS)
    assert affinity.shared(asked) == truth
    affinity.forget("r1")
    assert affinity.shared(asked) == {place: tokens for place, tokens in truth.items() if place[0] != "r1"}


@given(st.text(max_size=BLOCK * 3), st.text(max_size=BLOCK * 2))
def test_a_longer_prompt_has_the_blocks_of_its_beginning(text: str, more: str) -> None:
    short, long = trace(text).blocks, trace(text + more).blocks
    assert long[: len(short)] == short


def test_blocks_of_every_kind_of_prompt() -> None:
    letters = "x" * BLOCK
    assert len(trace(letters * 3).blocks) == 3
    assert trace("").blocks == ()
    assert len(trace("x" * BLOCK * (MAX_BLOCKS + 50)).blocks) == MAX_BLOCKS
    ids = tuple(range(3 * BLOCK_TOKENS))
    longer, shorter = trace(TokenPrompt((*ids, 7))).blocks, trace(TokenPrompt(ids[:-9])).blocks
    assert (len(longer), longer[:2]) == (3, shorter)
    talk = Conversation((Message(MessageRole.USER, (TextPart(letters),)),))
    answered = Conversation(
        (
            *talk.messages,
            Message(MessageRole.ASSISTANT, (ToolCall("1", "look", letters), ImagePart(b"p" * 9000, "png"))),
        )
    )
    assert trace(answered).blocks[:1] == trace(talk).blocks
    assert len(trace(answered).blocks) > 5
    assert trace("\ud800" * BLOCK).blocks  # half a character, as JSON may hold


def test_a_session_goes_on_where_it_was_whatever_its_prompt_begins_with() -> None:
    affinity = Affinity()
    affinity.sent(("r1", "a"), 1, trace("short", tokens=40, session="s"))
    assert affinity.shared(trace("else", tokens=90, session="s")) == {("r1", "a"): 40}
    assert affinity.shared(trace("else", tokens=30, session="s")) == {("r1", "a"): 30}
    assert affinity.shared(trace("short", tokens=90, session="t")) == {}
    affinity.sent(("r2", "a"), 1, trace("short", tokens=50, session="s"))
    assert affinity.shared(trace("else", tokens=90, session="s")) == {("r2", "a"): 50}


def test_another_process_has_nothing_in_memory() -> None:
    affinity = Affinity()
    affinity.sent(("r1", "a"), 1, named(1))
    affinity.incarnated("r1", 2)
    assert affinity.shared(named(1)) == {}
    affinity.sent(("r1", "a"), 2, named(1))
    assert affinity.shared(named(1)) == {("r1", "a"): BLOCK_TOKENS}


def test_what_is_remembered_is_bounded_and_the_oldest_is_forgotten() -> None:
    affinity = Affinity(max_blocks=10)
    for number in range(30):
        affinity.sent(("r1", "a"), 1, named(number, 0, 0))
    assert affinity.shared(named(29, 0, 0)) == {("r1", "a"): 3 * BLOCK_TOKENS}
    assert affinity.shared(named(0, 0, 0)) == {}
    # Of a prompt that is half forgotten, the beginning is what is left.
    assert affinity.shared(named(26, 0, 0)) == {("r1", "a"): BLOCK_TOKENS}


def test_of_a_common_beginning_only_the_latest_places_count() -> None:
    affinity = Affinity()
    for number in range(50):
        affinity.sent((f"r{number:02}", "a"), 1, named(1))
    assert sorted(affinity.shared(named(1))) == [(f"r{number}", "a") for number in range(50 - MAX_PLACES, 50)]
