"""The goals of ``make bench``, and its comparison with an earlier run.

    python -m integration.gpu.bounds integration/results/bench-GPU-VERSION.json
    python -m integration.gpu.bounds --compare OLD.json NEW.json

The first prints the cells that miss a goal. The second also prints each time that grew beyond noise, and
exits with 1 where there is one. Times are medians in microseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Bench = Mapping[str, Any]
Row = Mapping[str, Any]

PAGED_US = 3.0
OVER_GATHER = 1.2  # of the time in which torch only reads one slot of each page, in the same run
WIDTHS = (4_096, 163_904, 1_048_640)
WIDTHS_LENGTH = 2_048
WIDTHS_REQUESTS = (1, 8, 64, 512)
WIDTHS_SHARE, WIDTHS_US = 0.15, 0.3  # noise
COPY_SHARE = 0.85
COPY_SHARE_FROM = 64_000_000  # bytes moved
HOST_US = 3.0
NODES = {"flashmla_sparse": 3, "flashmla_kv": 6}
# GPU times also differ between runs, which the spread inside a run does not show. Chosen so that few
# other kernels count as slower: of 1,316 times of SGLang, Triton and torch in four pairs of committed
# runs, 6 do.
RUN_SHARE, RUN_US = 0.05, 0.3
SHOWN = 12  # cells of a missed goal
CELL = ("decode_impl", "requests", "length", "width", "draft_tokens", "tables")
# The plugin's times that are compared, each with SGLang's time for the same work in the same run.
COMPARED = (
    ("gpu", "cuda", "sglang_kernel"),
    ("gpu", "ours", "sglang"),
    ("host", "cuda", "sglang_kernel"),
    ("host", "ours", "sglang"),
)


def measured(result: Mapping[str, Any]) -> Bench:
    """The parts ``bench``, ``gather`` and ``widths`` of a result file as one.

    Raises:
        ValueError: the file lacks one of them; names it.
    """
    parts = result["parts"]
    missing = [name for name in ("bench", "gather", "widths") if name not in parts]
    if missing:
        raise ValueError(
            f"the result file has no part {missing[0]}; run `make bench`, which measures all parts"
        )
    return {**parts["bench"], "gather_us": parts["gather"], "widths_us": parts["widths"]}


def cell(row: Row) -> str:
    """A row of the grid in words."""
    return (
        f"{row['decode_impl']} {row['requests']} × {row['length']:,} {row['tables']}, "
        f"width {row['width']:,}, {row['draft_tokens']} draft tokens"
    )


# Goals: each function returns one line for each cell that misses it.


def paged_kernel(bench: Bench) -> list[str]:
    """The page-64 table alone: 3 µs, or 1.2 times the gather of the same run where that is more."""
    rows = [
        row
        for row in bench["cases"]
        if row["tables"] == "paged" and row["decode_impl"] == "flashmla_sparse"
    ]
    return [
        f"{cell(row)}: cuda {us:.2f} µs, at most {most:.2f}"
        for row in rows
        if (us := row["gpu_us"]["cuda"]) > (most := _paged_limit(bench, row))
    ]


def _paged_limit(bench: Bench, row: Row) -> float:
    same_cell = ("requests", "length", "width")
    gathers = [t["us"] for t in bench["gather_us"] if all(t[name] == row[name] for name in same_cell)]
    return float(max([PAGED_US, *(OVER_GATHER * us for us in gathers)]))


def widths(bench: Bench) -> list[str]:
    """The paged table of the same live lengths takes the same time however wide the tables are."""
    times: dict[int, dict[int, float]] = {}
    for timed in bench["widths_us"]:
        times.setdefault(timed["requests"], {})[timed["width"]] = timed["us"]["median"]
    return [
        f"{requests} × {WIDTHS_LENGTH:,} paged: "
        + ", ".join(f"{us:.2f} µs at width {width:,}" for width, us in by_width.items())
        for requests, by_width in times.items()
        if max(by_width.values()) - (least := min(by_width.values()))
        > max(WIDTHS_US, WIDTHS_SHARE * least)
    ]


def both_tables(bench: Bench) -> list[str]:
    """85 % of the copy bandwidth of the same run, from 64 MB moved upward."""
    return [
        f"{cell(row)}: {share:.3f} of the copy bandwidth, at least {COPY_SHARE}"
        for row in bench["cases"]
        if row["tables"] == "both"
        and sum(row["bytes"].values()) >= COPY_SHARE_FROM
        and (share := copy_share(bench, row)) < COPY_SHARE
    ]


def copy_share(bench: Bench, row: Row) -> float:
    """The bandwidth of our kernel over that of a copy: bytes that the fill must move, over its time."""
    gb_s = sum(row["bytes"].values()) / row["gpu_us"]["cuda"] / 1000
    return float(gb_s / bench["copy_gb_s"]["median"])


def never_slower(bench: Bench) -> list[str]:
    """Our kernel beside SGLang's, both tables and one."""
    return [
        f"{cell(row)}: cuda {row['gpu_us']['cuda']:.2f} µs, SGLang's kernel {theirs:.2f}"
        for row in bench["cases"]
        if row["gpu_us"]["cuda"] > (theirs := row["gpu_us"]["sglang_kernel"])
    ]


def host(bench: Bench) -> list[str]:
    """One bound call outside a graph, in every cell."""
    times = ((cell(row), row["host_us"]["cuda"]) for row in bench["cases"])
    return [_host_line(where, us) for where, us in times if us > HOST_US]


