"""Draws README's pictures from the committed result files.

    python -m integration.figures.plot

Host time of planning one draft-extend step, SGLang's own and ours, for each release that was measured,
and the picture of the newest `make bench`. Needs matplotlib and the installed package.
"""

from __future__ import annotations

import json

import matplotlib as mpl
import matplotlib.pyplot as plt

from integration.figures import bench_figures
from integration.figures.build import PICTURE, RESULTS, SHOWN_CASE, pictured
from integration.gpu import bench

COLOURS = {"sglang": "#9aa5b1", "ours": "#1f6feb"}


def main() -> int:
    draw_host_times()
    newest = bench_figures.newest(RESULTS)
    if newest is not None:
        bench.draw(newest)
    return 0


def draw_host_times() -> None:
    shown = pictured()
    mpl.rcParams["svg.hashsalt"] = "sglang-nsa-plugin"  # the same picture for the same figures
    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    rows = range(len(shown))
    for offset, (name, label) in zip(
        (-0.2, 0.2), (("sglang", "SGLang"), ("ours", "with the plugin")), strict=True
    ):
        times = [host_us[name] for host_us in shown.values()]
        bars = axes.barh([row + offset for row in rows], times, 0.38, label=label, color=COLOURS[name])
        axes.bar_label(bars, fmt="%.0f µs", padding=3, fontsize=9)
    axes.set_yticks(list(rows), [f"SGLang {version}" for version in shown])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"host time to plan one draft-extend step, {SHOWN_CASE['requests']} requests of "
        f"{SHOWN_CASE['length']:,} tokens, one H200"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    # readme.py --check compares the description, which needs no matplotlib
    figure.savefig(PICTURE, metadata={"Date": None, "Description": json.dumps(shown)})


if __name__ == "__main__":
    raise SystemExit(main())
