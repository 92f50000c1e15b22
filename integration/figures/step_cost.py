"""What the metadata of a whole step costs GPU and host, outside a server, for docs/results.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from integration.figures.committed import gpu_name, paragraph, table
from integration.figures.gain import CONTEXTS

FIRST_COLUMNS = ("context", "tokens in each request", "GPU: SGLang", "GPU: plugin")
HOST_COLUMNS = ("host: SGLang", "host: plugin")  # older files have none
MEMORY_COLUMNS = ("memory: SGLang", "memory: plugin")
HOST_TIMES = (
    "The host time is the median of repeated calls, with warm CPU caches and an idle GPU, added up over the roles. "
    "Verify's includes the launch of the empty kernel, which a server skips while the GPU keeps up. "
)


def section(folder: Path) -> list[str]:
    """A table for each result file of ``integration.gpu.step_cost``; nothing without one."""
    return [
        block
        for path in sorted(folder.glob("step-cost-*.json"))
        for block in _of(json.loads(path.read_text()))
    ]


def _of(run: dict[str, Any]) -> list[str]:
    contexts = run["parts"]
    roles = [role["role"] for role in next(iter(contexts.values()))["roles"]]
    requests = {context["requests"] for context in contexts.values()}
    of_pooled = ", of a model with a pooled index" if "--index-kpool" in run["command"] else ""
    has_host = all("host_us" in role for context in contexts.values() for role in context["roles"])
    columns = (*FIRST_COLUMNS, *(HOST_COLUMNS if has_host else ()), *MEMORY_COLUMNS)
    return [
        f"## The metadata of a whole step{of_pooled}, outside a server",
        paragraph(
            f"All plans of one step together ({', '.join(roles)}), {', '.join(map(str, sorted(requests)))} requests, "
            "4 draft tokens: what SGLang launches before its graphs, kernels alone, and what the plugin records in "
            "them. The memory is that of the tensors which those graphs read, for one batch size. "
            + (HOST_TIMES if has_host else "")
            + f"{', '.join(map(gpu_name, run['gpus']))}, SGLang {run['versions']['sglang']}, commit "
            f"{run['commit'][:7]}, {run['date'][:10]}; `{run['command']}`."
        ),
        table(
            columns,
            [row for name, context in contexts.items() for row in _rows(name, context, has_host)],
        ),
    ]


def _rows(name: str, context: dict[str, Any], has_host: bool) -> list[tuple[str, ...]]:
    roles = context["roles"]
    memory = [f"{sum(role['bytes'][arm] for role in roles) / 1e6:,.1f} MB" for arm in ("sglang", "ours")]
    rows = []
    for length in roles[0]["us"]:
        us = [
            f"{sum(role[clock][length][arm] for role in roles):,.1f} µs"
            for clock in ("us", *(["host_us"] if has_host else []))
            for arm in ("sglang", "ours")
        ]
        rows.append((CONTEXTS[name], f"{int(length):,}", *us, *memory))
    return rows
