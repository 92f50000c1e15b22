"""``bench`` on a GPU: graphs are timed, their nodes counted, compiles seen, the floor is found."""

from __future__ import annotations

import pytest
import torch
from commands import needs_sglang

from integration.gpu import ab_kernels
from sglang_nsa_plugin.cli.bench import paths, timing
from sglang_nsa_plugin.kernels import library

pytestmark = pytest.mark.gpu
timed = pytest.mark.unsanitized("what is timed has the GPU to itself")


@pytest.mark.unsanitized("there kernels make the copies", tools=("initcheck",))
def test_nodes_are_counted_by_kind():
    numbers = torch.zeros(4096, dtype=torch.int32, device="cuda")
    others, event = torch.ones_like(numbers), torch.cuda.Event(external=True)

    def work():
        numbers.add_(1)
        numbers.copy_(others)
        event.record()

    assert timing.graph_nodes(work) == {"kernel": 1, "memcpy": 1, "event_record": 1}
    assert timing.graph_nodes(lambda: None) == {}


@timed
def test_the_floor_and_the_bandwidth_are_those_of_a_gpu():
    assert 0 < timing.floor_us(0.2)["median"] < 10
    assert 0 < timing.launch_us(0.2)["median"] < 50
    assert 500 < timing.copy_gb_s(0.2)["median"] < 20_000


@timed
def test_the_slope_is_the_time_of_one_call():
    """Twice the bytes take twice the time; the launch of the graph is in neither."""
    large = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    calls = {"half": lambda: large[: 1 << 27].add_(1), "whole": lambda: large.add_(1)}
    half, whole = (timing.spread(each)["median"] for each in timing.gpu_times(calls, 0.2).values())
    assert whole / half == pytest.approx(2, rel=0.15)


@needs_sglang
def test_rows_on_a_gpu(monkeypatch):
    """A few cases through SGLang's real backend and graphs: every path, nodes, compiles, launches."""
    from sglang_nsa_plugin.adapters import in_graph
    from sglang_nsa_plugin.cli.bench import run as bench
    from sglang_nsa_plugin.cli.bench.cases import Grid, Setup

    if not in_graph.is_generation():
        pytest.skip("this SGLang does not capture DSA's draft-extend in graphs")
    setup = Setup(width=8_192, requests=(3, 5), lengths=(200, 4_000))
    run = bench.Run(Grid((setup,), seconds=0.1), torch.device("cuda", 0), lambda what: None)
    rows = bench._graph_setup(run, setup)
    assert len(rows) == 8
    for row in rows:
        assert {"sglang_kernel", "cuda", "triton", "torch"} <= set(row["gpu_us"])
        assert min(row["gpu_us"].values()) > 0
        assert row["compiles"]["ours"] == 0
    recorded = [row for row in rows if "ours" in row["gpu_us"]]
    assert recorded[0]["compiles"]["sglang"] > 0  # a batch size that its kernel has not seen
    assert len(recorded) == 4
    for row in recorded:
        assert row["nodes"]["kernel"] >= 1
        assert row["nodes"]["event_record"] == 1
        assert row["launches"]["ours"] == 0
        assert row["memory_bytes"]["ours"] <= row["memory_bytes"]["sglang"]


@timed
def test_builds_of_the_kernel_are_timed_in_the_same_cells(monkeypatch):
    cells = [(1, 2_048, "both"), (8, 2_048, "paged")]
    monkeypatch.setattr(ab_kernels, "CELLS", {(4_096, 2): cells})
    own = library.load()
    rows = list(ab_kernels.measured({"old": own, "new": own}))
    assert [(row["requests"], row["length"], row["tables"]) for row in rows] == cells
    for row in rows:
        old, new = (row["us"][build]["median"] for build in ("old", "new"))
        assert 0.5 < old / new < 2


def test_a_build_that_writes_other_values_is_named(monkeypatch):
    monkeypatch.setattr(ab_kernels, "CELLS", {(4_096, 2): [(1, 2_048, "both")]})
    broken = {"bind": lambda *_: lambda _: None, "parameters": lambda: ["seq_lens"]}
    with pytest.raises(paths.DifferentValuesError, match="new"):
        next(ab_kernels.measured({"old": library.load(), "new": broken}))
