"""The memory of CUDA graphs given back and taken again: fills are right afterwards, each one checked.

With SGLANG_MEMORY_SAVER_CUDA_GRAPH the own memory of a resumed graph holds zeros. If the flag that a
captured fill reads lay there, fills would write nothing, and steps would read what earlier ones left.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from integration.serving.ab_servers import ENVIRONMENTS, FP8, MANY, ROLES, AbServers, Setup
from integration.serving.compare import (
    FIRST_ROLE,
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

Record = dict[str, Any]
SAVED = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1", "SGLANG_NSA_METADATA_CHECK": "1"}
ARGS = (*MANY, "--enable-memory-saver")
ENVIRONMENT = {name: {**each, **SAVED} for name, each in ENVIRONMENTS.items()}
# With flashmla_kv, SGLang from 0.5.22 on lets go of FlashMLA's plans, too, which come back as zeros.
SETUPS = (
    Setup("memory-graphs", ARGS, environments=ENVIRONMENT),
    Setup("memory-graphs-fp8", (*FP8, *ARGS), decode_backend="flashmla_kv", environments=ENVIRONMENT),
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
    part = f"{servers.setup.name}.{'all' if tags is None else '-'.join(tags)}"
    report(
        part,
        {
            "gpu_mib": memory,
            "before": summary(before),
            "after": summary(after),
            "together": together,
            "of_plugin": {role: counted(first, last, role) for role in ROLES},
        },
    )
    assert mismatches([*before, *after]) == []
    assert_alike([together])
    assert memory["released"] < memory["before"]
    for role in ROLES:
        check_every_replay_but_the_last_before_the_release(role, first, last)


def counted(first: Record, last: Record, role: str) -> dict[str, list[int]]:
    """Before the release, and at the end."""
    names = ("replays", "checks", "values_checked", "mismatches")
    return {name: [record["roles"][role][name] for record in (first, last)] for name in names}


def check_every_replay_but_the_last_before_the_release(role: str, first: Record, last: Record) -> None:
    """Draft-extend is compared at once, the others in the next step, which must not find zeros."""
    found = counted(first, last, role)
    replays, checks, values = (last - first for first, last in list(found.values())[:3])
    assert replays > 0, role
    assert values > 0, role
    assert replays - checks == int(role != FIRST_ROLE), role
    assert found["mismatches"] == [0, 0], role
    assert last["roles"][role]["fallbacks"] == {}, role


def test_record(servers: AbServers, report: Report) -> None:
    check_record(servers, report)