def host_of_the_run(bench: Bench) -> list[str]:
    """The same, the lower quartile of all cells: a bound call does the same whatever it fills.

    Other work can hold up the host for seconds; it adds time to SGLang's calls and to the plugin's.
    """
    rows = sorted(bench["cases"], key=lambda row: float(row["host_us"]["cuda"]))
    quartile = rows[(len(rows) - 1) // 4]
    us = quartile["host_us"]["cuda"]
    where = f"three quarters of {len(rows)} cells, from {cell(quartile)} on"
    return [_host_line(where, us)] if us > HOST_US else []


def _host_line(where: str, us: float) -> str:
    return f"{where}: {us:.2f} µs on the host, at most {HOST_US:.2f}"


def nodes(bench: Bench) -> list[str]:
    """The whole refresh in the graph."""
    return [
        f"{cell(row)}: {count} nodes, at most {most}"
        for row in bench["cases"]
        if "nodes" in row and (count := sum(row["nodes"].values())) > (most := NODES[row["decode_impl"]])
    ]


def compiles(bench: Bench) -> list[str]:
    """After the start, no case compiles or loads one of our kernels."""
    return [
        f"{cell(row)}: {row['compiles']['ours']} compiled"
        for row in bench["cases"]
        if row["compiles"]["ours"] != 0
    ]


GOALS = (paged_kernel, widths, both_tables, never_slower, host, host_of_the_run, nodes, compiles)


def missed_goals(bench: Bench) -> list[str]:
    """A table: each goal with the number of cells that miss it, and the first of those cells."""
    lines = [f"Goals over {len(bench['cases'])} cells:"]
    for goal in GOALS:
        missed = goal(bench)
        lines.append(f"  {goal.__name__:16} {f'{len(missed)} missed' if missed else 'met'}")
        lines += [f"      {line}" for line in missed[:SHOWN]]
        lines += [f"      and {len(missed) - SHOWN} more"] if len(missed) > SHOWN else []
    return lines


# Comparison of two runs.


@dataclass(frozen=True)
class Change:
    """One time of one cell in two runs.

    Attributes:
        what: such as ``gpu cuda``.
        cell: in words.
        old, new: first quartile, median and third quartile.
        sglang: SGLang's median for the same work, old and new: it shows whether the host was slower.
    """

    what: str
    cell: str
    old: tuple[float, float, float]
    new: tuple[float, float, float]
    sglang: tuple[float, float]

    @property
    def is_regression(self) -> bool:
        """The quartiles do not overlap, and the growth is more than unchanged code shows between runs.

        A host on which SGLang's own call takes longer by some factor is a slower host, and the plugin's
        calls may take longer by that factor.
        """
        is_host = self.what.startswith("host")
        slower_host = max(1.0, self.sglang[1] / self.sglang[0]) if is_host else 1.0
        _, median, q3 = (slower_host * us for us in self.old)
        between_runs = max(RUN_US, RUN_SHARE * median)
        return self.new[0] > q3 and self.new[1] - median > between_runs

    def __str__(self) -> str:
        before, after = (f"{m:.2f} ({q1:.2f} to {q3:.2f})" for q1, m, q3 in (self.old, self.new))
        slower = self.new[1] / self.old[1] - 1
        theirs = " → ".join(f"{us:.2f}" for us in self.sglang)
        return f"  {self.what:9} {before:>24} → {after:24} {slower:+6.0%}  {theirs:>20}  {self.cell}"


HEADING = f"  {'what':9} {'old µs (quartiles)':>24} → {'new µs (quartiles)':31}{'SGLang':>22}  cell"


def changes(old: Bench, new: Bench) -> Iterator[Change]:
    """Each compared time of the cells that both runs have."""
    before = {_key(row): row for row in old["cases"]}
    for row in new["cases"]:
        if (was := before.get(_key(row))) is None:
            continue
        for clock, ours, theirs in COMPARED:
            if ours in was[f"{clock}_us"] and ours in row[f"{clock}_us"]:
                yield Change(
                    f"{clock} {ours}",
                    cell(row),
                    _quartiles(was, clock, ours),
                    _quartiles(row, clock, ours),
                    (was[f"{clock}_us"][theirs], row[f"{clock}_us"][theirs]),
                )


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CELL)


def _quartiles(row: Row, clock: str, path: str) -> tuple[float, float, float]:
    q1, q3 = row[f"{clock}_quartiles"][path]
    return q1, row[f"{clock}_us"][path], q3


def compare(old: Bench, new: Bench) -> tuple[list[str], bool]:
    """The lines to print, and whether something got slower or is no longer measured."""
    if old.get("gpu") != new.get("gpu"):
        raise ValueError(f"runs of two GPUs cannot be compared: {old.get('gpu')} and {new.get('gpu')}")
    found = list(changes(old, new))
    slower = [change for change in found if change.is_regression]
    measured_now = {_key(row) for row in new["cases"]}
    lost = [cell(row) for row in old["cases"] if _key(row) not in measured_now]
    lines = [f"Regressions beyond noise: {len(slower)} of {len(found)} times"]
    if slower:
        lines += [HEADING, *map(str, slower)]
    lines += [f"  no longer measured: {name}" for name in lost]
    return [*lines, *missed_goals(new)], bool(slower or lost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("result", nargs="?", type=Path, help="bench-GPU-VERSION.json")
    which.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    arguments = parser.parse_args()
    paths = arguments.compare or [arguments.result]
    runs = [measured(json.loads(path.read_text())) for path in paths]
    lines, is_slower = compare(*runs) if arguments.compare else (missed_goals(runs[0]), False)
    print("\n".join(lines))
    return int(is_slower)


if __name__ == "__main__":
    raise SystemExit(main())
