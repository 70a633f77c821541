"""What each member of `adaptive.py`'s says to each item, recorded without a mesh, and what ensembles make of that.

Every answer is the likeliest one, as the benchmark asks for it, so it doesn't matter who else is asked: one recording
tells how any of the twelve fare together. The prompts, the members and what becomes of their answers are the
coordinator's own code (`core/ensemble`). Many items are decoded in one batch (`quality_record.py`), which rounds
otherwise than a runner's batches of few: where two tokens are all but equally likely an answer differs now and then.
How often is told by `adaptive.py`, from what it has asked live.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from quality_record import MOST_TOKENS, Output, Reader, append

from chorus.core.ensemble.choosing import Offer
from chorus.core.ensemble.machine import Ensemble, Give, PartAnswered
from chorus.core.ensemble.prompts import question_of
from chorus.core.ensemble.records import Answer
from chorus.core.ensemble.steps import Task, ask_member
from chorus.core.ensemble.strategies import STRATEGIES
from chorus.eval.dataset import Item
from chorus.models.gguf import inspect
from chorus.models.naming import stem_of

_SIZE = 48  # items of one family at a time


def record(models: Sequence[Path], tasks: Mapping[str, Task], items: Sequence[Item], place: Path) -> None:
    """Records every item that `place` lacks: the answers of the members that its task has, by the item's id. They name
    the files. With one thread: two wait for each other where others want the processors, too."""
    readers = {stem_of(path.name): Reader(path, threads=1, samples=0, size=_SIZE) for path in models}
    append(items, place, lambda chunk: _lines(readers, tasks, chunk), size=_SIZE)


def _lines(readers: Mapping[str, Reader], tasks: Mapping[str, Task], chunk: Sequence[Item]) -> Iterator[dict[str, Any]]:
    said: list[dict[str, Any]] = [{} for _ in chunk]
    for member in tasks[chunk[0].id].members:  # all items have the same ones
        prompts = [question_of(ask_member(tasks[item.id], member).request.prompt) for item in chunk]
        for own, (output,) in zip(said, readers[member.model].answers(prompts), strict=True):
            own[member.member_id] = {"text": output.text, "logprobs": _logprobs(output)}
    for item, own in zip(chunk, said, strict=True):
        yield {"id": item.id, "family": item.family, "answers": item.answers, "members": own}


def _logprobs(output: Output) -> list[float]:
    """Those that a runner tells: of all tokens, and of the end where the answer came to one."""
    return output.logprobs if len(output.logprobs) == MOST_TOKENS else [*output.logprobs, output.end]


def offers_of(models: Sequence[Path]) -> list[Offer]:
    """What a mesh that has these files offers: each model once."""
    found: dict[str, Offer] = {}
    for path in models:
        info = inspect(path)
        family = path.parent.name
        found[family] = Offer(
            family, info.tier, info.parameter_count, frozenset(info.capability_tags), loaded=True,
            artifacts=frozenset(stem_of(other.name) for other in models if other.parent.name == family),
        )  # fmt: skip
    return sorted(found.values(), key=lambda offer: (-offer.parameter_count, offer.model))


def replayed(task: Task, answers: Mapping[str, Answer], rng: Random) -> tuple[str, int]:
    """What an ensemble answers whose members say that, in an order of chance, and how many of them it waited for."""
    machine = Ensemble(task, STRATEGIES[task.strategy](task))
    waiting = [member.member_id for member in task.members]
    rng.shuffle(waiting)
    actions = machine.begin(0.0)
    while not machine.over:
        actions = machine.take(PartAnswered(answers[waiting.pop()]), 0.0)
    (given,) = [action for action in actions if isinstance(action, Give)]
    return answers[given.part_id].text, len(task.members) - len(waiting)


def answer_of(member_id: str, told: Mapping[str, Any], model: str) -> Answer:
    """A recorded answer as a part's."""
    logprobs = tuple(told["logprobs"])
    return Answer(member_id, told["text"], logprobs=logprobs or None, tokens=len(logprobs), model=model)
