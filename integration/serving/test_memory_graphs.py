"""The memory of CUDA graphs given back and taken again: fills are right afterwards, each one checked.

With SGLANG_MEMORY_SAVER_CUDA_GRAPH the own memory of a resumed graph holds zeros. If the flag that a
captured fill reads lay there, fills would write nothing, and steps would read what earlier ones left.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from integration.serving.ab_servers import ENVIRONMENTS, MANY, AbServers, Setup
from integration.serving.compare import (
    SHORT_LENGTHS,
    Report,
    assert_alike,
    at_once,
    check_record,
    mismatches,
    needs_graphs,
    one_at_a_time,
    prompts,
    read_record,
    summary,
)
from integration.serving.test_memory import load_weights, release_and_resume

SAVED = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1", "SGLANG_NSA_METADATA_CHECK": "1"}
SETUPS = (
    Setup(
        "memory-graphs",
        (*MANY, "--enable-memory-saver"),
        environments={name: {**each, **SAVED} for name, each in ENVIRONMENTS.items()},
    ),
)
pytestmark = pytest.mark.skipif(
    find_spec("torch_memory_saver") is None,
    reason="--enable-memory-saver needs torch_memory_saver, which is not installed here",
)
ASKED = prompts(SHORT_LENGTHS, seed=72)


@pytest.mark.parametrize("tags", [["cuda_graph"], ["kv_cache", "cuda_graph"], None], ids=str)
def test_fills_are_right_after_a_resume(
    servers: AbServers, model: Path, report: Report, tags: list[str] | None
) -> None:
    """None stands for all memory; weights are lost with it and loaded again."""
    needs_graphs(servers)
    before = one_at_a_time(servers, ASKED)
    first = read_record(servers["plugin"])
    memory = release_and_resume(servers, tags)
    if tags is None:
        for server in servers.values():
            load_weights(server, model)
    after = one_at_a_time(servers, ASKED)
    together = at_once(servers, 8, seed=73)
    last = read_record(servers["plugin"])
    part = f"memory-graphs.{'all' if tags is None else '-'.join(tags)}"
    counted = ("replays", "checks", "values_checked", "mismatches")
    report(
        part,
        {
            "gpu_mib": memory,
            "before": summary(before),
            "after": summary(after),
            "together": together,
            "of_plugin": {name: [first[name], last[name]] for name in counted},
        },
    )
    assert mismatches([*before, *after]) == []
    assert_alike([together])
    assert last["replays"] > first["replays"]
    assert last["checks"] == last["replays"]
    assert last["values_checked"] > first["values_checked"]
    assert (last["mismatches"], last["fallbacks"]) == (0, {})
    assert memory["released"] < memory["before"]


def test_record(servers: AbServers, report: Report) -> None:
    check_record(servers, report)
