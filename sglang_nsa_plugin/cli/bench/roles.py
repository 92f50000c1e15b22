"""SGLang's plan of each role, and the plugin's, in one table."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_nsa_plugin.adapters import in_graph
from sglang_nsa_plugin.adapters.roles import (
    DECODE_ROLE,
    DRAFT_DECODE_ROLE,
    DRAFT_EXTEND_ROLE,
    VERIFY_ROLE,
    Role,
)
from sglang_nsa_plugin.cli.bench import cases, paths, timing
from sglang_nsa_plugin.cli.bench.cases import Case, Grid, Setup
from sglang_nsa_plugin.cli.bench.paths import OURS, SGLANG
from sglang_nsa_plugin.harness.installed import why_declined

# As a speculative step runs them; then the one of a server without speculation.
IN_ORDER = (DRAFT_DECODE_ROLE, VERIFY_ROLE, DRAFT_EXTEND_ROLE, DECODE_ROLE)


def measured_here() -> list[Role]:
    """The roles that the plugin fills in graphs with the installed SGLang."""
    in_graphs = in_graph.is_generation()
    return [
        role
        for role in IN_ORDER
        if (in_graphs or role is not DRAFT_EXTEND_ROLE) and why_declined(role.name) is None
    ]


def rows(
    grid: Grid, device: torch.device, roles: list[Role], advance: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """For each case of the grid and each of these roles: times, counts, bytes and memory of both plans.

    Raises:
        DifferentValuesError: the plans wrote different values.
    """
    for setup in grid.setups:
        for role in roles:
            pair = paths.pair_of(device, setup, role.name)
            cases.write_slots(pair.inputs)
            with pair.stub_process():
                for case in setup.cases():
                    cases.write_lengths(pair.inputs, case)
                    yield _row(pair, setup, case, role, grid.seconds)
                    advance(f"{role.name}, {case.requests} × {case.length:,}")
            del pair
            gc.collect()  # a backend and the plugin's fill refer to each other
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _row(pair: Any, setup: Setup, case: Case, role: Role, seconds: float) -> dict[str, Any]:
    bs, draft_tokens = case.requests, pair.ours.draft_tokens  # without speculation 1
    values = paths.step(pair, bs)
    planned = {SGLANG: pair.sglang_before_replay(bs), OURS: pair.before_replay(bs)}
    row = {
        "role": role.name,
        "decode_impl": setup.decode_impl,
        "requests": bs,
        "length": case.length,
        "width": setup.width,
        "draft_tokens": draft_tokens,
        "values_compared": values,
        "bytes": bytes_to_move(case, draft_tokens, role, paths.recorded_tables(pair, bs)),
        "host_us": _medians(timing.host_times(planned, seconds / 2)),
        "memory_bytes": {
            SGLANG: paths.memory_bytes(*pair.theirs.metadata(bs)),
            OURS: paths.memory_bytes(*pair.ours.metadata(bs)),
        },
    }
    if in_graph.is_generation():
        captured = {SGLANG: planned[SGLANG], OURS: pair.recording(bs)}
        row["gpu_us"] = _medians(timing.gpu_times(captured, seconds / 2))
        row["nodes"] = timing.graph_nodes(captured[OURS])
        # counted as graph nodes: a profiler would slow down what is timed after it
        row["launches"] = {
            name: sum(timing.graph_nodes(call).values()) for name, call in planned.items()
        }
    else:  # SGLang's plan waits for a copy, which cannot be captured
        row["launches"] = {name: timing.launches(call) for name, call in planned.items()}
    return row


def bytes_to_move(case: Case, draft_tokens: int, role: Role, tables: str) -> dict[str, int]:
    """The bytes of :func:`cases.bytes_to_move` for the rows and the lengths of this role."""
    lengths = Case(case.requests, case.length + role.length_offset(draft_tokens))
    return cases.bytes_to_move(lengths, role.rows_per_request(draft_tokens), tables)


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: timing.spread(samples)["median"] for name, samples in times.items()}
