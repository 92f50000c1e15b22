"""Draws docs/host-time.svg, or all cells of one bench, from committed result files.

    python -m integration.figures.plot
    python -m integration.figures.plot integration/results/bench-h200-0.5.17.json bench.png

docs/host-time.svg shows the host time of planning one draft-extend step, SGLang's own and with the plugin, for
each release that was timed. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from integration.figures.build import PICTURE, for_picture
from integration.figures.committed import SHOWN_CASE
from sglang_nsa_plugin.cli.bench import plot as bench_plot

COLOURS = {"sglang": "#9aa5b1", "ours": "#1f6feb"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bench", nargs="?", type=Path, help="a bench-GPU-VERSION.json")
    parser.add_argument("picture", nargs="?", type=Path, help="where to draw it")
    arguments = parser.parse_args()
    if arguments.bench is None:
        draw_host_times()
    elif arguments.picture is None:
        parser.error("PICTURE: name the file to draw into, such as bench.png")
    else:
        bench_plot.draw(json.loads(arguments.bench.read_text())["parts"]["bench"], arguments.picture)
    return 0


def draw_host_times() -> None:
    shown = for_picture()
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
    # build.py --check compares the description, which needs no matplotlib
    figure.savefig(PICTURE, metadata={"Date": None, "Description": json.dumps(shown)})


if __name__ == "__main__":
    raise SystemExit(main())
