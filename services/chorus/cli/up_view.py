"""How `chorus up` looks: what happens, line by line, and the summary of a mesh that answers."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from chorus.cli.output import console, err, print_json
from chorus.core.identity import Role
from chorus.core.resilience.restarts import ProcessPhase, StartAgain
from chorus.local.events import Ended, Ready, Serving, Silent, Started, Stopped, Stopping, SupervisorEvent
from chorus.local.home import MeshHome
from chorus.local.lan import private_addresses
from chorus.local.ports import Ports
from chorus.local.state import MeshState


class UpView:
    """Tells one person (or, as JSON lines, one program) what a supervisor does."""

    def __init__(self, home: MeshHome, *, as_json: bool, in_foreground: bool = True) -> None:
        self._home = home
        self.as_json = as_json
        self._in_foreground = in_foreground
        self._waiting: dict[str, None] = {}
        self._spinner: Status | None = None
        self._began = time.monotonic()
        self._stopping = False
        self.ready = False

    def begin(self, names: list[str]) -> None:
        """Says what is being started."""
        self._waiting = dict.fromkeys(names)
        self._began = time.monotonic()
        if not self.as_json and err().is_terminal:
            self._spinner = err().status(self._progress(), spinner="dots")
            self._spinner.start()

    def end(self) -> None:
        """Clears what is only good while one waits."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def see(self, event: SupervisorEvent) -> None:
        """Shows an event."""
        if isinstance(event, Serving):
            self.serves(event.name)
        line = None if self.as_json else self._line(event)
        self._stopping = self._stopping or isinstance(event, Stopping)
        if isinstance(event, Ready):
            self.summarize(event.state)
        elif self.as_json:
            print_json({"time": _now(), "event": type(event).__name__.lower(), **_json(event)}, lines=True)
        elif line is not None:
            err().print(line, soft_wrap=True)

    def look(self, state: MeshState) -> None:
        """Sees how far a mesh that is started elsewhere has come."""
        for process in state.processes:
            if process.phase == ProcessPhase.HEALTHY:
                self.serves(process.name)

    def serves(self, name: str) -> None:
        """One process less to wait for."""
        self._waiting.pop(name, None)
        if self._spinner is not None:
            self._spinner.update(self._progress())

    def summarize(self, state: MeshState, *, already: bool = False) -> None:
        """Shows a mesh that answers."""
        self.end()
        self.ready = True
        if self.as_json:
            print_json({"time": _now(), "event": "ready", "already_up": already, **asdict(state)}, lines=True)
            return
        if not already:
            err().print(f"[green]ready[/] [dim]after {time.monotonic() - self._began:.1f} s[/]")
        console().print(summary(state, self._home))
        if self._in_foreground and not already:
            err().print("[dim]Ctrl-C stops it all.[/]")

    def _progress(self) -> Text:
        if not self._waiting:
            return Text("waiting for a first answer")
        return Text(f"starting {', '.join(self._waiting)}")

    def _line(self, event: SupervisorEvent) -> RenderableType | None:
        stamp = Text(time.strftime("%H:%M:%S "), style="dim") if self.ready else Text()
        match event:
            case Started(name=name, pid=pid, again=True):
                return Text.assemble(stamp, (name, "bold"), f" runs again (process {pid})")
            case Serving(name=name) if self.ready:
                return Text.assemble(stamp, (name, "bold"), " serves again")
            case Silent(name=name, pid=pid, silent_s=silent_s):
                why = (
                    f" (process {pid}) has answered nothing for {silent_s:.0f} s: it is stopped or hangs, and is killed"
                )
                return Text.assemble(stamp, (name, "bold"), (why, "yellow"))
            case Ended():
                return _ended(stamp, event)
            case Stopping(name=name, grace_s=grace_s):
                patience = (
                    f" (running answers get up to {grace_s:.0f} s; Ctrl-C again cuts them off)" if grace_s else ""
                )
                return Text.assemble("stopping ", (name, "bold"), (patience if not self._stopping else "", "dim"))
            case Stopped(name=name, politely=False):
                return Text.assemble((name, "bold"), " did not end in time and was killed")
        return None


def summary(state: MeshState, home: MeshHome) -> Group:
    """What there is to know of a mesh: addresses, models, logs, and what to do next."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for process in state.processes:
        down = process.phase == "down"
        table.add_row(
            Text(process.name, style="bold red" if down else "bold"),
            process.address,
            Text(f"left down: {process.last_end}", style="red") if down else Text(_pid(process), style="dim"),
        )
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_row("[dim]models[/]", ", ".join(state.models) or "none")
    facts.add_row("[dim]certificates[/]", "none: plaintext on loopback" if state.insecure_loopback else state.certs_dir)
    facts.add_row("[dim]logs[/]", str(home.log_file("*")))
    # What the commands find by themselves need not be said to them.
    elsewhere = "" if MeshHome.find() == home else f" --dir {shlex.quote(str(home.root))}"
    commands = (f'ask{elsewhere} "Why is the sky blue?"', f"status{elsewhere} --watch", f"down{elsewhere}")
    hints = [Text(f"  chorus {command}", style="cyan") for command in commands]
    return Group(
        table, Text(), facts, *_for_other_machines(state, elsewhere), Text(), Text("next", style="dim"), *hints
    )


def _for_other_machines(state: MeshState, elsewhere: str) -> list[RenderableType]:
    """What to open in a firewall and how to join, where the mesh serves more than this machine."""
    ip = state.processes[0].address.rpartition(":")[0]
    network = next((address.network for address in private_addresses() if address.ip == ip), None)
    if network is None:
        return []
    ports = {process.name: process.address.rpartition(":")[2] for process in state.processes}
    for process in state.processes:
        if process.role == Role.IDENTITY:
            ports["to join"] = str(Ports.join_beside(int(ports[process.name])))
    listed = ", ".join(f"{port} ({name})" for name, port in ports.items())
    return [
        Text(),
        Text(f"for other machines of {network}, open these TCP ports of {ip}: {listed}"),
        Text(f"    sudo ufw allow from {network} to {ip} port {','.join(ports.values())} proto tcp", style="cyan"),
        Text("a machine there joins by the line that this prints:", style="dim"),
        Text(f"    chorus token create --role runner{elsewhere}", style="cyan"),
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _pid(process: Any) -> str:
    return f"process {process.process.pid}" if process.process is not None else process.phase


def _ended(stamp: Text, event: Ended) -> RenderableType:
    head = Text.assemble(stamp, (event.name, "bold"), f" {event.how}; ")
    match event.decision:
        case StartAgain(failures=failures):
            head.append(f"starting it again (failure {failures} in a row)", style="yellow")
            return head
        case _:
            failures = event.decision.failures
            times = f"after {failures} failures in a row it is left down" if failures > 1 else "it is left down"
            head.append(times, style="bold red")
    last_words = [Text(f"    {line}", style="dim") for line in event.log_lines]
    where = Text.assemble("    log: ", event.log, "; ", ("chorus up", "cyan"), " starts it again")
    return Group(head, *last_words, where)


def _json(event: Any) -> dict[str, Any]:
    data = asdict(event)
    if isinstance(event, Ended):
        decision = event.decision
        data["decision"] = "start_again" if isinstance(decision, StartAgain) else "leave_down"
        data["failures"] = decision.failures
    return data
