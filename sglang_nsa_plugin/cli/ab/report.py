"""The table that ``ab`` prints, and a verdict for each row."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_nsa_plugin.cli import terminal

COLUMNS = ("requests", "step ms", "on÷off", "off÷off", "tokens/s", "on÷off", "tokens/step")


def show(console: Console, result: dict[str, Any]) -> None:
    """Facts of the server, medians and ratios of each cell, verdicts."""
    console.print(
        f"SGLang {result['sglang']} at {result['url']}, plugin {result['plugin']}, adapter "
        f"{result['adapter']}, implementation {result['implementation']}, {result['ranks']} rank(s), "
        f"roles {', '.join(result['roles'])}\n"
        "medians, with the plugin on / off"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for cell in result["cells"]:
        table.add_row(cell["load"], *(_row(cell) if "rounds" in cell else ("-",) * (len(COLUMNS) - 1)))
    terminal.print_uncut(console, table)
    for cell in result["cells"]:
        name = "external load" if cell["load"] == "external" else f"{cell['load']} at once"
        console.print(f"{name}: {cell['verdict']}", style=None if cell["resolved"] else "yellow")


def _row(cell: dict[str, Any]) -> tuple[str, ...]:
    step, control, tokens = (
        cell[name] for name in ("step_on_over_off", "step_off_over_off", "tokens_on_over_off")
    )
    return (
        _pair(cell["step_ms"], ".4g"),
        f"{step['median']:.3f}",
        f"{control['median']:.3f}",
        _pair(cell["tokens_per_s"], ",.0f"),
        "-" if tokens is None else f"{tokens['median']:.3f}",
        _pair(cell["tokens_per_step"], ".2f"),
    )


def _pair(arms: dict[str, float | None], form: str) -> str:
    return " / ".join("-" if value is None else format(value, form) for value in arms.values())
