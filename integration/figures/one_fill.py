"""One fill outside a server, for docs/results.md: the newest committed ``make bench`` on an H200."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from integration.figures.committed import gpu_name, paragraph, table
from integration.gpu.bounds import copy_share

SHOWN_REQUESTS = (1, 8, 64, 512)
SHOWN_LENGTHS = (2_048, 131_072)
HOST_COLUMNS = (
    "requests",
    "context",
    "host: SGLang",
    "host: replay with the plugin",
    "host: our kernel, called",
    "GPU, whole step: SGLang",
    "GPU, whole step: plugin",
)
KERNEL_COLUMNS = (
    "requests",
    "context",
    "both tables: SGLang",
    "both tables: plugin",
    "share of copy bandwidth",
    "page-64 table: SGLang",
    "page-64 table: plugin",
)


def newest(results: Path) -> Path | None:
    """The file of the latest run on an H200 that has a bench in it."""
    dates = {}
    for path in results.glob("bench-h200-*.json"):
        run = json.loads(path.read_text())
        if "bench" in run["parts"]:
            dates[path] = run["date"]
    return max(dates, key=lambda path: dates[path], default=None)


def section(path: Path) -> list[str]:
    """What was timed, two tables, counts over the whole grid and the origin."""
    run = json.loads(path.read_text())
    bench = run["parts"]["bench"]
    first = bench["cases"][0]
    cells = list(_shown_cells(bench, first))
    return [
        _introduction(bench, first),
        table(HOST_COLUMNS, [_host_row(rows) for rows in cells]),
        paragraph(
            "The kernels alone. SGLang's kernel always fills both page tables; the page-64 columns compare with "
            "its time for the same batch. *Share of copy bandwidth*: the bytes that the fill must move over its "
            f"time, divided by the {bench['copy_gb_s']['median']:,.0f} GB/s of a copy in the same run."
        ),
        table(KERNEL_COLUMNS, [_kernel_row(bench, rows) for rows in cells]),
        _counts(bench["cases"]),
        _source(path, run),
    ]


def _introduction(bench: dict[str, Any], first: dict[str, Any]) -> str:
    return paragraph(
        f"Medians in µs of alternating rounds in one run; `req_to_token` is {first['width']:,} wide, "
        f"{first['draft_tokens']} draft tokens. Host times are of back-to-back calls with warm caches; in a "
        "server the caches are cold, as in the first table of this page. GPU times are slopes between CUDA "
        "graphs of 1 and of 21 fills. *Whole step*: all metadata including SGLang's derived tables; SGLang fills "
        "both page tables and the plugin only those that are read. An empty graph node took "
        f"{bench['floor_us']['median']:.2f} µs, torch's shortest launch of a kernel "
        f"{bench['launch_us']['median']:.1f} µs of the host's time."
    )


def _shown_cells(bench: dict[str, Any], first: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The rows of each shown cell, by the tables that they fill."""
    same = {name: first[name] for name in ("decode_impl", "width", "draft_tokens")}
    cells = []
    for requests in SHOWN_REQUESTS:
        for length in SHOWN_LENGTHS:
            wanted = {**same, "requests": requests, "length": length}
            rows = {case["tables"]: case for case in bench["cases"] if wanted.items() <= case.items()}
            if rows:
                cells.append(rows)
    return cells


def _cell(rows: dict[str, dict[str, Any]]) -> tuple[str, str]:
    row = rows["both"]
    return f"{row['requests']}", f"{row['length']:,}"


def _host_row(rows: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    recorded = next(row for row in rows.values() if "ours" in row["gpu_us"])
    host, whole = recorded["host_us"], recorded["gpu_us"]
    return (
        *_cell(rows),
        f"{host['sglang']:.0f}",
        f"{host['ours']:.1f}",
        f"{host['cuda']:.1f}",
        f"{whole['sglang']:.1f}",
        f"{whole['ours']:.1f}",
    )


def _kernel_row(bench: dict[str, Any], rows: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    both, paged = rows["both"], rows["paged"]
    return (
        *_cell(rows),
        f"{both['gpu_us']['sglang_kernel']:.1f}",
        f"{both['gpu_us']['cuda']:.1f}",
        f"{copy_share(bench, both):.0%}",
        f"{paged['gpu_us']['sglang_kernel']:.1f}",
        f"{paged['gpu_us']['cuda']:.1f}",
    )


def _counts(cases: list[dict[str, Any]]) -> str:
    """Nodes, memory, compiles, values: over the whole grid."""
    recorded = [case for case in cases if "nodes" in case]
    nodes = {
        impl: max(_work(case) for case in recorded if case["decode_impl"] == impl)
        for impl in dict.fromkeys(case["decode_impl"] for case in recorded)
    }
    largest = max(recorded, key=lambda case: case["memory_bytes"]["sglang"])
    theirs, ours = (largest["memory_bytes"][who] / 1e6 for who in ("sglang", "ours"))
    compiles = {who: sum(case["compiles"][who] for case in cases) for who in ("sglang", "ours")}
    most = " and ".join(f"{n} graph nodes with {impl}" for impl, n in nodes.items())
    return paragraph(
        f"The whole fill takes at most {most}, beside the event that frees `req_to_token`. In the largest case "
        f"({largest['requests']} requests, {largest['draft_tokens']} draft tokens, {largest['width']:,} wide) its "
        f"tensors take {ours:,.1f} MB and SGLang's {theirs:,.1f} MB. Over the {len(cases)} cells SGLang's kernels "
        f"were compiled {compiles['sglang']} times and the plugin's {compiles['ours']} times; "
        f"{sum(case['values_compared'] for case in cases):,} values were compared before timing, all equal."
    )


def _work(case: dict[str, Any]) -> int:
    """Nodes but the event's."""
    return sum(count for kind, count in case["nodes"].items() if kind != "event_record")


def _source(path: Path, run: dict[str, Any]) -> str:
    versions = run["versions"]
    return paragraph(
        f"From `integration/results/{path.name}`: {gpu_name(run['gpus'][0])}, SGLang {versions['sglang']}, torch "
        f"{versions['torch']}, {run['date'][:10]}, commit {run['commit'][:7]}. "
        "`python -m integration.gpu.bounds FILE` lists the cells that miss a goal; "
        "`python -m integration.figures.plot FILE PICTURE` draws all cells."
    )
