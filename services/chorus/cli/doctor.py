"""`chorus doctor`: what is wrong on this machine, and what to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from chorus.cli.connecting import AsJson, Directory
from chorus.cli.options import ConfigFile
from chorus.cli.output import EXIT_FAILED, console, print_json
from chorus.config import load_with_origins
from chorus.core.findings import Finding, Findings, Level
from chorus.local.connect import client_config
from chorus.local.doctor import examine
from chorus.local.home import MeshHome

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def doctor(directory: Directory = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Find out what is wrong on this machine, and what to do: clock, certificates, llama.cpp, GPU, memory, disk, mesh.

    Exit codes: 0 nothing that Chorus needs is broken, 1 something is.
    """
    home = MeshHome.find(directory)
    configured = "client.coordinators" in load_with_origins(file=config).origins
    settings = client_config(home, file=config, must_be_up=False)
    report(examine(settings, home, coordinator_configured=configured), as_json=as_json)


def report(found: Findings, *, as_json: bool) -> None:
    """Shows each finding as it is made, and a count at the end. Ends the command with 1 where something is broken."""
    findings: list[Finding] = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            _show(finding)
    counts = Counter(finding.level for finding in findings)
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings], **{level: counts[level] for level in Level}})
    else:
        console().print(Text(f"\n{counts[Level.OK]} ok, {counts[Level.WARN]} to look at, {counts[Level.FAIL]} broken"))
    if counts[Level.FAIL]:
        raise typer.Exit(EXIT_FAILED)


def _show(finding: Finding) -> None:
    """One finding, its words in a column of their own however narrow the terminal is."""
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(width=4)
    line.add_column(width=12)
    line.add_column(overflow="fold")
    line.add_row(Text(finding.level, style=_STYLES[finding.level]), Text(finding.check, style="bold"), finding.message)
    if finding.advice:
        line.add_row("", "", Text(finding.advice, style="dim" if finding.level is Level.OK else "cyan"))
    console().print(line)
