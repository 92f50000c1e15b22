"""The tables that ``bench`` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

NO_GPU = "no GPU: these are times of the CPU twin; they tell nothing about a GPU"
# Column titles of the paths, in the order of the columns.
TITLES = {
    "sglang": "SGLang",
    "ours": "plugin, in graph",
    "sglang_kernel": "SGLang kernel",
    "cuda": "cuda",
    "cpu": "cpu",
    "triton": "triton",
    "torch": "torch",
    "original": "0.5.9 Python",
}
DESCRIBING = ("decode_impl", "width", "draft_tokens", "tables")


def show(console: Console, result: dict[str, Any]) -> None:
    """One table of host times and one of GPU times for each kind of case."""
    console.print(_heading(result), highlight=False)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["cases"]:
        groups.setdefault(tuple(row[name] for name in DESCRIBING), []).append(row)
    for described, rows in groups.items():
        console.print(f"\n{_title(*described)}", highlight=False)
        console.print(_times("host µs", rows, "host"))
        if "gpu_us" in rows[0]:
            console.print(_times("GPU µs", rows, "gpu"))
        if any("nodes" in row for row in rows):
            console.print(_counts("graph", [row for row in rows if "nodes" in row]))
    if result.get("roles"):
        console.print(_roles(result["roles"]))


def _heading(result: dict[str, Any]) -> str:
    if result["gpu"] is None:
        return NO_GPU
    lines = [
        f"SGLang {result['sglang']} on {result['gpu']}, adapter {result['adapter']}, implementation "
        f"{result['implementation']}"
    ]
    if "floor_us" in result:
        node, launch, copy = (result[name]["median"] for name in ("floor_us", "launch_us", "copy_gb_s"))
        lines.append(
            f"limits measured in this run: an empty graph node takes {node:.2f} µs, the shortest launch "
            f"{launch:.2f} µs of the host; a copy reads and writes {copy:,.0f} GB/s"
        )
    lines += [
        "SGLang: its own call before a step; it always fills both page tables",
        "medians, with the ratio to SGLang in brackets; all compared values are equal",
    ]
    return "\n".join(lines)


def _title(decode_impl: str, width: int, draft_tokens: int, tables: str) -> str:
    what = "both page tables" if tables == "both" else "page-64 table only"
    return f"{decode_impl}, req_to_token {width:,} wide, {draft_tokens} draft tokens, {what}"


def _times(title: str, rows: list[dict[str, Any]], kind: str) -> Table:
    paths = [path for path in TITLES if any(path in row[f"{kind}_us"] for row in rows)]
    shares = kind == "gpu" and "copy_share" in rows[0]
    table = _table(title, *(TITLES[path] for path in paths), *(["MB", "of copy"] if shares else []))
    for row in rows:
        cells = [_cell(row, kind, path) for path in paths]
        if shares:
            moved = sum(row["bytes"].values()) / 1e6
            cells += [f"{moved:,.1f}", f"{next(_shares(row)):.0%}"]
        table.add_row(f"{row['requests']}", f"{row['length']:,}", *cells)
    return table


def _shares(row: dict[str, Any]) -> Any:
    """Shares of the copy's bandwidth, that of the best implementation first."""
    return (row["copy_share"][path] for path in ("cuda", "triton", "torch") if path in row["copy_share"])


def _cell(row: dict[str, Any], kind: str, path: str) -> str:
    us = row[f"{kind}_us"].get(path)
    if us is None:
        return "-"
    ratio = row[f"{kind}_over_sglang"].get(path)
    return f"{us:,.1f}" if ratio is None else f"{us:,.1f} ({ratio:.2f})"


def _counts(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = ("nodes", "host launches", "compiles", "memory MB")
    table = _table(f"{title}: SGLang / plugin", *columns)
    for row in rows:
        nodes = ", ".join(f"{count} {kind}" for kind, count in row["nodes"].items())
        pairs = [(row[name]["sglang"], row[name]["ours"]) for name in ("launches", "compiles")]
        memory = " / ".join(f"{row['memory_bytes'][arm] / 1e6:,.1f}" for arm in ("sglang", "ours"))
        counts = (f"{theirs} / {ours}" for theirs, ours in pairs)
        table.add_row(f"{row['requests']}", f"{row['length']:,}", f"- / {nodes}", *counts, memory)
    return table


def _roles(rows: list[dict[str, Any]]) -> Table:
    """What a plan costs: SGLang's before each step, and the plugin's in the graph."""
    first = rows[0]
    table = Table(
        title=f"the plans of each role: SGLang / plugin; {first['decode_impl']}, req_to_token "
        f"{first['width']:,} wide, {first['draft_tokens']} draft tokens",
        title_justify="left",
    )
    table.add_column("role")
    for column in (
        "requests",
        "length",
        "host µs",
        "GPU µs",
        "host launches",
        "nodes",
        "MB",
        "memory MB",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        memory = {arm: count / 1e6 for arm, count in row["memory_bytes"].items()}
        table.add_row(
            row["role"],
            f"{row['requests']}",
            f"{row['length']:,}",
            _both(row["host_us"]),
            _both(row["gpu_us"]) if "gpu_us" in row else "-",
            f"{row['launches']['sglang']} / {row['launches']['ours']}",
            f"- / {sum(row['nodes'].values())}" if "nodes" in row else "-",
            f"{sum(row['bytes'].values()) / 1e6:,.1f}",
            _both(memory),
        )
    return table


def _both(of_arms: dict[str, float]) -> str:
    return f"{of_arms['sglang']:,.1f} / {of_arms['ours']:,.1f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("requests", "length", *columns):
        table.add_column(column, justify="right")
    return table
