"""README's table of one fill, from the newest committed result of ``make bench`` on an H200."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHOWN_REQUESTS = (1, 8, 64, 512)
SHOWN_LENGTHS = (2_048, 131_072)
COLUMNS = (
    "requests",
    "context",
    "host: SGLang",
    "ours at a replay",
    "our kernel called",
    "GPU, whole: SGLang",
    "ours in the graph",
    "kernel, both tables: SGLang",
    "ours",
    "of a copy",
    "kernel, page-64 table only: SGLang",
    "ours",
)


def newest(results: Path) -> Path | None:
    """The file of the latest run on an H200 that has a bench in it: the bounds are of that GPU."""
    dates = {}
    for path in results.glob("bench-h200-*.json"):
        run = json.loads(path.read_text())
        if "bench" in run["parts"]:
            dates[path] = run["date"]
    return max(dates, key=lambda path: dates[path], default=None)


def figures(path: Path) -> str:
    """Table, picture and origin."""
    run = json.loads(path.read_text())
    bench = run["parts"]["bench"]
    first = bench["cases"][0]
    made = [_introduction(bench, first), _table(bench, first), _counts(bench["cases"])]
    picture = path.with_suffix(".png")
    if picture.is_file():
        made.append(
            f"![µs of one fill over requests, one line for each path]({_in_repository(picture)})"
        )
    return "\n\n".join([*made, _source(path, run)])


def _introduction(bench: dict[str, Any], first: dict[str, Any]) -> str:
    return (
        f"One fill outside a server, `req_to_token` {first['width']:,} wide, {first['draft_tokens']} draft "
        "tokens, medians in microseconds of alternating rounds in one run. Host times are of calls behind calls of their "
        "kind, which a server's are not: see above for those. GPU times are slopes between CUDA "
        "graphs of 1 and of 21 fills; *whole* is all that a step needs, SGLang's derived tables too, and of the page "
        f"tables both with SGLang and those that its consumers read with ours. {_of_a_copy(bench)}An empty graph node "
        f"took {bench['floor_us']['median']:.2f} µs{_shortest_launch(bench)}."
    )


def _shortest_launch(bench: dict[str, Any]) -> str:
    """Empty for a run that did not measure it yet."""
    if "launch_us" not in bench:
        return ""
    return f", torch's shortest launch of a kernel {bench['launch_us']['median']:.1f} µs of the host"


def _of_a_copy(bench: dict[str, Any]) -> str:
    return (
        "*Of a copy*: the bytes that the fill must move over its time, as a share of the "
        f"{bench['copy_gb_s']['median']:,.0f} GB/s that a copy moved in the same run. "
    )


def _table(bench: dict[str, Any], first: dict[str, Any]) -> str:
    same = {name: first[name] for name in ("decode_impl", "width", "draft_tokens")}
    lines = []
    for requests in SHOWN_REQUESTS:
        for length in SHOWN_LENGTHS:
            wanted = {**same, "requests": requests, "length": length}
            rows = {case["tables"]: case for case in bench["cases"] if wanted.items() <= case.items()}
            if rows:
                lines.append(_line(requests, length, rows))
    rule = "|---" * len(COLUMNS) + "|"
    return "\n".join([f"| {' | '.join(COLUMNS)} |", rule, *lines])


def _line(requests: int, length: int, rows: dict[str, dict[str, Any]]) -> str:
    both, paged = rows["both"], rows["paged"]
    recorded = next(row for row in rows.values() if "ours" in row["gpu_us"])
    host, whole = recorded["host_us"], recorded["gpu_us"]
    cells = [
        f"{requests}",
        f"{length:,}",
        f"{host['sglang']:.0f}",
        f"{host['ours']:.1f}",
        f"{host['cuda']:.1f}",
        f"{whole['sglang']:.1f}",
        f"{whole['ours']:.1f}",
        f"{both['gpu_us']['sglang_kernel']:.1f}",
        f"{both['gpu_us']['cuda']:.1f}",
        f"{both['copy_share']['cuda']:.0%}",
        f"{paged['gpu_us']['sglang_kernel']:.1f}",
        f"{paged['gpu_us']['cuda']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _counts(cases: list[dict[str, Any]]) -> str:
    """Nodes, memory, compiles, values: over the whole grid."""
    recorded = [case for case in cases if "nodes" in case]
    nodes = {
        impl: max(_work(case) for case in recorded if case["decode_impl"] == impl)
        for impl in dict.fromkeys(case["decode_impl"] for case in recorded)
    }
    largest = max(recorded, key=lambda case: case["memory_bytes"]["sglang"])
    memory = [largest["memory_bytes"][arm] / 1e6 for arm in ("sglang", "ours")]
    compiles = [sum(case["compiles"][arm] for case in cases) for arm in ("sglang", "ours")]
    return (
        f"The refresh takes at most {' and '.join(f'{n} graph nodes with {impl}' for impl, n in nodes.items())}, "
        "beside the event that frees `req_to_token`. Its tensors take "
        f"{memory[1]:,.1f} MB where SGLang's take {memory[0]:,.1f}: {largest['requests']} requests, "
        f"{largest['draft_tokens']} draft tokens, {largest['width']:,} wide. Over the {len(cases)} cells of the "
        f"grid SGLang's kernels were compiled {compiles[0]} times and ours {compiles[1]}; "
        f"{sum(case['values_compared'] for case in cases):,} values were compared first, all equal."
    )


def _work(case: dict[str, Any]) -> int:
    """Nodes but the event's."""
    return sum(count for kind, count in case["nodes"].items() if kind != "event_record")


def _source(path: Path, run: dict[str, Any]) -> str:
    versions = run["versions"]
    return (
        f"From `{_in_repository(path)}`: {run['gpus'][0].replace(', ', ', driver ')}, SGLang "
        f"{versions['sglang']}, torch {versions['torch']}, {run['date'][:10]}, commit {run['commit'][:7]}."
    )


def _in_repository(path: Path) -> str:
    return f"integration/results/{path.name}"
