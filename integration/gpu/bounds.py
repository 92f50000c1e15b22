"""What a committed run of ``bench`` on a GPU has to meet: each bound names the cells that miss it.

    python -m integration.gpu.bounds integration/results/bench-GPU-VERSION.json

Each function takes what ``measured`` makes of ``results/bench-GPU-VERSION.json`` and returns a line for
each cell over its bound, none where all meet it. Times are medians in microseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Bench = Mapping[str, Any]
Row = Mapping[str, Any]

PAGED_US = 3.0
OVER_COPY = 1.2  # of the time that the bytes take at the copy bandwidth of the same run
OVER_GATHER = 1.5
WIDTHS = (4_096, 163_904, 1_048_640)
WIDTHS_LENGTH = 2_048
WIDTHS_REQUESTS = (1, 8, 64, 512)
WIDTHS_SHARE, WIDTHS_US = 0.15, 0.3  # noise
COPY_SHARE = 0.85
COPY_SHARE_FROM = 64_000_000  # bytes moved
HOST_US = 3.0
REPLAY_US = 5.0  # of the host in a server
NODES = {"flashmla_sparse": 3, "flashmla_kv": 6}


def measured(result: Mapping[str, Any]) -> Bench:
    """The parts ``bench``, ``gather`` and, where it was run, ``widths`` of a result file as one."""
    parts = result["parts"]
    timed = {"widths_us": parts["widths"]} if "widths" in parts else {}
    return {**parts["bench"], "gather_us": parts["gather"], **timed}


def cell(row: Row) -> str:
    """A row of the grid in words."""
    return (
        f"{row['decode_impl']} {row['requests']} × {row['length']:,} {row['tables']}, "
        f"width {row['width']:,}, {row['draft_tokens']} draft tokens"
    )


def paged_rows(bench: Bench) -> list[Row]:
    """The cells of the kernel that fills the page-64 table alone."""
    return [
        row
        for row in bench["cases"]
        if row["tables"] == "paged" and row["decode_impl"] == "flashmla_sparse"
    ]


def paged_kernel(bench: Bench, known: Mapping[str, float] | None = None) -> list[str]:
    """3 µs, or 1.2 times what the bytes take at the copy bandwidth, whichever is more.

    ``known`` cells: the microseconds that are given.
    """
    most = known or {}
    return _paged_over(bench, lambda row: most.get(cell(row), paged_limit(bench, row)))


def paged_kernel_gather(bench: Bench) -> list[str]:
    """The same, but 1.5 times the gather's time where the gather alone leaves no room below the bound.

    The gather reads one number for each page and does nothing else. Memory gives 64 bytes at least where
    the fill needs a sector of 32, so the time of its bytes cannot be reached there: docs/kernel.md.
    """
    return _paged_over(bench, lambda row: gather_limit(bench, row) or paged_limit(bench, row))


def held_to_gather(bench: Bench) -> list[Row]:
    """The cells that miss the bound of ``paged_kernel`` and are held to that of the gather instead."""
    return [
        row
        for row in paged_rows(bench)
        if row["gpu_us"]["cuda"] > paged_limit(bench, row) and gather_limit(bench, row) is not None
    ]


def paged_limit(bench: Bench, row: Row) -> float:
    moved = sum(row["bytes"].values())
    return max(PAGED_US, OVER_COPY * moved / bench["copy_gb_s"]["median"] / 1000)


def gather_limit(bench: Bench, row: Row) -> float | None:
    """None where the gather leaves room below the other bound, or was not timed."""
    for timed in bench["gather_us"]:
        if all(timed[name] == row[name] for name in ("requests", "length", "width")):
            leaves_room = timed["us"] <= paged_limit(bench, row) / OVER_COPY
            return None if leaves_room else OVER_GATHER * float(timed["us"])
    return None


def _paged_over(bench: Bench, limit: Callable[[Row], float]) -> list[str]:
    return [
        f"{cell(row)}: cuda {us:.2f} µs, at most {most:.2f}"
        for row in paged_rows(bench)
        if (us := row["gpu_us"]["cuda"]) > (most := limit(row))
    ]


def widths(bench: Bench) -> list[str]:
    """The paged table of the same live lengths takes the same time however wide the tables are."""
    return [
        f"{requests} × {WIDTHS_LENGTH:,} paged: "
        + ", ".join(f"{us:.2f} µs at width {width:,}" for width, us in times.items())
        for requests, times in times_by_width(bench).items()
        if _spread(times) > max(WIDTHS_US, WIDTHS_SHARE * min(times.values()))
    ]


def times_by_width(bench: Bench) -> dict[int, dict[int, float]]:
    """Requests → width → time, of the requests that were timed at all WIDTHS.

    From the part where they were timed in turn; from the grid in a file of before there was one.
    """
    found: dict[int, dict[int, float]] = {}
    for requests, width, us in _timed_in_turn(bench) if "widths_us" in bench else _timed_in_grid(bench):
        found.setdefault(requests, {})[width] = us
    return {requests: times for requests, times in found.items() if times.keys() == set(WIDTHS)}


def _timed_in_turn(bench: Bench) -> Iterator[tuple[int, int, float]]:
    return ((timed["requests"], timed["width"], timed["us"]["median"]) for timed in bench["widths_us"])


def _timed_in_grid(bench: Bench) -> Iterator[tuple[int, int, float]]:
    for row in paged_rows(bench):
        if row["length"] == WIDTHS_LENGTH and row["draft_tokens"] == 4:
            yield row["requests"], row["width"], row["gpu_us"]["cuda"]


def _spread(times: Mapping[int, float]) -> float:
    return max(times.values()) - min(times.values())


def large_rows(bench: Bench) -> list[Row]:
    """The cells of both tables that move enough bytes to be bound by memory."""
    return [
        row
        for row in bench["cases"]
        if row["tables"] == "both" and sum(row["bytes"].values()) >= COPY_SHARE_FROM
    ]


def both_tables(bench: Bench, known: Mapping[str, float] | None = None) -> list[str]:
    """85 % of the copy bandwidth from 64 MB moved upward; ``known`` cells: the share that is given."""
    least = known or {}
    return [
        f"{cell(row)}: {row['copy_share']['cuda']:.2f} of the copy bandwidth, at least {wanted:.2f}"
        for row in large_rows(bench)
        if row["copy_share"]["cuda"] < (wanted := least.get(cell(row), COPY_SHARE))
    ]


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
    return [_of_the_host(of, us, HOST_US) for of, us in times if us > HOST_US]


def host_of_the_run(bench: Bench) -> list[str]:
    """The same, the lower quartile of all cells: a bound call does the same whatever it fills.

    Other work takes from the host for seconds; it only adds, to SGLang's calls as to ours.
    """
    rows = sorted(bench["cases"], key=lambda row: float(row["host_us"]["cuda"]))
    quartile = rows[(len(rows) - 1) // 4]
    us = quartile["host_us"]["cuda"]
    of = f"three quarters of {len(rows)} cells, from {cell(quartile)} on"
    return [_of_the_host(of, us, HOST_US)] if us > HOST_US else []


def replay_in_server(result: Mapping[str, Any]) -> list[str]:
    """What a replay costs the host in a server, by what ``results/serve-VERSION.json`` holds."""
    us = result["parts"]["host_time"]["plugin"]["fill_us"]["median"]
    return [_of_the_host("a replay", us, REPLAY_US)] if us > REPLAY_US else []


def _of_the_host(of: str, us: float, most: float) -> str:
    return f"{of}: {us:.2f} µs of the host, at most {most:.2f}"


def nodes(bench: Bench) -> list[str]:
    """The whole refresh in the graph."""
    return [
        f"{cell(row)}: {sum(row['nodes'].values())} nodes, at most {most}"
        for row in recorded_rows(bench)
        if sum(row["nodes"].values()) > (most := NODES[row["decode_impl"]])
    ]


def recorded_rows(bench: Bench) -> Iterator[Row]:
    """The rows of the tables that the graph of this batch size fills."""
    return (row for row in bench["cases"] if "nodes" in row)


def compiles(bench: Bench) -> list[str]:
    """After the start, no case compiles or loads a kernel of ours."""
    return [
        f"{cell(row)}: {row['compiles']['ours']} compiled"
        for row in bench["cases"]
        if row["compiles"]["ours"] != 0
    ]


BOUNDS = (
    paged_kernel,
    paged_kernel_gather,
    widths,
    both_tables,
    never_slower,
    host,
    host_of_the_run,
    nodes,
    compiles,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path, help="integration/results/bench-GPU-VERSION.json")
    bench = measured(json.loads(parser.parse_args().result.read_text()))
    print(f"{len(bench['cases'])} cells, {len(paged_rows(bench))} of them paged")
    for bound in BOUNDS:
        missed = bound(bench)
        print("\n  ".join([f"{bound.__name__}: {len(missed)} over", *missed]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
