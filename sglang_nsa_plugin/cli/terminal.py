"""What the commands print with: a console, progress bars, facts in two columns, findings, a verdict.

Only a terminal gets colours and bars; NO_COLOR switches the colours off.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

UNCUT = 120  # columns


def console() -> Console:
    """Standard output. Text is printed as it is: no markup, no highlighted numbers."""
    return Console(markup=False, highlight=False)


def progress(console: Console) -> Progress:
    """Transient progress bars; silent when standard output is not a terminal.

    Log lines of SGLang appear above the bar, or go to the file that standard error was redirected to.
    """
    return Progress(
        console=console,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),
        disable=not console.is_terminal,
    )


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns; a long value wraps inside its column."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    console.print(table)


def print_uncut(console: Console, table: Table) -> None:
    """A table of numbers, none of which is cut off where the terminal is narrow."""
    width, console.width = console.width, max(console.width, UNCUT)
    console.print(table, crop=False)
    console.width = width


class Finding(NamedTuple):
    """What was found of one thing, and the one thing to do about it where it is not as it should be."""

    name: str
    value: str
    remedy: str | None = None


def print_findings(console: Console, findings: Iterable[Finding]) -> None:
    """A line each, after [ok] or [--]; below the latter, what mends it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value, remedy in findings:
        table.add_row("[ok]" if remedy is None else "[--]", name, value)
        if remedy is not None:
            table.add_row("", "", f"mend: {remedy}")
    console.print(table)


def print_verdict(console: Console, verdict: str, good: bool) -> None:
    """The last line of a command."""
    console.print(verdict, style="bold green" if good else "bold red")
