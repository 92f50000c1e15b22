"""How the commands look: plain text, a bar while one waits, facts in two columns, a verdict.

Colour and bars appear on a terminal alone; NO_COLOR takes the colour away there, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def console() -> Console:
    """Standard output; text is written as it is, not searched for markup or numbers."""
    return Console(markup=False, highlight=False)


def progress(console: Console) -> Progress:
    """Bars that are gone in the end; nothing at all where the output is no terminal.

    What SGLang logs meanwhile stands above the bar, or where standard error was sent.
    """
    return Progress(
        console=console,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),
        disable=not console.is_terminal,
    )


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns; long values go on below themselves."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    console.print(table)


def print_verdict(console: Console, verdict: str, good: bool) -> None:
    """The last line of a command."""
    console.print(verdict, style="bold green" if good else "bold red")
