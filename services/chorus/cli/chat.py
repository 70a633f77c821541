"""`chorus chat`: a conversation on the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from chorus.cli.answering import Answer, stream_text
from chorus.cli.connecting import Directory, Model, System
from chorus.cli.options import ConfigFile
from chorus.cli.output import err, note, show_error
from chorus.client import MeshClient
from chorus.config import ChorusConfig
from chorus.core.errors import ChorusError
from chorus.core.generation import Message, MessageRole, TextPart
from chorus.local.connect import client_config
from chorus.local.home import MeshHome

_PROMPT = "> "
_HISTORY_LINES = 1000
_HELP = """\
/model [NAME]   show the models, or change who answers
/system [TEXT]  show or change the instructions; they count from the next question on
/clear          forget the conversation
/save FILE      write the conversation to a file
/stats          show or hide who answered and how fast
/quit           leave (so does Ctrl-D)
Ctrl-C ends an answer. A line that ends with \\ goes on with the next one."""


@dataclass
class Chat:
    """A conversation, and what its next turn is asked with."""

    model: str = ""
    instructions: str = ""
    turns: list[Message] = field(default_factory=list)
    show_stats: bool = True

    def ask(self, text: str) -> None:
        """Adds the person's turn."""
        self.turns.append(Message(MessageRole.USER, (TextPart(text),)))

    def answered(self, text: str) -> None:
        """Adds the model's; without one, its question is taken back, since two in a row confuse templates."""
        if text:
            self.turns.append(Message(MessageRole.ASSISTANT, (TextPart(text),)))
        else:
            self.turns.pop()

    def to_markdown(self) -> str:
        """The conversation for a file."""
        opening = [("instructions", self.instructions)] if self.instructions else []
        turns = [(str(turn.role), _text(turn)) for turn in self.turns]
        return "\n".join(f"**{who}**\n\n{text}\n" for who, text in (*opening, *turns))


def chat(
    model: Model = "",
    system: System = "",
    directory: Directory = None,
    config: ConfigFile = None,
) -> None:
    """Talk with a model, turn by turn. /help shows what else can be typed.

    Ctrl-C ends an answer and not the chat; Ctrl-D leaves.
    """
    settings = client_config(MeshHome.find(directory), file=config)
    conversation = Chat(model=model, instructions=system)
    with _line_editing(), asyncio.Runner() as runner:
        mesh = runner.run(_open(settings))
        try:
            _greet(runner, mesh, conversation)
            _converse(runner, mesh, conversation)
        finally:
            runner.run(mesh.aclose())


async def _open(settings: ChorusConfig) -> MeshClient:
    return MeshClient.from_config(settings)


def _greet(runner: asyncio.Runner, mesh: MeshClient, conversation: Chat) -> None:
    """Finds out at once, and not with the first question, that there is no mesh."""
    models = runner.run(mesh.list_models())
    who = conversation.model or models.default_model or "any model"
    note(f"[dim]talking with {who}; /help shows what else can be typed[/]")


def _converse(runner: asyncio.Runner, mesh: MeshClient, conversation: Chat) -> None:
    while (line := _read()) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if not _command(line, runner, mesh, conversation):
                return
            continue
        conversation.ask(line)
        answer = Answer()
        try:
            runner.run(_answer(mesh, conversation, answer))
        except KeyboardInterrupt:
            note("[dim]ended; what came of it is part of the conversation[/]")
        except ChorusError as error:
            show_error(error.message)
        conversation.answered(answer.whole)


async def _answer(mesh: MeshClient, conversation: Chat, answer: Answer) -> None:
    generation = mesh.generate(conversation.turns, model=conversation.model, instructions=conversation.instructions)
    await stream_text(generation, answer)
    if conversation.show_stats:
        err().print(f"[dim]{answer.stats()}[/]", soft_wrap=True)


def _read() -> str | None:
    """One message: a line, or several where each but the last ends with a backslash. None at the end of input."""
    lines: list[str] = []
    while True:
        try:
            line = input(_PROMPT if not lines else "… ") if sys.stdin.isatty() else _next_line()
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            lines = []
            continue
        except EOFError:
            if sys.stdin.isatty():
                sys.stdout.write("\n")
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


# --- commands -------------------------------------------------------------------------------------------------------


def _command(line: str, runner: asyncio.Runner, mesh: MeshClient, conversation: Chat) -> bool:
    """Obeys a line that begins with a slash; returns whether the chat goes on."""
    name, _, rest = line[1:].partition(" ")
    if name in ("quit", "exit", "q"):
        return False
    commands: dict[str, Callable[[str], None]] = {
        "help": lambda _: note(_HELP.replace("[", "\\[")),
        "clear": lambda _: _clear(conversation),
        "system": lambda text: _system(conversation, text),
        "save": lambda text: _save(conversation, text),
        "stats": lambda _: _stats(conversation),
        "model": lambda text: _model(conversation, text, runner, mesh),
    }
    command = commands.get(name)
    if command is None:
        show_error(f"there is no /{name}", "/help shows what there is")
    else:
        command(rest.strip())
    return True


def _clear(conversation: Chat) -> None:
    conversation.turns.clear()
    note("[dim]forgotten[/]")


def _system(conversation: Chat, text: str) -> None:
    if text:
        conversation.instructions = text
    note(f"[dim]instructions: {conversation.instructions or 'none'}[/]")


def _stats(conversation: Chat) -> None:
    conversation.show_stats = not conversation.show_stats
    note(f"[dim]stats are {'shown' if conversation.show_stats else 'hidden'}[/]")


def _save(conversation: Chat, text: str) -> None:
    try:
        (name,) = shlex.split(text)
    except ValueError:
        show_error("/save needs the name of one file")
        return
    path = Path(name).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(conversation.to_markdown())
    except FileExistsError:
        show_error(f"{path} exists already; choose another name")
    except OSError as error:
        show_error(f"{path} cannot be written: {error.strerror or error}")
    else:
        note(f"[dim]saved to {path}[/]")


def _model(conversation: Chat, name: str, runner: asyncio.Runner, mesh: MeshClient) -> None:
    try:
        models = runner.run(mesh.list_models())
    except ChorusError as error:
        show_error(error.message)
        return
    names = {model.artifact.name: model.artifact.family for model in models.models}
    if name and name not in names and name not in names.values():
        show_error(f"no runner has {name}", f"there are {', '.join(names) or 'none'}")
        return
    conversation.model = name or conversation.model
    for artifact, family in names.items():
        current = conversation.model in (artifact, family) or (
            not conversation.model and models.default_model == artifact
        )
        note(f"{'*' if current else ' '} {artifact} [dim]{family}[/]")


# --- the keyboard ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a history that lasts, where the system has readline and a person types."""
    try:
        import readline
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    path = platformdirs.user_state_path("chorus") / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _text(turn: Message) -> str:
    return "".join(part.text for part in turn.parts if isinstance(part, TextPart))
