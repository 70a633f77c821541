"""What a pull looks like on a terminal: one bar that says what goes on. In a pipe: a line for each thing that does."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from chorus.cli.output import err
from chorus.models.progress import PullPhase, PullProgress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_WORDS = {
    PullPhase.RESOLVING: "looking for it",
    PullPhase.WAITING: "waiting",
    PullPhase.DOWNLOADING: "downloading",
    PullPhase.COPYING: "copying",
    PullPhase.VERIFYING: "verifying",
    PullPhase.DONE: "done",
}


class PullBar:
    """Shows the progress of one pull on standard error while it is entered; call it with each report."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._said = ("", "")

    def __enter__(self) -> PullBar:
        if err().is_terminal:
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=err(),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, report: PullProgress) -> None:
        """Shows what `report` says."""
        words = _WORDS[report.phase]
        if self._bar is None:
            said = (words, report.message)
            if said != self._said and report.phase is not PullPhase.DONE:
                self._said = said
                err().print(
                    f"{self._title}: {said[1] if said[1] not in ('', self._title) else words}",
                    markup=False,
                    soft_wrap=True,
                )
            return
        if self._said[0] != words or self._task is None:
            # A phase is a task of its own: its speed says nothing of the next one's.
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task("", total=None)
            self._said = (words, "")
        self._bar.update(
            self._task,
            description=f"{self._title}: {words}" + (f" ({report.message})" if report.message else ""),
            completed=report.done_bytes,
            total=report.total_bytes or None,
        )
