"""A world for ensembles: parts that answer, fail or say nothing, in an order that the test draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from chorus.core.ensemble.machine import (
    Action,
    AskPart,
    CancelPart,
    Conclude,
    Ensemble,
    Fail,
    Give,
    PartAnswered,
    PartBegun,
    PartFailed,
    PartPlaced,
    TimePassed,
)
from chorus.core.ensemble.records import Answer, Member, Strategy
from chorus.core.ensemble.steps import Ask, StrategySteps, Task
from chorus.core.ensemble.waves import Room
from chorus.core.errors import UnavailableError
from chorus.core.generation import Conversation, GenerationRequest, Message, MessageRole, TextPart

Says = Callable[[Ask], str | None]
"""What a part answers; None: it fails."""


def request(question: str = "Which?") -> GenerationRequest:
    return GenerationRequest(model="", prompt=Conversation((Message(MessageRole.USER, (TextPart(question),)),)))


def task_of(strategy: Strategy, members: Sequence[Member], **more: object) -> Task:
    return Task(request(), strategy, tuple(members), aggregator_model="great", **more)  # type: ignore[arg-type]


def text_asked(ask: Ask) -> str:
    """All that a part is told."""
    assert isinstance(ask.request.prompt, Conversation)
    return "\n".join(
        part.text for turn in ask.request.prompt.messages for part in turn.parts if isinstance(part, TextPart)
    )


@dataclass
class World:
    """Carries an ensemble's actions out, and checks what must always hold of them."""

    task: Task
    strategy: StrategySteps
    says: Says
    room: Room = field(default_factory=Room)
    now: float = 100.0
    running: dict[str, Ask] = field(default_factory=dict)
    asked: dict[str, Ask] = field(default_factory=dict)
    answered: dict[str, Answer] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    final: Give | Conclude | Fail | None = None
    given: str = ""

    def __post_init__(self) -> None:
        self.machine = Ensemble(self.task, self.strategy(self.task), self.room)
        self._carry_out(self.machine.begin(self.now))

    def ends(self, part_id: str) -> None:
        """A part comes to its end."""
        ask = self.running[part_id]
        text = self.says(ask)
        self._carry_out(self.machine.take(PartPlaced(part_id, "node", "runner", ask.request.model), self.now))
        del self.running[part_id]
        if text is None:
            self.failed.add(part_id)
            self._carry_out(self.machine.take(PartFailed(part_id, UnavailableError("gone")), self.now))
        else:
            answer = Answer(part_id, text, logprobs=(-0.1,), tokens=3)
            self.answered[part_id] = answer
            self._carry_out(self.machine.take(PartAnswered(answer), self.now))

    def speaks(self, part_id: str) -> None:
        """The first words of the final part are streamed."""
        self._carry_out(self.machine.take(PartBegun(part_id), self.now))

    def passes(self, seconds: float) -> None:
        """Nothing happens for so long."""
        self.now += seconds
        due = self.machine.look_at
        if due is not None and self.now >= due:
            self._carry_out(self.machine.take(TimePassed(), self.now))

    def run(self) -> Give | Conclude | Fail:
        """Every part ends in the order in which it was asked."""
        while self.final is None:
            self.ends(next(iter(self.running)))
        return self.final

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            assert self.final is None, "nothing comes after the end"
            match action:
                case AskPart(ask):
                    assert ask.part_id not in self.asked, "asked once"
                    self.asked[ask.part_id] = self.running[ask.part_id] = ask
                case CancelPart(part_id):
                    del self.running[part_id]
                    self.cancelled.add(part_id)
                case Give() | Conclude():
                    self.final = action
                    self.given = self.answered[action.part_id].text
                case Fail():
                    self.final = action
        models = Counter(ask.request.model for ask in self.running.values())
        assert all(count <= self.room.slots.get(model, count) for model, count in models.items())
        assert not self.room.models_at_once or len(models) <= self.room.models_at_once
        assert (self.final is not None) is self.machine.over
        assert self.final is None or not self.running, "whoever isn't needed is cancelled"
        assert self.final is not None or self.running, "somebody is waited for"
