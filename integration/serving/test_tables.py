"""The memory of the graphs' page tables, with 64 requests of 1 M tokens: as SGLang is, and the plugin.

    python -m integration.serving.serve_test tables

All plans of a step are filled. The plugin's own line says what its tables take; nvidia-smi says what
each server takes in all, with a KV cache of the same size.
"""

from __future__ import annotations

import json
import re

from integration.serving.ab_servers import MANY, AbServers, Setup
from integration.serving.compare import (
    Report,
    gpu_memory_mib,
    mismatches,
    needs_graphs,
    one_at_a_time,
    prompts,
    summary,
)
from integration.serving.gain_cells import MILLION, captured

REQUESTS = 64
SETUPS = (
    Setup(
        "tables",
        (
            *MANY,
            *("--context-length", str(MILLION)),
            *("--json-model-override-args", json.dumps({"max_position_embeddings": MILLION})),
            *captured((1, REQUESTS)),
        ),
    ),
)
TABLES = re.compile(r"page tables of the graphs take (\d+) MB instead of (\d+) MB")
CAPTURED = re.compile(r"Capture .*?(?:draft|target|cuda graph).*? end\..*?mem usage=[\d.]+ GB", re.I)
MOST_MB = 60
LEAST_SAVED_MIB = 2_000


def test_memory_of_the_page_tables(servers: AbServers, report: Report) -> None:
    needs_graphs(servers)
    rows = one_at_a_time(servers, prompts((5, 300, 1_500), seed=91))
    found = TABLES.search(servers["plugin"].log())
    assert found is not None, f"no line like {TABLES.pattern!r} in {servers['plugin'].log_path}"
    ours, before = map(int, found.groups())
    memory = {name: gpu_memory_mib([server]) for name, server in servers.items()}
    captures = {name: CAPTURED.findall(server.log()) for name, server in servers.items()}
    figures = {"tables_mb": ours, "before_mb": before, "gpu_mib": memory, "captures": captures}
    report("tables", {"requests": REQUESTS, "context": MILLION, **figures, **summary(rows)})
    assert mismatches(rows) == []
    assert ours <= MOST_MB
    assert memory["sglang"] - memory["plugin"] >= LEAST_SAVED_MIB
