"""The plot of ``bench``: microseconds over requests, one line for each path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_nsa_plugin.cli.bench.report import NO_GPU, TITLES

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        f"--plot needs matplotlib, which cannot be imported ({error}): "
        "pip install 'sglang-nsa-plugin[bench]'"
    ) from error

COLOURS = {
    "sglang": "#57606a",
    "sglang_kernel": "#9aa5b1",
    "ours": "#1f6feb",
    "cuda": "#54aeff",
    "cpu": "#54aeff",
    "triton": "#8250df",
    "torch": "#d4a72c",
    "original": "#cf222e",
}
NAMES = {"host_us": "host time", "gpu_us": "GPU time"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Plots the cases of the first set-up, one column of panels for each context, to a PNG or SVG file.

    The first row of panels shows host time, the second, with a GPU, GPU time. Lines are medians; bands
    reach from the first to the third quartile.
    """
    rows = [row for row in result["cases"] if _is_shown(row, result["cases"][0])]
    kinds = [kind for kind in NAMES if kind in rows[0]]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    mpl.rcParams["svg.hashsalt"] = "sglang-nsa-plugin"  # equal results make equal files
    figure = Figure(figsize=(3.6 * max(2, len(lengths)), 3.0 * len(kinds) + 0.9), layout="constrained")
    panels = figure.subplots(len(kinds), len(lengths), sharex=True, sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for kind, line in zip(kinds, panels, strict=True):
        for length, axes in zip(lengths, line, strict=True):
            shown = [row for row in rows if row["length"] == length]
            handles |= _panel(axes, shown, kind)
            axes.set_title(f"{NAMES[kind]}, {length:,} tokens each", fontsize=9)
        line[0].set_ylabel("µs")
    for axes in panels[-1]:
        axes.set_xlabel("requests")
    figure.suptitle(_title(result, rows[0]), fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _is_shown(row: dict[str, Any], first: dict[str, Any]) -> bool:
    return all(row[name] == first[name] for name in ("decode_impl", "width", "draft_tokens"))


def _panel(axes: Any, rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Lines by label: solid with both page tables, which SGLang always fills, dashed with only one."""
    handles = {}
    for path, title in TITLES.items():
        for tables, style, suffix in (("both", "-", ""), ("paged", "--", ", page-64 table only")):
            timed = [row for row in rows if row["tables"] == tables and path in row[kind]]
            if not timed:
                continue
            if path == "sglang":
                style, suffix = "-", ""
            requests = [row["requests"] for row in timed]
            (handles[title + suffix],) = axes.plot(
                requests, [row[kind][path] for row in timed], style, color=COLOURS[path], linewidth=1.4,
                marker="o", markersize=2.5,
            )  # fmt: skip
            quartiles = [row[kind.replace("_us", "_quartiles")][path] for row in timed]
            low, high = zip(*quartiles, strict=True)
            axes.fill_between(requests, low, high, color=COLOURS[path], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row["requests"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.grid(visible=True, which="major", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _title(result: dict[str, Any], row: dict[str, Any]) -> str:
    what = (
        f"one draft-extend fill, {row['draft_tokens']} draft tokens, req_to_token {row['width']:,} wide"
    )
    where = NO_GPU if result["gpu"] is None else f"SGLang {result['sglang']} on one {result['gpu']}"
    return f"{what}\n{where}"
