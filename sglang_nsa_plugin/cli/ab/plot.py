"""The plot of ``ab``: the ratio of step times over requests at once, with its range and the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        f"--plot needs matplotlib, which cannot be imported ({error}): "
        "pip install 'sglang-nsa-plugin[bench]'"
    ) from error

LINES = {
    "step_on_over_off": ("on ÷ off", "#1f6feb", -0.06),
    "step_off_over_off": ("off ÷ off, the control", "#9aa5b1", 0.06),
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Plots the measured cells to a PNG or SVG file; the bars are the ranges of the medians."""
    cells = [cell for cell in result["cells"] if "rounds" in cell]
    mpl.rcParams["svg.hashsalt"] = "sglang-nsa-plugin"  # equal results make equal files
    figure = Figure(figsize=(2.4 + 1.2 * len(cells), 3.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="#57606a", linewidth=0.8)
    for name, (label, colour, shift) in LINES.items():
        ratios = [cell[name] for cell in cells]
        medians = [each["median"] for each in ratios]
        below = [each["median"] - each["low"] for each in ratios]
        above = [each["high"] - each["median"] for each in ratios]
        places = [place + shift for place in range(len(cells))]
        axes.errorbar(
            places, medians, (below, above), fmt="o", color=colour, markersize=4, capsize=3, label=label
        )
    axes.set_xticks(range(len(cells)), [cell["load"] for cell in cells])
    axes.set_xlim(-0.5, max(len(cells), 1) - 0.5)
    axes.set_xlabel("requests at once")
    axes.set_ylabel("time of a step, ratio")
    axes.grid(visible=True, axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"SGLang {result['sglang']}, plugin {result['plugin']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
