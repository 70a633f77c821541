"""Attempts at one generation that break off anywhere, say things again, or leave something out: for who carries it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from hypothesis import strategies as st

from chorus.api.coordinator.v1 import coordinator_pb2
from chorus.api.inference.v1 import generation_pb2 as pb
from chorus.api.runner.v1 import runner_pb2
from chorus.core.errors import UnavailableError

PROMPT_TOKENS = 9


@dataclass(frozen=True)
class Behaviour:
    """How one attempt goes: how many tokens a delta has, after how many messages it breaks off, and what is wrong."""

    step: int
    breaks_after: int
    repeats: int = 0
    skips: bool = False
    ends_early: bool = False


behaviours = st.builds(
    Behaviour,
    step=st.integers(1, 3),
    breaks_after=st.integers(0, 12),
    repeats=st.sampled_from([0, 0, 0, 1, 2]),
    skips=st.sampled_from([False] * 5 + [True]),
    ends_early=st.sampled_from([False] * 5 + [True]),
)


Request = runner_pb2.GenerateRequest | coordinator_pb2.GenerateRequest


def token(choice: int, index: int) -> int:
    return 1000 * (choice + 1) + index


def message(event: pb.GenerationEvent) -> bytes:
    return runner_pb2.GenerateResponse(event=event).SerializeToString()


async def engine(request: Request, lengths: list[int], behaviour: Behaviour) -> AsyncIterator[bytes]:
    """A runner that goes on from what it is given, one choice after the other, and does what is wrong with it."""
    had = {choice.choice: list(choice.token_ids) for choice in request.spec.resume.choices}
    for choice, ids in had.items():
        assert ids == [token(choice, index) for index in range(len(ids))], "it is asked to go on from something else"
    events = [
        pb.GenerationEvent(progress=pb.Progress(phase=pb.PHASE_PREFILL, done=1, total=2)),
        pb.GenerationEvent(started=pb.Started(seed=5, prompt_token_count=PROMPT_TOKENS, attempt=request.attempt)),
    ]
    for choice, length in enumerate(lengths):
        index = max(0, len(had.get(choice, [])) - behaviour.repeats)
        if behaviour.skips and index < length:
            index += 1
        while index < length:
            # What it says again are whole deltas, as those of a runner that did not know where to go on.
            known = len(had.get(choice, []))
            end = min(index + behaviour.step, length, known if index < known else length)
            ids = [token(choice, place) for place in range(index, end)]
            events.append(
                pb.GenerationEvent(
                    delta=pb.TokenDelta(choice=choice, index=index, token_ids=ids, text="".join(f"{i} " for i in ids))
                )
            )
            index = end
        if behaviour.ends_early:
            break
    outcomes = [pb.ChoiceOutcome(choice=choice, token_count=length) for choice, length in enumerate(lengths)]
    usage = pb.Usage(prompt_token_count=PROMPT_TOKENS, completion_token_count=sum(lengths))
    events.append(pb.GenerationEvent(finished=pb.Finished(choices=outcomes, usage=usage)))
    for event in events[: behaviour.breaks_after]:
        yield message(event)
    if behaviour.breaks_after < len(events):
        raise UnavailableError("broke off")
